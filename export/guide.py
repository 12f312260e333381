"""A classifier's gradient graph in a bundle: written, its float16 gain calibrated, measured against autograd.

The states x_t that judge the U-Net (export.subject) judge the classifier too, with labels from first to last. Every
runtime gets them one by one and in batches of several sizes, and autograd on the fp32 classifier says what is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.backends.native.native_backend import find_isa
from engine.backends.native.native_guide import NativeGuide
from engine.backends.ort.ort_backend import OrtGuide
from engine.backends.ov.ov_backend import OpenVINOGuide
from engine.bundle.file_names import CLASSIFIER, onnx_name, weights_name
from engine.bundle.manifest import ClassifierEntry, Measurement
from engine.checkpoints.types import Checkpoint
from engine.errors import BackendError, CheckpointError, ExportError, MissingPackageError
from engine.networks.classifier import AutogradGuide, Classifier
from engine.networks.inputs import Inputs, join_inputs
from export.onnx.gradient import GradientGraph, export_gradient, half_classifier, trace_gradient
from export.precision import GpuHalf
from export.subject import Subject
from export.verify import Difference, check
from export.weights import save_weights

BATCHES = (1, 2, 5, 8)
"""Batch sizes that the one dynamic graph is measured with."""

GAINS = tuple(2.0**power for power in range(0, 25, 2))
"""Factors on the cotangent that calibration tries: from none to what lifts 2^-24 to 1."""

HEADROOM = 16.0
"""How far a gain stays below the largest without overflow: an overflow ruins an image, a lost bit does not."""

LIMITS = {
    # Sums in another order, and two passes through the network rather than one: 5e-7 to 6e-6 measured. A missing or
    # wrong operator gives 1e-2 and more, a Conv and a ConvTranspose sharing a constant on OpenVINO 1.2.
    "fp32": 5e-5,
    # Logits rounded to 11 bits move 1 - p by as much as they are off, and every operator rounds: 7e-4 to 7e-3
    # measured. A gradient lost below float16's range gives 0.5 and more, an overflow infinity.
    "fp16": 5e-2,
    # Eight bits at every map of both passes: 1e-2 to 4e-2 measured. Its range is fp32's, so nothing is lost below it.
    "bf16": 2e-1,
}
"""Largest rms error accepted, relative to the rms of autograd's gradient, for each precision."""

LOG_P_LIMITS = {
    # One forward pass: 4e-8 to 3e-7 measured.
    "fp32": 2e-5,
    # Eleven bits of logits of order 10: 1e-6 to 3e-4 measured on one classifier, more where logits are larger.
    "fp16": 5e-2,
    # Eight bits of what the logits, themselves fp32, are made of: 1e-3 to 2e-2 measured.
    "bf16": 2e-1,
}
"""The same for log_p, relative to its rms or to one nat where that is larger."""

FP16_CLASSIFIER = "fp16 weights and activations; fp32: norms, softmax, logits, cotangent, x_t, grad; gain {gain:g}"

Guide = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x_t, timestep, label, scale) -> (grad, log_p), as engine.diffusion.guidance.Guide is called."""


@dataclass(frozen=True, slots=True, eq=False)
class GuideCase:
    """One call and autograd's answer: x_t [B, C, H, W], timestep, scale [B] float32, label [B] int64; grad, log_p."""

    x_t: Tensor
    timestep: Tensor
    label: Tensor
    scale: Tensor
    grad: Tensor
    log_p: Tensor

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a guide is called with."""
        return self.x_t, self.timestep, self.label, self.scale


def check_fit(classifier: Checkpoint, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless `classifier` is a classifier of the images that `checkpoint` makes."""
    if not classifier.is_classifier:
        raise CheckpointError("--classifier is a U-Net's file; pass the noise-conditioned classifier trained beside it")
    reads = (classifier.config.in_channels, classifier.config.image_size)
    makes = (checkpoint.config.in_channels, checkpoint.config.image_size)
    if reads != makes:
        raise CheckpointError(
            f"the classifier reads {reads[0]} channels of {reads[1]}, the network makes {makes[0]} of {makes[1]}; use "
            "the classifier trained for it, or give its size with --classifier-fact image_size=HxW"
        )


