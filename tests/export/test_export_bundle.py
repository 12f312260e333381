"""One export of a small random network, and everything that is promised of the bundle it makes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import export.to_onnx
import export.verify
from engine import Sampler, load_checkpoint, open_backend
from engine.backends.native.byte_ranges import read_ranges
from engine.backends.protocol import Backend
from engine.bundle.bundle_folder import Bundle
from engine.bundle.file_names import MANIFEST, UNET, onnx_name, ranges_name, weights_name
from engine.checkpoints.types import Checkpoint
from engine.errors import ExportError, OutputError
from engine.networks.classifier import Classifier
from engine.networks.config import Attention, NormSiLU, ResBlock
from engine.networks.inputs import Conditions
from engine.networks.unet import UNet
from export import to_onnx, to_trt
from export.onnx.onnx_file import has_wide_products
from export.trt.build import find_builders
from recipes.classifier_net import digits_classifier
from recipes.digits_net import digits_unet
from recipes.openai_format import to_openai

FACTS = {
    "family": "openai-guided",
    "image_size": (8, 12),
    "num_head_channels": 32,
    "noise_schedule": "cosine",
    "null_class": 10,
}
FLAGS = [
    *("--family", "openai-guided"),
    *("--image-size", "8x12"),
    *("--num-head-channels", "32"),
    *("--noise-schedule", "cosine"),
    *("--null-class", "10"),
]
CHECKOUT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Made:
    """The checkpoint file, what it holds, and the bundle that the command made of it."""

    file: Path
    checkpoint: Checkpoint
    bundle: Bundle
    printed: str

    def copy(self, folder: Path) -> Path:
        """The checkpoint file in another folder, so that a test may export it there."""
        return Path(shutil.copy(self.file, folder / "net.pt"))


def random_state(module: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    """Weights as after a training: norms away from one and zero, nothing left at its initial zero."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        fan_in = max(1, value[0].numel()) if value.ndim > 1 else 1
        is_norm = "norm" in name and name.endswith("weight")
        # Attention that is neither flat nor saturated.
        noise = 0.5 * noise if "qkv" in name else noise
        state[name] = 1 + 0.2 * noise if is_norm else noise * (fan_in**-0.5 if value.ndim > 1 else 0.1)
    return state


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Built plans are kept here and not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("export")
    config = dataclasses.replace(digits_unet(32, (1, 2), 1, 32), image_size=(8, 12))
    torch.save(to_openai(random_state(UNet(config), 0), config), folder / "net.pt")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *values, **_: lines.append(" ".join(map(str, values))))
        arguments = ["--target", "sm86,sm89"] if has_rtx() else []
        status = to_trt.main([str(folder / "net.pt"), "--json", *FLAGS, *arguments])
    assert status == 0, lines
    bundle = Bundle.open(folder / "net.engine")
    return Made(folder / "net.pt", load_checkpoint(folder / "net.pt", **FACTS), bundle, "\n".join(lines))


def has_rtx() -> bool:
    try:
        import tensorrt_rtx  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.fixture
