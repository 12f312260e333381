"""A classifier's gradient as a graph: its rules, its files, the bundle that holds it and the sampler that uses it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import adm_classifier, adm_unet, call_main, random_network, with_classifier, write_bundle, write_checkpoint
from native_cases import instruction_sets
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import BackendError, BundleError, CheckpointError, ExportError, RequestError, Sampler, load_checkpoint
from engine.backends import ort, ov
from engine.backends.native.native_guide import NativeGuide
from engine.backends.ort.ort_backend import OrtGuide
from engine.backends.ov.ov_backend import OpenVINOGuide
from engine.backends.registry import open_guide
from engine.bundle.bundle_folder import Bundle
from engine.bundle.file_names import CLASSIFIER, onnx_name, weights_name
from engine.bundle.manifest import ClassifierEntry
from engine.checkpoints.types import Checkpoint
from engine.diffusion.guidance import ClassifierGuidance
from engine.networks.classifier import AutogradGuide, Classifier
from export import guide as guidance
from export import to_onnx, to_trt
from export.guide import GAINS, LIMITS, GuideCase, export_classifier
from export.onnx import gradient, gradient_rules
from export.onnx.onnx_file import has_wide_products
from export.subject import Subject, make_subject
from export.to_onnx import export_bundle
from export.trt.build import find_builders

# One traced graph in torch beside autograd, fp32, relative to the largest gradient: the same operators in another
# order, twice through the network.
TRACED = 3e-5
# ONNX Runtime and OpenVINO in fp32 beside autograd, likewise.
OTHER_LIBRARY = 1e-4
# A rule beside autograd in float64.
RULE = 1e-12

UNET_CONFIG = adm_unet(mult=(1,), attention=(), num_classes=None)
CLASSIFIER_CONFIG = adm_classifier(mult=(1, 1), attention=(), num_classes=5)
FACTS = {"family": "openai-guided", "image_size": (8, 8), "num_head_channels": 32, "noise_schedule": "cosine"}


@dataclasses.dataclass(frozen=True)
class Made:
    """The two checkpoint files and the bundle made of them, with fp16."""

    unet: Path
    classifier: Path
    bundle: Bundle

    @property
    def network(self) -> Classifier:
        return load_checkpoint(self.classifier, **FACTS).classifier()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("gradient")
    unet = write_checkpoint(folder / "net.pt", UNET_CONFIG)
    classifier = write_checkpoint(folder / "clf.pt", CLASSIFIER_CONFIG, seed=1)
    # The U-Net's own export has its tests; here its weights are enough.
    path = write_bundle(folder / "net.engine", UNET_CONFIG)
    subject = make_subject(load_checkpoint(unet, **FACTS))
    opened = Bundle.open(path)
    entry = export_classifier(path, load_checkpoint(classifier, **FACTS), subject, fp16=True)
    Bundle.write(path, with_classifier(opened.manifest, entry))
    return Made(unet, classifier, Bundle.open(path))


def case(network: Classifier, batch: int, seed: int = 0, y: Tensor | None = None) -> GuideCase:
    """Random inputs of a classifier and autograd's answer; the last of several rows has a scale of 0."""
    rng, config = torch.Generator().manual_seed(seed), network.config
    x_t = torch.randn(batch, config.in_channels, *config.image_size, generator=rng)
    timestep = torch.randint(1000, (batch,), generator=rng).float()
    labels = torch.randint(config.num_classes, (batch,), generator=rng) if y is None else y
    scale = torch.rand(batch, generator=rng) * 8
    if batch > 1:
        scale[-1] = 0
    inputs = (x_t, timestep, labels, scale)
    return GuideCase(*inputs, *AutogradGuide(network)(*inputs))


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


def backward(function, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """A random cotangent of function(inputs[0], ...) and autograd's gradient of the first input."""
    x = inputs[0].requires_grad_(True)
    out = function(x, *inputs[1:])
    cotangent = torch.randn(out.shape, dtype=torch.float64)
    return cotangent, torch.autograd.grad(out, x, cotangent)[0]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((8, 8), (3, 3), (1, 1), (1, 1)),
        ((8, 6), (1, 1), (1, 1), (0, 0)),
        ((8, 8), (3, 3), (2, 2), (1, 1)),
        ((7, 9), (3, 3), (2, 2), (1, 1)),  # the last row and column seen by one position only
        ((8, 8), (3, 3), (2, 2), (0, 0)),  # a row that no position sees
        ((8, 9), (4, 2), (2, 1), (1, 0)),
        ((10, 10), (1, 1), (3, 3), (0, 0)),  # whole rows between the positions
    ],
)
def test_convolution(size, kernel, stride, padding):
    x, weight = randn(2, 3, *size), randn(5, 3, *kernel)
    cotangent, wanted = backward(lambda x: F.conv2d(x, weight, None, stride, padding), x)
    got = gradient_rules.convolution_backward(
        cotangent, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, (True, False, False)
    )
    assert relative(got[0], wanted) < RULE
    assert got[1:] == (None, None)


