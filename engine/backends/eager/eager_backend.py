"""The network in torch: the fp32 reference on every machine, and fused fp16 on CUDA without TensorRT."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.bundle.from_checkpoint import checkpoint_manifest
from engine.bundle.manifest import Manifest
from engine.checkpoints.types import Checkpoint, build_unet
from engine.errors import BackendError
from engine.networks.half import cast_unet
from engine.networks.inputs import UNCONDITIONED, Conditions
from engine.networks.operators import TritonOperators, use_operators
from engine.networks.unet import UNet
from engine.threads import torch_threads

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class EagerBackend:
    """engine.networks.unet.UNet called directly."""

    name = "eager"

    def __init__(self, manifest: Manifest, unet: UNet, precision: str, threads: int | None) -> None:
        self.manifest, self.precision = manifest, precision
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._threads = threads
        parts = [name for name, _ in manifest.unet.fp32_parts] if precision == "fp16" else []
        self._unet: UNet | None = cast_unet(unet, _DTYPES[precision], parts).to(self.device)
        if self.device.type == "cuda" and precision != "fp32" and importlib.util.find_spec("triton") is not None:
            fuse(self._unet)

    @classmethod
    def from_weights(cls, manifest: Manifest, path: Path, precision: str, threads: int | None) -> EagerBackend:
        """Weights from a bundle's safetensors file."""
        from safetensors.torch import load_file

        return cls(manifest, build_unet(manifest.unet.config, load_file(path)), precision, threads)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, precision: str = "fp32", threads: int | None = None
    ) -> EagerBackend:
        """A training checkpoint without a bundle."""
        return cls(checkpoint_manifest(checkpoint), checkpoint.unet(), precision, threads)

    def __call__(self, x_t: Tensor, timestep: Tensor, conditions: Conditions = UNCONDITIONED) -> Tensor:
        """See engine.backends.protocol.Backend."""
        if self._unet is None:
            raise BackendError("this backend was closed; open the bundle again")
        with torch_threads(self._threads), torch.inference_mode():
            return self._unet(x_t, timestep, **conditions.tensors())

    def fit(self, batch: int) -> int:
        """Any batch runs as it is."""
        return batch

    def bind(self, buffers: Mapping[str, Tensor]) -> BoundUNet:
        """See engine.backends.protocol.Capturable; raises BackendError once closed."""
        if self._unet is None:
            raise BackendError("this backend was closed; open the bundle again")
        return BoundUNet(self._unet, buffers)

    def close(self) -> None:
        self._unet = None


@dataclass(frozen=True, slots=True, eq=False)
class BoundUNet:
    """A call of the network from buffers to a buffer; see engine.backends.protocol.Bound."""

    unet: UNet
    buffers: Mapping[str, Tensor]

    def enqueue(self, stream: object) -> None:
        """On torch's current stream, which is the one given."""
        given = self.buffers
        with torch.no_grad():
            out = self.unet(given["x_t"], given["timestep"], given.get("label"), given.get("image"))
        given["out"].copy_(out)

    def check_capturable(self, stream: object) -> None:
        """PyTorch's kernels can be captured."""


def fuse(unet: UNet) -> None:
    """Let a network run channels-last, which tensor cores read fastest, with Triton's GroupNorm+SiLU and attention."""
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    use_operators(unet, TritonOperators())
