"""The same network in what a user would run it with, each at its best honest setting, behind one call.

Exports are torch's own, in one call and without passes of ours, for the one batch that is sampled: a fixed shape is
what these libraries run fastest. Precisions: on a CPU that multiplies bf16 by itself, torch.compile and OpenVINO take
bf16, everything else float32; on a GPU float16, for ONNX files too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.core.environment import cpu
from benchmarks.peers.ddim_loop import NetworkCall
from engine.bundle.bundle_folder import Bundle
from engine.bundle.manifest import Manifest, NetworkEntry, Networks
from engine.errors import BackendError, ExportError, MissingPackageError
from engine.networks.config import UNetConfig
from engine.networks.half import cast_unet
from engine.networks.inputs import Conditions
from engine.networks.unet import UNet
from export.onnx.onnx_file import quiet_exporter
from export.trt.build import find_builders

_OPENVINO_NAMES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}


@dataclass(frozen=True, slots=True, eq=False)
class LibraryNetwork:
    """A network that can be called, and what it computes in. beside_torch: for loops in which torch works too.

    is_compiled: by torch.compile, whose code is another in every process.
    """

    call: NetworkCall
    precision: str
    beside_torch: NetworkCall | None = None
    is_compiled: bool = False


def has_bf16() -> bool:
    """Whether this CPU computes torch's and OpenVINO's bf16 by itself, rather than emulating it."""
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(cpu()["isa"])


def torch_precision(device: torch.device, compiled: bool) -> str:
    """What torch runs a network in: the fastest that this device computes by itself."""
    if device.type == "cuda":
        return "fp16"
    return "bf16" if compiled and has_bf16() else "fp32"


def eager(unet: UNet, device: torch.device) -> LibraryNetwork:
    """Plain torch: float32 on a CPU, float16 weights on a GPU."""
    module = _on_device(unet, device)
    return LibraryNetwork(lambda x, t, y: module(x, t, y), torch_precision(device, compiled=False))


def compiled(unet: UNet, device: torch.device) -> LibraryNetwork:
    """torch.compile with frozen weights; on a GPU with autotuning and CUDA graphs."""
    module = _on_device(unet, device)
    precision = torch_precision(device, compiled=True)
    return LibraryNetwork(compile_call(lambda x, t, y: module(x, t, y), device, precision), precision, is_compiled=True)


def compile_call(call: Callable[..., Any], device: torch.device, precision: str) -> Callable[..., Any]:
    """torch.compile at its best setting for inference; bf16 by autocast on a CPU. Raises BackendError at the call.

    call: of tensors, to one tensor. Its results are copies where the next call would overwrite them.
    """
    options: dict[str, Any] = {"freezing": True}
    if device.type == "cuda":
        options |= {"max_autotune": True, "triton.cudagraphs": True}
    fast = torch.compile(call, options=options)

    def run(*args: Any) -> Tensor:
        try:
            if precision == "bf16":
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    return fast(*args).float()
            with torch.no_grad():
                out = fast(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise BackendError(f"torch.compile of torch {torch.__version__} failed: {reason}") from error
        return out.clone() if device.type == "cuda" else out

    return run


def _on_device(unet: UNet, device: torch.device) -> nn.Module:
    if device.type != "cuda":
        return unet
    return half(unet).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def half(unet: UNet) -> UNet:
    """A float16 copy of a network."""
    return cast_unet(copy.deepcopy(unet), torch.float16)


def plain_export(unet: UNet, batch: int, path: Path) -> Path:
    """torch.onnx.export of a network for one batch; raises ExportError, or MissingPackageError without onnx."""
    config = unet.config
    inputs = {"x_t": torch.zeros(batch, config.in_channels, *config.image_size), "timestep": torch.zeros(batch)}
    if config.num_classes is not None:
        inputs["label"] = torch.zeros(batch, dtype=torch.int64)
    try:
        with quiet_exporter():
            torch.onnx.export(
                unet, (), str(path), kwargs=inputs, input_names=list(inputs), output_names=["out"], dynamo=True,
                verbose=False,
            )  # fmt: skip
    except ImportError as error:
        raise MissingPackageError("onnxscript", "a plain export", "onnx") from error
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"torch {torch.__version__} cannot export this network: {reason}") from error
    return path


def onnxruntime_network(path: Path, config: UNetConfig, device: torch.device, threads: int | None) -> LibraryNetwork:
    """ONNX Runtime at its defaults, with its CUDA provider on a GPU; raises MissingPackageError or BackendError.

    Beside torch its threads do not spin when they are done, which took guided steps 1.8 times as long.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError("onnxruntime", "the peer ONNX Runtime", "bench") from error
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise BackendError(f"this onnxruntime has no {provider}; install onnxruntime-gpu in its place")

    def opened(spins: bool) -> NetworkCall:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
        if threads is not None:
            options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])

        def call(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            feed = {name: value.cpu().numpy() for name, value in _feed(config, x, t, y).items()}
            return torch.from_numpy(session.run(None, feed)[0]).to(x.device)

        return call

    return LibraryNetwork(opened(True), "fp16" if device.type == "cuda" else "fp32", opened(False))


def openvino_network(
    path: Path, config: UNetConfig, device: torch.device, threads: int | None, bf16: bool = False
) -> LibraryNetwork:
    """OpenVINO on a CPU at its defaults, or told to compute in bf16; raises MissingPackageError or BackendError."""
    if device.type == "cuda":
        raise BackendError("OpenVINO does not run on an NVIDIA GPU; it is a peer where CUDA_VISIBLE_DEVICES is empty")
    if bf16 and not has_bf16():
        raise BackendError("this CPU has no bf16 of its own, so OpenVINO would only emulate it")
    try:
        import openvino
    except ImportError as error:
        raise MissingPackageError("openvino", "the peer OpenVINO", "bench") from error
    core = openvino.Core()
    if bf16 and core.get_property("CPU", "INFERENCE_PRECISION_HINT").to_string() == "bf16":
        raise BackendError("its default is bf16 already on this CPU")
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16"} if bf16 else {}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        model = core.compile_model(str(path), "CPU", options)
    except RuntimeError as error:
        raise BackendError(f"OpenVINO {openvino.__version__} cannot compile the plain export: {error}") from error

    def call(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        feed = {name: value.numpy() for name, value in _feed(config, x, t, y).items()}
        return torch.from_numpy(model(feed)[0])

    found = model.get_property("INFERENCE_PRECISION_HINT").to_string()
    return LibraryNetwork(call, _OPENVINO_NAMES.get(found, found))


def tensorrt_network(unet: UNet, manifest: Manifest, batch: int, folder: Path) -> LibraryNetwork:
    """A float16 plan of a plain export, built for the GPU in this machine; raises ExportError or BackendError.

    folder: empty; the plan is put there behind a manifest, as our backend for plans reads it.
    """
    from engine.backends.trt.trt_backend import TrtBackend
    from engine.backends.trt.trt_library import gpu_capability

    if not torch.cuda.is_available():
        raise BackendError("TensorRT needs an NVIDIA GPU, and this machine has none")
    try:
        builders = find_builders((gpu_capability(),))
    except ExportError:
        builders = find_builders(None)
    if not builders:
        raise BackendError("neither tensorrt nor tensorrt_rtx is installed here; install with: pip install tensorrt")
    path = plain_export(half(unet), batch, folder / "unet.fp16.onnx")
    # The data-centre library comes last and is the one timed on the GPU itself.
    entry = builders[-1].build(path, (batch, batch, batch), "fp16")
    Bundle.write(
        folder, dataclasses.replace(manifest, networks=Networks(NetworkEntry(manifest.unet.config, plans=(entry,))))
    )
    backend = TrtBackend(Bundle.open(folder), "fp16")
    return LibraryNetwork(lambda x, t, y: backend(x, t, Conditions(y)), "fp16")


def _feed(config: UNetConfig, x: Tensor, t: Tensor, y: Tensor | None) -> dict[str, Tensor]:
    feed = {"x_t": x, "timestep": t}
    return feed if config.num_classes is None or y is None else feed | {"label": y}