@pytest.mark.parametrize("size", [(8, 6), (7, 9)])
def test_average(size):
    x = randn(2, 3, *size)
    cotangent, wanted = backward(lambda x: F.avg_pool2d(x, 2), x)
    got = gradient_rules.avg_pool2d_backward(cotangent, x, [2, 2], [2, 2], [0, 0], False, True, None)
    assert relative(got, wanted) < RULE


def test_nearest_upsampling():
    x = randn(2, 3, 4, 5)
    cotangent, wanted = backward(lambda x: F.interpolate(x, scale_factor=(2.0, 3.0), mode="nearest"), x)
    assert relative(gradient_rules.upsample_nearest2d_backward(cotangent, [8, 15], [2, 3, 4, 5]), wanted) < RULE


@pytest.mark.parametrize(("dim", "index"), [(0, 0), (1, 2), (-1, -1), (2, 1)])
def test_select(dim, index):
    x = randn(2, 3, 4)
    cotangent, wanted = backward(lambda x: x.select(dim, index), x)
    assert torch.equal(gradient_rules.select_backward(cotangent, [2, 3, 4], dim, index), wanted)


@pytest.mark.parametrize(("dim", "start", "end"), [(0, 0, 2), (1, 1, 3), (-1, -2, 4), (2, 0, 1), (1, 0, 2**63 - 1)])
def test_slice(dim, start, end):
    x = randn(2, 3, 4)
    cotangent, wanted = backward(lambda x: torch.ops.aten.slice.Tensor(x, dim, start, end), x)
    assert torch.equal(gradient_rules.slice_backward(cotangent, [2, 3, 4], dim, start, end, 1), wanted)


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm(affine):
    # An offset of a hundred deviations: squares before means would lose half of the digits.
    x = (torch.randn(2, 6, 4, 5) + 100).requires_grad_(True)
    weight, bias = (torch.randn(6), torch.randn(6)) if affine else (None, None)
    out = F.group_norm(x, 3, weight, bias, 1e-5)
    cotangent = torch.randn_like(out)
    (wanted,) = torch.autograd.grad(out, x, cotangent)
    sizes = (2, 6, 20, 3)
    y, mean, rstd = gradient_rules.native_group_norm(x, weight, bias, *sizes, 1e-5)
    grad, *others = gradient_rules.native_group_norm_backward(
        cotangent, x, mean, rstd, weight, *sizes, (True, False, False)
    )
    assert relative(y, out) < 1e-4
    assert relative(grad, wanted) < 1e-4
    assert others == [None, None]


def test_silu_and_softmax():
    x = randn(3, 7)
    cotangent, wanted = backward(F.silu, x)
    assert relative(gradient_rules.silu_backward(cotangent, x), wanted) < RULE
    cotangent, wanted = backward(lambda x: torch.softmax(x, 1), x)
    assert relative(gradient_rules.softmax_backward(cotangent, x.softmax(1), 1, torch.float64), wanted) < RULE


X, W = torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 3, 3)
ONLY_INPUT = (True, False, False)
REFUSED = {
    "2 groups": lambda: gradient_rules.convolution_backward(
        X, X, W, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 2, ONLY_INPUT
    ),
    r"dilation \(2, 2\)": lambda: gradient_rules.convolution_backward(
        X, X, W, None, (1, 1), (1, 1), (2, 2), False, (0, 0), 1, ONLY_INPUT
    ),
    "expected a plain one with padding < kernel": lambda: gradient_rules.convolution_backward(
        X, X, W, None, (1, 1), (3, 1), (1, 1), False, (0, 0), 1, ONLY_INPUT
    ),
    r"freeze the network: requires_grad_\(False\)": lambda: gradient_rules.convolution_backward(
        X, X, W, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, True, False)
    ),
    "expected tiles that neither overlap nor are padded": lambda: gradient_rules.avg_pool2d_backward(
        X, X, [3, 3], [1, 1], [0, 0], False, True, None
    ),
    r"from \(3, 4\) to \(4, 4\)": lambda: gradient_rules.upsample_nearest2d_backward(X, [4, 4], [1, 2, 3, 4]),
    "a slice of step 2": lambda: gradient_rules.slice_backward(X, [1, 2, 8, 4], 2, 0, 8, 2),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_rule_does_not_cover_is_refused(message):
    with pytest.raises(ExportError, match=message):
        REFUSED[message]()