def quick(made: Made, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Exports take the finished ONNX files instead of making them again."""

    def copy(_unet: UNet, path: Path) -> None:
        shutil.copy(made.bundle.path / path.name, path)

    monkeypatch.setattr(export.to_onnx, "export_onnx", copy)
    return made


@pytest.fixture
def unverified(quick: Made, monkeypatch: pytest.MonkeyPatch) -> Made:
    """As quick, and without running the artefacts."""
    monkeypatch.setattr(export.to_onnx, "verify", lambda *_: quick.bundle.manifest.unet.verification)
    return quick


def inputs(batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, fractional timesteps, labels."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, 1, 8, 12, generator=generator)
    return x_t, 999 * torch.rand(batch, generator=generator), torch.randint(0, 11, (batch,), generator=generator)


def relative_rms(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------- what the bundle holds


def test_files_of_the_bundle(made):
    expected = {MANIFEST, weights_name(UNET), onnx_name(UNET), onnx_name(UNET, "fp16")} | (
        {"unet.rtx.plan"} if has_rtx() else set()
    )
    assert leftovers(made.bundle.path) == expected
    assert leftovers(made.file.parent) == {"net.pt", "net.engine"}
    made.bundle.verify()
    modes = {path.stat().st_mode & 0o777 for path in made.bundle.path.iterdir()}
    assert len(modes) == 1, "one file has another mode than the rest"


def test_manifest(made):
    manifest = made.bundle.manifest
    assert manifest.family == "openai-guided"
    assert manifest.unet.config == made.checkpoint.config
    assert manifest.checkpoint_sha256 == made.checkpoint.sha256
    assert [a[0] for a in manifest.assumptions] == [a.name for a in made.checkpoint.assumptions]
    assert {"torch", "onnx", "onnxscript"} <= set(manifest.versions)
    assert manifest.unet.files[onnx_name(UNET)] == "fp32 throughout"
    for kept in ("sin/cos", "group-norm statistics", "softmax", "input and output"):
        assert kept in manifest.unet.files[onnx_name(UNET, "fp16")]


def test_weights_are_the_checkpoints(made):
    from safetensors.torch import load_file

    stored = load_file(made.bundle.path / weights_name(UNET))
    assert set(stored) == set(made.checkpoint.weights)
    assert all(torch.equal(stored[name], value) for name, value in made.checkpoint.weights.items())


def test_every_artefact_was_measured(made):
    measured = {(m.artefact, m.precision) for m in made.bundle.manifest.unet.verification}
    assert {(onnx_name(UNET), "fp32"), (onnx_name(UNET, "fp16"), "fp16"), (weights_name(UNET), "fp16")} <= measured
    for m in made.bundle.manifest.unet.verification:
        assert m.passed
        assert 0 < m.rms <= m.max_abs
        assert m.limit == export.verify.LIMITS[m.precision]
        if m.runner != "openvino cpu":
            assert m.worst_layer is not None
            assert m.worst_layer.startswith("blocks.")


def test_json_summary(made):
    data = json.loads(made.printed)
    assert data["bundle"] == str(made.bundle.path)
    assert data["files"].keys() == made.bundle.manifest.files.keys()
    assert all(m["passed"] and m["relative"] <= m["limit"] for m in data["networks"]["unet"]["verification"])


def test_onnx_files_hold_no_paths_of_this_machine(made):
    for name in (onnx_name(UNET), onnx_name(UNET, "fp16")):
        content = (made.bundle.path / name).read_bytes()
        assert str(CHECKOUT).encode() not in content
        assert b".py" not in content


@pytest.mark.parametrize("name", [onnx_name(UNET), onnx_name(UNET, "fp16")])
def test_onnx_interface(made, name):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(made.bundle.path / name)
    onnx.checker.check_model(model, full_check=True)
    types = onnx.TensorProto

    def shape(value):
        return value.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    assert {value.name: shape(value) for value in model.graph.input} == {
        "x_t": (types.FLOAT, ["batch", 1, 8, 12]),
        "timestep": (types.FLOAT, ["batch"]),
        "label": (types.INT64, ["batch"]),
    }
    assert [(value.name, shape(value)) for value in model.graph.output] == [("out", (types.FLOAT, ["batch", 2, 8, 12]))]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]


def test_fp16_file_keeps_softmax_angles_and_statistics_in_fp32(made):
    onnx = pytest.importorskip("onnx")
    model = onnx.shape_inference.infer_shapes(onnx.load(made.bundle.path / onnx_name(UNET, "fp16")))
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.input)}
    nodes = list(model.graph.node)
    for op in ("Softmax", "Sin", "Cos"):
        found = [node for node in nodes if node.op_type == op]
        assert found
        assert all(types[node.input[0]] == onnx.TensorProto.FLOAT for node in found)
    norms = [node for node in nodes if node.op_type == "GroupNormalization"]
    blocks = made.checkpoint.config.blocks
    counts = {ResBlock: 2, Attention: 1, NormSiLU: 1}
    assert len(norms) == sum(counts.get(type(block), 0) for block in blocks)
    assert all(a.i == onnx.TensorProto.FLOAT for node in norms for a in node.attribute if a.name == "stash_type")
    assert all(types[node.input[0]] == onnx.TensorProto.FLOAT16 for node in norms)
    big = [w for w in model.graph.initializer if np.prod(w.dims) > 64]
    assert all(w.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64) for w in big)


# ---------------------------------------------------------------- what the artefacts compute


@pytest.mark.parametrize(
    ("backend", "precision"), [("ort", "fp32"), ("ov", "fp32"), ("eager", "fp32"), ("ort", "fp16")]
)
def test_artefact_against_torch_at_any_batch(made, backend, precision):
    run = open_here(made, backend, precision)
    unet = made.checkpoint.unet()
    for batch in range(1, 6):
        x_t, timestep, y = inputs(batch, seed=batch)
        got, wanted = run(x_t, timestep, Conditions(y)), unet(x_t, timestep, y)
        assert got.dtype == torch.float32
        assert got.shape == wanted.shape
        assert relative_rms(got, wanted) < export.verify.LIMITS[precision]


@pytest.mark.parametrize("backend", ["ort", "ov"])
def test_a_row_has_the_same_bits_in_every_batch(made, backend):
    run = open_here(made, backend, "fp32")
    x_t, timestep, y = inputs(16)
    alone = torch.cat([run(x_t[i, None], timestep[i, None], Conditions(y[i, None])) for i in range(16)])
    for batch in range(2, 17):
        assert torch.equal(run(x_t[:batch], timestep[:batch], Conditions(y[:batch])), alone[:batch]), batch
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(x_t[order], timestep[order], Conditions(y[order])), alone[order])


def open_here(made: Made, backend: str, precision: str) -> Backend:
    pytest.importorskip({"ort": "onnxruntime", "ov": "openvino", "eager": "torch"}[backend])
    return open_backend(made.bundle, backend, precision, threads=2)


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize("backend", ["ort", "ov"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_seed_is_an_image_alone_in_a_batch_and_at_any_slot(made, backend, sampler):
    opened = Sampler.open(made.bundle, backend)
    options = {"steps": 5, "sampler": sampler}
    together = opened.sample(8, seed=40, batch_size=8, **options)
    refilled = opened.sample(8, seed=40, batch_size=3, **options)
    turned = opened.sample(8, seeds=[47, 46, 45, 44, 43, 42, 41, 40], batch_size=8, **options)
    alone = torch.cat([opened.sample(1, seed=40 + i, **options) for i in range(8)])
    opened.close()
    assert torch.equal(alone, together)
    assert torch.equal(alone, refilled)
    assert torch.equal(alone, turned.flip(0))
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.trt
def test_plan(made):
    if not has_rtx():
        pytest.skip("plans without a GPU need TensorRT-RTX: pip install tensorrt-rtx-cu13")
    (plan,) = made.bundle.manifest.unet.plans
    assert (plan.file, plan.library, plan.targets) == ("unet.rtx.plan", "tensorrt_rtx", ("sm86", "sm89"))
    assert plan.batch_profile == (1, 8, 64)
    assert plan.precision == "fp16"
    assert made.bundle.file(plan.file).stat().st_size > 100_000
    assert made.bundle.manifest.versions["tensorrt_rtx"] == plan.library_version


@pytest.mark.trt
def test_unknown_target(made, tmp_path, capsys):
    if not has_rtx():
        pytest.skip("plans without a GPU need TensorRT-RTX: pip install tensorrt-rtx-cu13")
    status = to_trt.main([str(made.copy(tmp_path)), "--target", "sm89,sm42"])
    assert status == 2
    assert "unknown target sm42; TensorRT-RTX knows sm75, sm80, sm86, sm89, sm120" in capsys.readouterr().err
    assert leftovers(tmp_path) == {"net.pt"}


@pytest.mark.trt
@pytest.mark.parametrize("precision", ["bf16", "fp32", "int8"])
def test_turing_runs_fp16_only(made, tmp_path, capsys, precision):
    if not has_rtx():
        pytest.skip("plans without a GPU need TensorRT-RTX: pip install tensorrt-rtx-cu13")
    status = to_trt.main([str(made.copy(tmp_path)), "--target", "sm75,sm89", "--precision", precision])
    assert status == 2
    assert f"no {precision} convolutions for sm75; leave sm75 out of --target" in capsys.readouterr().err
    assert leftovers(tmp_path) == {"net.pt"}


def test_unknown_precision(made, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        to_trt.main([str(made.copy(tmp_path)), "--precision", "fp8"])
    assert "fp8" in capsys.readouterr().err


@pytest.mark.trt
def test_plan_that_cannot_be_built(unverified, tmp_path, capsys, monkeypatch):
    if not has_rtx():
        pytest.skip("plans without a GPU need TensorRT-RTX: pip install tensorrt-rtx-cu13")

    onnx = pytest.importorskip("onnx")
    helper = onnx.helper

    def unknown_operator(_unet: UNet, path: Path) -> None:
        node = helper.make_node("NoSuchOperator", ["x"], ["y"])
        x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, [1, 8]) for name in "xy")
        onnx.save(helper.make_model(helper.make_graph([node], "unet", [x], [y])), path)

    monkeypatch.setattr(export.to_onnx, "export_onnx", unknown_operator)
    assert to_trt.main([str(unverified.copy(tmp_path)), *FLAGS]) == 2
    message = capsys.readouterr().err
    assert "tensorrt_rtx" in message
    assert "cannot read unet.fp16.onnx:\n  " in message
    assert "python -m export.to_onnx CHECKPOINT" in message
    assert leftovers(tmp_path) == {"net.pt"}


def test_an_unreadable_file_has_no_products(tmp_path):
    pytest.importorskip("onnx")
    (tmp_path / onnx_name(UNET)).write_bytes(b"no protobuf at all")
    with pytest.raises(ExportError, match="not a readable ONNX file"):
        has_wide_products(tmp_path / onnx_name(UNET))


@pytest.mark.trt
def test_failed_build_gives_the_librarys_reason(made, tmp_path):
    if not has_rtx():
        pytest.skip("plans without a GPU need TensorRT-RTX: pip install tensorrt-rtx-cu13")
    shutil.copy(made.bundle.path / onnx_name(UNET), tmp_path)
    (builder,) = (b for b in find_builders(("sm75",)) if b.library.name == "tensorrt_rtx")
    # Turing has no matrix products in fp32.
    with pytest.raises(ExportError, match=r"(?s)cannot build unet.rtx.plan for sm75:\n  .*Turing.*Try fewer targets"):
        builder.build(tmp_path / onnx_name(UNET), (1, 2, 2), "fp32")
    assert leftovers(tmp_path) == {onnx_name(UNET)}


@pytest.fixture
def without_tensorrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)


def test_without_tensorrt_the_rest_is_whole(unverified, tmp_path, capsys, without_tensorrt):
    assert to_trt.main([str(unverified.copy(tmp_path)), *FLAGS]) == 0
    out, err = capsys.readouterr()
    assert "no TensorRT is installed here, so no plan is built; install it with: pip install 'unet-rt[trt]'\n" in err
    assert onnx_name(UNET, "fp16") in out
    bundle = Bundle.open(tmp_path / "net.engine")
    bundle.verify()
    assert bundle.manifest.unet.plans == ()
    assert bundle.has(onnx_name(UNET, "fp16"))
    x_t, timestep, y = inputs(2)
    assert open_backend(bundle, "eager")(x_t, timestep, Conditions(y)).shape == (2, 2, 8, 12)


def test_target_without_tensorrt(made, tmp_path, capsys, without_tensorrt):
    assert to_trt.main([str(made.copy(tmp_path)), *FLAGS, "--target", "sm89"]) == 2
    message = capsys.readouterr().err
    assert "--target sm89 needs TensorRT-RTX, which is not installed; install it with: pip install" in message
    assert leftovers(tmp_path) == {"net.pt"}


# ---------------------------------------------------------------- the command


def test_to_onnx_prints_the_table(quick, tmp_path, capsys):
    assert to_onnx.main([str(quick.copy(tmp_path)), "--out", str(tmp_path / "new" / "x.engine"), *FLAGS]) == 0
    out, err = capsys.readouterr()
    assert "unet.onnx" in out
    assert "rms / output rms" in out
    assert "onnxruntime cpu" in out
    assert "fp16" not in out
    assert leftovers(tmp_path / "new" / "x.engine") == {MANIFEST, weights_name(UNET), onnx_name(UNET)}
    assert "Traceback" not in err


@pytest.mark.parametrize("command", [to_onnx, to_trt])
def test_8_bit_convolutions_where_asked(unverified, without_tensorrt, tmp_path, command):
    file = unverified.copy(tmp_path)
    assert command.main([str(file), *FLAGS, "--native-int8"]) == 0
    bundle = Bundle.open(file.with_suffix(".engine"))
    assert read_ranges(bundle.file(ranges_name(UNET)))
    assert "3x3 convolutions in ResBlocks in int8" in bundle.manifest.unet.files[ranges_name(UNET)]
    (measured,) = (m for m in bundle.manifest.unet.verification if m.artefact == ranges_name(UNET))
    assert (measured.precision, measured.runner) == ("int8", "torch cpu")
    assert 0 < measured.relative < 0.03


def test_assumptions_are_said(unverified, tmp_path, capsys):
    flags = [flag for flag in FLAGS if flag not in ("--noise-schedule", "cosine")]
    assert to_onnx.main([str(unverified.copy(tmp_path)), *flags]) == 0
    said = capsys.readouterr().err
    assert "assumed noise_schedule = linear" in said
    assert "change it with --noise-schedule" in said
    stored = {name: value for name, value, _ in Bundle.open(tmp_path / "net.engine").manifest.assumptions}
    assert stored["noise_schedule"] == "linear"


def test_a_second_export_replaces_the_first_as_a_whole(unverified, tmp_path):
    file = unverified.copy(tmp_path)
    shutil.copytree(unverified.bundle.path, tmp_path / "net.engine")
    (tmp_path / "net.engine" / "stale").write_text("from before")
    assert to_onnx.main([str(file), *FLAGS]) == 0
    assert leftovers(tmp_path / "net.engine") == {MANIFEST, weights_name(UNET), onnx_name(UNET)}
    assert leftovers(tmp_path) == {"net.pt", "net.engine"}


def test_a_foreign_folder_is_refused_before_the_work(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export.to_onnx, "export_onnx", lambda *_: pytest.fail("the work began"))
    (tmp_path / "net.engine").mkdir()
    (tmp_path / "net.engine" / "thesis.txt").write_text("mine")
    assert to_onnx.main([str(made.copy(tmp_path)), *FLAGS]) == 2
    assert "is a folder that this program did not write; choose another path" in capsys.readouterr().err
    assert (tmp_path / "net.engine" / "thesis.txt").read_text() == "mine"
    assert leftovers(tmp_path) == {"net.pt", "net.engine"}


def test_unwritable_folder(made, tmp_path, capsys, monkeypatch):
    real = Path.mkdir

    def refuse(path, *args, **kwargs):
        if path.name.startswith(".tmp-"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert to_onnx.main([str(made.file), "--out", str(tmp_path / "x.engine"), *FLAGS]) == 2
    message = capsys.readouterr().err
    assert f"cannot write {tmp_path / 'x.engine'}: Permission denied; choose a folder that you may write to" in message
    assert leftovers(tmp_path) == set()


@pytest.mark.parametrize("name", [weights_name(UNET), onnx_name(UNET), MANIFEST])
def test_full_disk(unverified, tmp_path, capsys, monkeypatch, name):
    file = unverified.copy(tmp_path)
    real = Path.open

    def full(path, mode="r", *args, **kwargs):
        if path.name == name and "w" in mode and ".tmp-" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    if name == onnx_name(UNET):
        monkeypatch.setattr(export.to_onnx, "export_onnx", lambda _, path: path.open("wb"))
    assert to_onnx.main([str(file), *FLAGS]) == 2
    message = capsys.readouterr().err
    assert f"cannot write {tmp_path / 'net.engine'}: No space left on device; free space on this disk" in message
    assert leftovers(tmp_path) == {"net.pt"}


def test_interrupted(unverified, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export.to_onnx, "verify", interrupt)
    assert to_onnx.main([str(unverified.copy(tmp_path)), *FLAGS]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert leftovers(tmp_path) == {"net.pt"}


def test_classifier_is_refused(tmp_path, capsys):
    config = digits_classifier()
    torch.save(to_openai(random_state(Classifier(config), 1), config), tmp_path / "net.pt")
    flags = ["--image-size", "32", "--num-head-channels", "32"]
    assert to_onnx.main([str(tmp_path / "net.pt"), *flags]) == 2
    assert "is a noise-conditioned classifier; pass the U-Net's checkpoint" in capsys.readouterr().err
    assert leftovers(tmp_path) == {"net.pt"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "is empty"), (b"PK\x03\x04 and then nothing", "net.pt"), (b"text", "net.pt")],
)
def test_file_that_is_no_checkpoint(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "net.pt").write_bytes(content)
    assert to_trt.main([str(tmp_path / "net.pt")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert leftovers(tmp_path) <= {"net.pt"}


# ---------------------------------------------------------------- verification that fails


def corrupt(path: Path, name: str) -> None:
    """Scale one weight tensor of an ONNX file."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    (tensor,) = [w for w in model.graph.initializer if w.name == name]
    values = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values * values.dtype.type(1.5), name))
    onnx.save(model, path)