def export_classifier(folder: Path, classifier: Checkpoint, subject: Subject, fp16: bool) -> ClassifierEntry:
    """Write classifier.onnx (and classifier.fp16.onnx) and its weights into folder, and measure what can run here.

    Returns what the manifest says of them.
    subject: the U-Net that it guides, whose trajectories give x_t. fp16: whether classifier.fp16.onnx is made. Raises
    CheckpointError for a classifier that does not fit it, ExportError for a graph that cannot be built or differs from
    autograd by too much, OSError.
    """
    check_fit(classifier, subject.checkpoint)
    network = classifier.classifier()
    cases = guide_cases(network, subject.cases)
    files = dict.fromkeys((onnx_name(CLASSIFIER), weights_name(CLASSIFIER)), "fp32 throughout")
    export_gradient(network, folder / onnx_name(CLASSIFIER))
    save_weights(classifier.weights, folder / weights_name(CLASSIFIER))
    gain: float | None = None
    rounded: GradientGraph | None = None
    if fp16:
        half = half_classifier(network)
        gain, graph = calibrate(half, cases)
        export_gradient(half, folder / onnx_name(CLASSIFIER, "fp16"), gain, graph)
        files[onnx_name(CLASSIFIER, "fp16")] = FP16_CLASSIFIER.format(gain=gain)
        rounded = GradientGraph(graph, gain)
    measurements = tuple(
        measurement
        for artefact, runner, kind, guide in _guides(folder, network, rounded)
        for measurement in measure_guide(artefact, runner, kind, guide, cases)
    )
    check(measurements)
    assumptions = tuple((a.name, a.value, a.reason) for a in classifier.assumptions)
    return ClassifierEntry(
        network.config,
        files,
        verification=measurements,
        checkpoint_sha256=classifier.sha256,
        assumptions=assumptions,
        gain=gain,
    )


def guide_cases(classifier: Classifier, cases: Sequence[Inputs]) -> tuple[GuideCase, ...]:
    """States of real trajectories in batches of every size of BATCHES, each with a label and a scale of its own.

    cases: of the U-Net, as export.subject.real_cases gives them.
    """
    rows = join_inputs([case for case in cases if not case.is_single])
    reference = AutogradGuide(classifier)
    classes, made, start = classifier.config.num_classes, [], 0
    for batch in BATCHES:
        index = [(start + i) % len(rows.x_t) for i in range(batch)]
        start += batch
        x_t, timestep = rows.x_t[index], rows.timestep[index]
        # By turns the class that the classifier sees, whose gradient is small, and any class; scales 1, 2, 4.
        with torch.no_grad():
            seen = classifier(x_t, timestep).argmax(dim=1)
        label = torch.tensor([int(seen[k]) if i % 2 else (i * 7 + 3) % classes for k, i in enumerate(index)])
        scale = torch.tensor([2.0 ** (i % 3) for i in index])
        inputs = (x_t, timestep, label, scale)
        made.append(GuideCase(*inputs, *reference(*inputs)))
    return tuple(made)


def calibrate(half: Classifier, cases: Sequence[GuideCase]) -> tuple[float, torch.fx.GraphModule]:
    """The gain for this float16 classifier and its traced graph.

    Every gain of GAINS is run with a GPU's rounding; a row's error is relative to its own gradient, rows below a
    millionth of the largest excepted, and a gain is as good as its worst row. Of the gains HEADROOM below an overflow
    the smallest within a quarter of the best is taken. Raises ExportError if every gain overflows.
    """
    graph = trace_gradient(half)
    errors = {gain: _worst_row(GradientGraph(graph, gain), cases) for gain in GAINS}
    finite = [gain for gain in GAINS if errors[gain] < float("inf")]
    if not finite:
        raise ExportError(
            "the classifier's gradient overflows fp16 with every gain; export it in fp32 with: python -m "
            "export.to_onnx CHECKPOINT --classifier FILE"
        )
    safe = [gain for gain in finite if gain * HEADROOM <= finite[-1]] or finite[:1]
    best = min(errors[gain] for gain in safe)
    return next(gain for gain in safe if errors[gain] <= 1.25 * best), graph