@pytest.mark.parametrize(
    "config",
    [
        adm_classifier(channels=3, size=(4, 6), mult=(1, 1), attention=(), attention_pool=False, updown=True),
        adm_classifier(scale_shift=False, conv_resample=False, num_classes=3),
    ],
    ids=["average pool, ResBlock down, not square", "attention pool, average down"],
)
def test_traced_graph_equals_autograd(config):
    network = random_network(config)
    graph = gradient.GradientGraph(gradient.trace_gradient(network), 1.0)
    for batch in (1, 2, 7):
        wanted = case(network, batch)
        with torch.no_grad():
            grad, log_p = graph(*wanted.inputs())
        assert relative(grad, wanted.grad) < TRACED
        assert relative(log_p, wanted.log_p) < TRACED


@pytest.mark.parametrize("kind", [OrtGuide, OpenVINOGuide])
def test_file_equals_autograd_for_every_batch(made, kind):
    network = made.network
    guide = kind(network.config, made.bundle.file(onnx_name(CLASSIFIER)), 1)
    for batch in (1, 2, 3, 5, 8):
        wanted = case(network, batch, seed=batch)
        grad, log_p = guide(*wanted.inputs())
        assert relative(grad, wanted.grad) < OTHER_LIBRARY
        assert relative(log_p, wanted.log_p) < OTHER_LIBRARY
        assert batch == 1 or not grad[-1].any(), "a scale of 0 turns guidance off for its row"
    guide.close()
    with pytest.raises(BackendError, match="this classifier was closed"):
        guide(*wanted.inputs())


@pytest.mark.parametrize("name", [onnx_name(CLASSIFIER), onnx_name(CLASSIFIER, "fp16")])
def test_file_is_an_ordinary_forward_graph(made, name):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(made.bundle.file(name))
    onnx.checker.check_model(model)
    assert [value.name for value in model.graph.input] == ["x_t", "timestep", "label", "scale"]
    assert [value.name for value in model.graph.output] == ["grad", "log_p"]
    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    types = [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)]
    assert types == [float32, float32, int64, float32, float32, float32]
    assert {node.domain for node in model.graph.node} == {""}
    assert "ConvTranspose" not in {node.op_type for node in model.graph.node}
    assert "t" not in {value.name for value in model.graph.initializer}
    assert next(entry.version for entry in model.opset_import if entry.domain == "") == 21
    convolution_types = {
        value.data_type for value in model.graph.initializer if len(value.dims) == 4 and tuple(value.dims[2:]) == (3, 3)
    }
    assert convolution_types == {onnx.TensorProto.FLOAT16 if "fp16" in name else float32}


def test_constants_that_depend_on_the_input_are_refused():
    class Baked(torch.nn.Module):
        def __init__(self, constant: Tensor) -> None:
            super().__init__()
            self.constant = constant

        def forward(self, x: Tensor) -> Tensor:
            return x + self.constant

    x = torch.ones(7, 2)
    gradient.refuse_activations(torch.export.export(Baked(torch.ones(2)), (x,)), 7)
    for constant in (torch.ones(7, 2), torch.ones(14, 1).reshape(7, 2)):
        with pytest.raises(ExportError, match=r"holds \S*constant \[7, 2\] as a constant, which depends on the input"):
            gradient.refuse_activations(torch.export.export(Baked(constant), (x,)), 7)
    program = torch.export.export(Baked(torch.ones(2)), (x,))
    with FakeTensorMode() as fake:
        program.constants["saved"] = fake.from_tensor(torch.ones(2))
    with pytest.raises(ExportError, match=r"holds saved \[2\]"):
        gradient.refuse_activations(program, 7)


def test_example_batch_divides_no_dimension():
    network = random_network(CLASSIFIER_CONFIG)
    batch = gradient.example_batch(network)
    assert batch > 2
    assert all(size % batch for value in network.state_dict().values() for size in value.shape)
    # 5 classes and 16 + 1 tokens; 3 divides 3x3 kernels and the three parts of qkv.
    assert batch not in (3, 5, 17)


