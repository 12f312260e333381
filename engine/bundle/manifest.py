"""The bundle: a folder with a manifest and the artefacts built from one checkpoint.

    manifest.json        what the network is, every assumption, hashes, versions, profiles, measured errors
    unet.safetensors     fp32 weights under our names (eager backend)
    unet.int8.json       ranges for the CPU engine's 8-bit convolutions (engine.backends.native.byte_ranges), where
    asked for unet.onnx            fp32, dynamic batch;  unet.fp16.onnx (or bf16, int8) and *.plan where they were built
    classifier.onnx      a classifier's input gradient, where one was given;  classifier.fp16.onnx beside it, and
                         classifier.safetensors, its weights under our names (native backend)

Nothing in it is pickled or executed. Opening never writes; it checks the manifest's own hash and, when a file is
asked for, that file's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from engine.diffusion.prediction import Diffusion
from engine.networks.config import ClassifierConfig, UNetConfig

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
WEIGHTS_NAME = "unet.safetensors"
ONNX_NAME = "unet.onnx"
FP16_ONNX_NAME = "unet.fp16.onnx"
INT8_NAME = "unet.int8.json"
CLASSIFIER_NAME = "classifier.onnx"
CLASSIFIER_FP16_NAME = "classifier.fp16.onnx"
CLASSIFIER_WEIGHTS_NAME = "classifier.safetensors"
_REBUILD = "build it again with: python -m export.to_trt CHECKPOINT"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One artefact beside the fp32 U-Net on x_t of real trajectories.

    runner: what executed it, e.g. "onnxruntime cpu". max_abs, rms: of the difference, in units of the network's
    output, whose own rms is reference_rms. limit: the largest rms / reference_rms accepted. worst_layer: the block
    with the largest relative rms error, where intermediate results could be compared.
    """

    artefact: str
    runner: str
    precision: str
    max_abs: float
    rms: float
    reference_rms: float
    limit: float
    worst_layer: str | None = None
    worst_layer_error: float | None = None

    @property
    def relative(self) -> float:
        return self.rms / self.reference_rms

    @property
    def passed(self) -> bool:
        return self.relative <= self.limit


@dataclass(frozen=True, slots=True)
class FileEntry:
    """sha256 (hex) and size of one file of the bundle."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class FusionReport:
    """What a plan's build log says of its kernels.

    launches: kernels. norm_silu, attention: kernels that are a whole group norm with SiLU, or a whole attention; the
    counts expected are the ONNX graph's, and unfused names its nodes that are in no such kernel. kernel_types:
    kernels by the type they write, "Half" say. fp32_activations: fp32 images between two kernels. traffic_bytes:
    activations read and written by one run, None where the batch is not fixed. activation_bytes, weight_bytes: memory
    for the largest batch. int8_convolutions: kernels that read int8.
    """

    launches: int
    norm_silu: int
    norm_silu_expected: int
    attention: int
    attention_expected: int
    unfused: tuple[str, ...]
    kernel_types: dict[str, int]
    fp32_activations: tuple[str, ...]
    traffic_bytes: int | None
    activation_bytes: int
    weight_bytes: int
    int8_convolutions: int = 0

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FusionReport:
        lists = {name: tuple(data[name]) for name in ("unfused", "fp32_activations")}
        return cls(**data | lists)


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """A TensorRT plan: library and version that built it, targets such as "sm89", batch profile (min, opt, max).

    A static plan's three batches are equal. A target "sm80+" stands for every GPU from compute capability 8.0 on.
    fusion: None where the library's log does not tell. weights_file: the ONNX file of the bundle that gives a plan
    without weights its weights when it is opened; None for a plan that has them.
    """

    file: str
    library: str
    library_version: str
    targets: tuple[str, ...]
    batch_profile: tuple[int, int, int]
    precision: str
    fusion: FusionReport | None = None
    weights_file: str | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PlanEntry:
        fusion = data.get("fusion")
        changes = {
            "targets": tuple(data["targets"]),
            "batch_profile": tuple(data["batch_profile"]),
            "fusion": None if fusion is None else FusionReport.from_dict(fusion),
        }
        return cls(**data | changes)


@dataclass(frozen=True, slots=True, eq=False)
class ClassifierEntry:
    """The classifier whose gradient the bundle holds.

    gain: the factor on the cotangent in classifier.fp16.onnx, a power of two chosen by calibration; None without that
    file. assumptions: as in Manifest.
    """

    config: ClassifierConfig
    checkpoint_sha256: str
    gain: float | None = None
    assumptions: tuple[tuple[str, Any, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "checkpoint_sha256": self.checkpoint_sha256,
            "gain": self.gain,
            "assumptions": [list(a) for a in self.assumptions],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ClassifierEntry:
        return cls(
            config=ClassifierConfig.from_dict(data["config"]),
            checkpoint_sha256=data["checkpoint_sha256"],
            gain=data["gain"],
            assumptions=tuple((a[0], a[1], a[2]) for a in data["assumptions"]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """Everything a bundle says about itself; see the fields' types.

    assumptions: (name, value, reason) of every default taken. precision: artefact -> what it computes in.
    fp32_parts: (module, reason) of what the network needs in fp32 where the rest is fp16 (engine.networks.half).
    versions: library -> version at build time. classifier: None in a bundle without one.
    """

    family: str
    config: UNetConfig
    diffusion: Diffusion
    checkpoint_sha256: str
    assumptions: tuple[tuple[str, Any, str], ...] = ()
    files: dict[str, FileEntry] = field(default_factory=dict)
    plans: tuple[PlanEntry, ...] = ()
    precision: dict[str, str] = field(default_factory=dict)
    fp32_parts: tuple[tuple[str, str], ...] = ()
    verification: tuple[Measurement, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    classifier: ClassifierEntry | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without its own hash."""
        data = {
            "format_version": FORMAT_VERSION,
            "family": self.family,
            "config": self.config.to_dict(),
            "diffusion": self.diffusion.to_dict(),
            "checkpoint_sha256": self.checkpoint_sha256,
            "assumptions": [list(a) for a in self.assumptions],
            "files": {name: dataclasses.asdict(entry) for name, entry in sorted(self.files.items())},
            "plans": [dataclasses.asdict(plan) for plan in self.plans],
            "precision": self.precision,
            "fp32_parts": [list(part) for part in self.fp32_parts],
            "verification": [dataclasses.asdict(m) for m in self.verification],
            "versions": self.versions,
        }
        return data if self.classifier is None else data | {"classifier": self.classifier.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Manifest:
        return cls(
            family=data["family"],
            config=UNetConfig.from_dict(data["config"]),
            diffusion=Diffusion.from_dict(data["diffusion"]),
            checkpoint_sha256=data["checkpoint_sha256"],
            assumptions=tuple((a[0], a[1], a[2]) for a in data["assumptions"]),
            files={name: FileEntry(**entry) for name, entry in data["files"].items()},
            plans=tuple(PlanEntry.from_dict(plan) for plan in data["plans"]),
            precision=dict(data["precision"]),
            fp32_parts=tuple((name, reason) for name, reason in data.get("fp32_parts", ())),
            verification=tuple(Measurement(**m) for m in data["verification"]),
            versions=dict(data["versions"]),
            classifier=ClassifierEntry.from_dict(data["classifier"]) if "classifier" in data else None,
        )