def _worst_row(graph: GradientGraph, cases: Sequence[GuideCase]) -> float:
    """Largest relative rms error of a row; infinite where one is not finite."""
    floor = max(1e-6 * max(float(_row_rms(case.grad, case.scale).max()) for case in cases), 1e-30)
    worst = 0.0
    for case in cases:
        with GpuHalf(), torch.no_grad():
            grad, _ = graph(*case.inputs())
        if not bool(torch.isfinite(grad).all()):
            return float("inf")
        relative = _row_rms(grad - case.grad, case.scale) / _row_rms(case.grad, case.scale).clamp(min=floor)
        worst = max(worst, float(relative.max()))
    return worst


def _row_rms(grad: Tensor, scale: Tensor) -> Tensor:
    """[B, C, H, W] -> [B], of what the gradient would be at a scale of 1."""
    return grad.square().mean(dim=(1, 2, 3)).sqrt() / scale


def _guides(folder: Path, network: Classifier, half: GradientGraph | None) -> Iterator[tuple[str, str, str, Guide]]:
    """(artefact, runner, precision, guide) of what this machine can run; asking for the next releases one."""
    for precision in ("fp32", "bf16"):
        try:
            native = NativeGuide.from_weights(network.config, network.state_dict(), isa=find_isa(precision))
        except BackendError:
            continue
        yield weights_name(CLASSIFIER), "native cpu", precision, native
        native.close()
    kinds: list[tuple[str, str, str, type[OrtGuide] | type[OpenVINOGuide]]] = [
        (onnx_name(CLASSIFIER), "onnxruntime cpu", "fp32", OrtGuide),
        (onnx_name(CLASSIFIER), "openvino cpu", "fp32", OpenVINOGuide),
        (onnx_name(CLASSIFIER, "fp16"), "onnxruntime cpu", "fp16", OrtGuide),
    ]
    for name, runner, precision, kind in kinds:
        if not (folder / name).exists():
            continue
        try:
            guide = kind(network.config, folder / name, None)
        except MissingPackageError:
            continue
        yield name, runner, precision, guide
        guide.close()
    if half is not None:
        yield onnx_name(CLASSIFIER, "fp16"), "torch cpu", "fp16", _rounding_as_a_gpu(half)


def _rounding_as_a_gpu(half: GradientGraph) -> Guide:
    def run(x_t: Tensor, timestep: Tensor, label: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        with GpuHalf(), torch.no_grad():
            return half(x_t, timestep, label, scale)

    return run


def measure_guide(
    artefact: str, runner: str, precision: str, guide: Guide, cases: Sequence[GuideCase]
) -> tuple[Measurement, Measurement]:
    """Errors of grad and of log_p over all cases; raises ExportError unless a scale of 0 gives a gradient of 0."""
    grads, log_ps = Difference(), Difference()
    for case in cases:
        grad, log_p = guide(*case.inputs())
        grads.add(grad, case.grad)
        log_ps.add(log_p, case.log_p)
    off, _ = guide(cases[-1].x_t, cases[-1].timestep, cases[-1].label, torch.zeros_like(cases[-1].scale))
    if bool((off != 0).any()):
        raise ExportError(f"{artefact} on {runner}: a scale of 0 gives a gradient other than 0; do not use it")

    def result(output: str, total: Difference, size: float, limit: float) -> Measurement:
        return Measurement(f"{artefact} {output}", runner, precision, total.max_abs, total.rms, size, limit)

    return (
        result("grad", grads, max(grads.wanted_rms, 1e-30), LIMITS[precision]),
        result("log_p", log_ps, max(log_ps.wanted_rms, 1.0), LOG_P_LIMITS[precision]),
    )