def test_operator_without_rule_is_named(monkeypatch):
    monkeypatch.setattr(gradient, "input_gradient_rules", dict)
    network = random_network(adm_classifier(mult=(1,), attention=(), attention_pool=False))
    with pytest.raises(ExportError, match=r"needs aten\..*convolution_backward.default, .* for which there is no rule"):
        gradient.trace_gradient(network)


def test_half_refuses_a_weight_beyond_its_range():
    network = random_network(CLASSIFIER_CONFIG)
    network.get_parameter("blocks.0.weight").view(-1)[0] = 1e5
    with pytest.raises(
        ExportError, match=r"classifier's blocks.0.weight reaches 1e\+05, beyond fp16's 65504; .*to_onnx"
    ):
        gradient.half_classifier(network)


@pytest.fixture(scope="module")
def confident() -> tuple[Classifier, tuple[GuideCase, ...]]:
    """A classifier that is sure of class 3 to 1e-7, and cases that ask for class 3."""
    network = random_network(adm_classifier(mult=(1,), attention=(), attention_pool=False, num_classes=5))
    pool = network.blocks[-1]
    pool.linear.bias[3] = float(pool.linear.bias[3]) + 16
    return network, (case(network, 4, y=torch.full((4,), 3)),)


def test_gain_saves_the_gradient_of_a_confident_classifier(confident):
    network, cases = confident
    cases = (dataclasses.replace(cases[0], scale=torch.ones(4), grad=case_at_1(network, cases[0])),)
    assert float(cases[0].grad.abs().max()) < 2**-20
    gain, graph = guidance.calibrate(gradient.half_classifier(network), cases)
    assert gain > 1
    assert guidance._worst_row(gradient.GradientGraph(graph, 1.0), cases) > 0.3
    assert guidance._worst_row(gradient.GradientGraph(graph, gain), cases) < LIMITS["fp16"]


def case_at_1(network: Classifier, given: GuideCase) -> Tensor:
    return AutogradGuide(network)(given.x_t, given.timestep, given.label, torch.ones(4))[0]


def test_calibration_refuses_a_gradient_that_overflows_with_every_gain(monkeypatch, confident):
    network, cases = confident
    monkeypatch.setattr(guidance, "trace_gradient", lambda _: None)
    monkeypatch.setattr(guidance, "GradientGraph", lambda *_: None)
    monkeypatch.setattr(guidance, "_worst_row", lambda *_: float("inf"))
    with pytest.raises(ExportError, match="overflows fp16 with every gain; export it in fp32"):
        guidance.calibrate(gradient.half_classifier(network), cases)


def test_manifest_describes_the_classifier(made):
    manifest = Bundle.open(made.bundle.path).manifest
    entry = manifest.classifier
    assert entry is not None
    assert entry.config == CLASSIFIER_CONFIG
    assert entry.checkpoint_sha256 == load_checkpoint(made.classifier, **FACTS).sha256
    assert entry.gain in GAINS
    assert ("num_train_timesteps", 1000) in [assumption[:2] for assumption in entry.assumptions]
    assert f"gain {entry.gain:g}" in entry.files[onnx_name(CLASSIFIER, "fp16")]
    measured = {(m.artefact, m.runner, m.precision) for m in entry.verification}
    assert measured == {
        (f"{artefact} {output}", runner, precision)
        for output in ("grad", "log_p")
        for artefact, runner, precision in (
            (onnx_name(CLASSIFIER), "onnxruntime cpu", "fp32"),
            (onnx_name(CLASSIFIER), "openvino cpu", "fp32"),
            (onnx_name(CLASSIFIER, "fp16"), "onnxruntime cpu", "fp16"),
            (onnx_name(CLASSIFIER, "fp16"), "torch cpu", "fp16"),
            *((weights_name(CLASSIFIER), "native cpu", precision) for precision in native_precisions()),
        )
    }
    assert all(m.passed for m in entry.verification)
    Bundle.open(made.bundle.path).verify()