@pytest.mark.parametrize("artefact", [onnx_name(UNET), onnx_name(UNET, "fp16")])
def test_an_artefact_that_differs_is_not_written(quick, tmp_path, capsys, monkeypatch, artefact):
    copy = export.to_onnx.export_onnx
    blocks = quick.checkpoint.config.blocks
    victim = next(i for i, block in enumerate(blocks) if isinstance(block, ResBlock) and i > len(blocks) // 2)

    def broken(unet: UNet, path: Path) -> None:
        copy(unet, path)
        if path.name == artefact:
            corrupt(path, f"blocks.{victim}.conv2.weight")

    monkeypatch.setattr(export.to_onnx, "export_onnx", broken)
    shutil.copytree(quick.bundle.path, tmp_path / "net.engine")
    assert to_trt.main([str(quick.copy(tmp_path)), *FLAGS]) == 2
    message = capsys.readouterr().err
    assert "the export differs from the checkpoint by too much:" in message
    assert f"{artefact} on onnxruntime cpu in " in message
    # The error begins in that block and may still grow behind it.
    worst = re.search(r"worst layer blocks\.(\d+) \w+, 0\.\d", message)
    assert worst is not None
    assert int(worst[1]) >= victim
    assert ("export.to_onnx CHECKPOINT" in message) == (artefact == onnx_name(UNET, "fp16"))
    assert leftovers(tmp_path) == {"net.pt", "net.engine"}
    Bundle.open(tmp_path / "net.engine").verify()


def test_from_python(unverified, tmp_path):
    said: list[str] = []
    bundle = to_onnx.export_bundle(unverified.checkpoint, tmp_path / "x.engine", report=said.append)
    assert bundle.path == tmp_path / "x.engine"
    assert said == ["writing weights and fp32 ONNX", "verifying against the checkpoint"]
    with pytest.raises(OutputError, match="did not write"):
        to_onnx.export_bundle(unverified.checkpoint, tmp_path, report=said.append)


def test_exporter_failure_is_an_export_error(made, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("unsupported operator\nand a page of text")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match=r"torch .* cannot export this network: unsupported operator$"):
        to_onnx.export_bundle(made.checkpoint, tmp_path / "x.engine")
    assert leftovers(tmp_path) == set()