def test_measurement_sees_a_wrong_gradient_and_a_scale_that_is_ignored():
    network = random_network(adm_classifier(mult=(1,), attention=(), attention_pool=False))
    right, cases = AutogradGuide(network), (case(network, 3),)

    def off_by_a_thousandth(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        grad, log_p = right(*inputs)
        return grad * 1.001, log_p + 0.1

    results = guidance.measure_guide(onnx_name(CLASSIFIER), "a runner", "fp32", off_by_a_thousandth, cases)
    assert [m.passed for m in results] == [False, False]
    assert results[0].relative == pytest.approx(1e-3, rel=1e-2)
    assert all(m.passed for m in guidance.measure_guide(onnx_name(CLASSIFIER), "a runner", "fp32", right, cases))
    with pytest.raises(ExportError, match="on a runner: a scale of 0 gives a gradient other than 0"):
        guidance.measure_guide(
            onnx_name(CLASSIFIER), "a runner", "fp32", lambda x, t, y, _: right(x, t, y, torch.ones(len(x))), cases
        )


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean().clamp(min=1e-30)))


@pytest.mark.parametrize("backend", ["ort", "ov", "native"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_images_equal_those_of_autograd(made, monkeypatch, backend, sampler):
    opened = Sampler.open(made.bundle, "eager", threads=1)
    options = {"steps": 10, "sampler": sampler, "labels": [0, 1, 4]}
    wanted = opened.sample(3, **options, guidance=ClassifierGuidance(AutogradGuide(made.network), 20.0))
    unguided = opened.sample(3, **options | {"labels": None})

    def fail(*_args, **_kwargs):
        raise AssertionError("autograd was used")

    monkeypatch.setattr(torch.autograd, "grad", fail)
    got = opened.sample(3, **options, guidance=ClassifierGuidance(open_guide(made.bundle, backend, "fp32"), 20.0))
    assert psnr(got, wanted) > 60
    assert psnr(unguided, wanted) < 40, "guidance changes the images"


def native_precisions() -> list[str]:
    return sorted({isa.precision for isa in instruction_sets()})


def test_library_of_the_guide(made, monkeypatch, caplog):
    caplog.set_level("INFO", logger="engine.backends")
    for backend, precision in (("auto", None), ("native", "fp32"), ("eager", "fp16")) if native_precisions() else ():
        assert isinstance(open_guide(made.bundle, backend, precision), NativeGuide)
    monkeypatch.setattr("kernels.native.library.reason_against", lambda: "it was not built")
    assert isinstance(open_guide(made.bundle), OpenVINOGuide)
    assert caplog.messages[-1] == "classifier on ov in fp32 (native: it was not built)"
    assert isinstance(open_guide(made.bundle, "eager"), OpenVINOGuide)
    assert isinstance(open_guide(made.bundle, "ov", "bf16"), OpenVINOGuide)
    assert isinstance(open_guide(made.bundle, "ort"), OrtGuide)
    assert caplog.messages[-1] == "classifier on ort in fp32"
    half = open_guide(made.bundle, "ort", "fp16")
    assert caplog.messages[-1] == "classifier on ort in fp16"
    wanted = case(made.network, 4)
    assert 1e-6 < relative(half(*wanted.inputs())[0], wanted.grad) < LIMITS["fp16"]
    monkeypatch.setattr(ov, "_missing", lambda: "openvino is not installed")
    monkeypatch.setattr(ort, "_missing", lambda: "onnxruntime is not installed")
    reasons = (
        "native: it was not built; ov: openvino is not installed; ort: onnxruntime is not installed; "
        "trt: .* holds no TensorRT plan of its classifier"
    )
    with pytest.raises(BackendError, match=f"can run the bundle's classifier: {reasons}"):
        open_guide(made.bundle)


def test_sampler_without_a_classifier(tmp_path):
    bundle = write_bundle(tmp_path / "plain.engine", UNET_CONFIG)
    assert Bundle.open(bundle).manifest.classifier is None
    sampler = Sampler.open(bundle, "eager")
    with pytest.raises(
        BundleError, match="holds no classifier; pass its file with --classifier, or .*--classifier FILE"
    ):
        sampler.classifier_guidance()
    with pytest.raises(RequestError, match="made without a bundle; use Sampler.open"):
        Sampler(sampler.backend).classifier_guidance()


def test_sample_command_takes_the_bundles_classifier(made, tmp_path):
    def run(*arguments: object) -> list[bytes]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        options = ("-n", 2, "--steps", 4, "--class", 2, "--backend", "eager", "--out", out)
        outcome = call_main("sample", made.bundle.path, *options, *arguments)
        assert outcome.status == 0, outcome.err
        return [path.read_bytes() for path in sorted(out.glob("*.png"))]

    file = ("--classifier", made.classifier, "--classifier-fact", "num_head_channels=32")
    guided = run("--classifier-scale", 30)
    assert len(guided) == 2
    assert guided == run("--classifier-scale", 30, *file)
    assert guided != run("--classifier-scale", 0)
    assert run(*file) == run("--classifier-scale", 1)


@pytest.mark.parametrize(("command", "verb"), [(to_onnx, "export_bundle"), (to_trt, "export_trt_bundle")])
def test_export_commands_read_the_classifier(made, monkeypatch, command, verb):
    seen = {}

    def keep(checkpoint, out, **options):
        seen.update(options)
        return made.bundle

    monkeypatch.setattr(command, verb, keep)
    flags = ["--family", "openai-guided", "--image-size", "8", "--num-head-channels", "32"]
    classifier = ["--classifier", str(made.classifier), "--classifier-fact", "num_head_channels=32"]
    assert command.main([str(made.unet), *flags, *classifier]) == 0
    assert seen["classifier"].config == CLASSIFIER_CONFIG
    assert command.main([str(made.unet), *flags]) == 0
    assert seen["classifier"] is None


def test_export_puts_the_classifier_into_the_bundle(made, tmp_path, monkeypatch):
    entry = dataclasses.replace(made.bundle.manifest.classifier, files={onnx_name(CLASSIFIER): "fp32 throughout"})
    seen = []

    def write(folder: Path, given: Checkpoint, subject: Subject, fp16: bool) -> ClassifierEntry:
        seen.append((given, subject.checkpoint, fp16))
        (folder / onnx_name(CLASSIFIER)).write_bytes(b"a graph")
        return entry

    monkeypatch.setattr(to_onnx, "export_classifier", write)
    monkeypatch.setattr(to_onnx, "export_onnx", lambda _, path: path.write_bytes(b"another graph"))
    monkeypatch.setattr(to_onnx, "verify", lambda *_: ())
    checkpoint, classifier = (load_checkpoint(path, **FACTS) for path in (made.unet, made.classifier))
    bundle = export_bundle(checkpoint, tmp_path / "net.engine", classifier=classifier)
    assert seen == [(classifier, checkpoint, False)]
    assert bundle.file(onnx_name(CLASSIFIER)).read_bytes() == b"a graph"
    assert bundle.manifest.classifier == entry


def test_export_refuses_a_classifier_that_does_not_fit(made, tmp_path, capsys):
    checkpoint, out = load_checkpoint(made.unet, **FACTS), tmp_path / "net.engine"
    with pytest.raises(CheckpointError, match="--classifier is a U-Net's file"):
        export_bundle(checkpoint, out, classifier=checkpoint)
    other = write_checkpoint(tmp_path / "other.pt", adm_classifier(channels=3, attention_pool=False))
    with pytest.raises(CheckpointError, match=r"reads 3 channels of \(8, 8\), the network makes 1 of \(8, 8\)"):
        export_bundle(checkpoint, out, classifier=load_checkpoint(other, **FACTS))
    assert not out.exists()
    flags = ["--family", "openai-guided", "--image-size", "8", "--classifier", str(other)]
    assert to_onnx.main([str(made.unet), *flags, "--classifier-fact", "num_head_channels"]) == 2
    assert "--classifier-fact takes NAME=VALUE, got 'num_head_channels'" in capsys.readouterr().err


@pytest.mark.trt
def test_tensorrt_builds_the_gradient(made, tmp_path, caplog):
    """A plan of the float16 graph, whose softmaxes feed the way back too and are not counted as attention to fuse.

    Turing cannot: it is left out.
    """
    pytest.importorskip("tensorrt_rtx", reason="plans without a GPU need TensorRT-RTX: pip install tensorrt-rtx-cu13")
    onnx = shutil.copy(made.bundle.file(onnx_name(CLASSIFIER, "fp16")), tmp_path)
    (builder,) = to_trt._without_sm75(find_builders(("sm75", "sm86")), onnx_name(CLASSIFIER, "fp16"))
    plan = builder.build(Path(onnx), (1, 2, 4), "fp16")
    assert plan.targets == ("sm86",)
    assert has_wide_products(Path(onnx))
    assert "leaves out sm75" in caplog.text
    assert to_trt._without_sm75(find_builders(("sm75",)), onnx_name(CLASSIFIER, "fp16")) == ()
    assert plan.file == "classifier.rtx.plan"
    assert (tmp_path / plan.file).stat().st_size > 100_000
    assert plan.fusion is not None
    assert plan.fusion.launches > 20
    assert (plan.fusion.attention_expected, plan.fusion.unfused) == (0, ())
