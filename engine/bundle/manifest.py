"""What a bundle says about itself: its networks by name, and what belongs to all of them.

A bundle is a folder made from one checkpoint, with manifest.json (engine.json_form writes it) and the files that
engine.bundle.file_names lists. Nothing in it is pickled or executed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from engine.bundle.file_names import CLASSIFIER, UNET
from engine.diffusion.prediction import Diffusion
from engine.networks.config import ClassifierConfig, UNetConfig

FORMAT_VERSION = 2

Config = TypeVar("Config", bound=UNetConfig | ClassifierConfig, covariant=True)

Assumed = tuple[str, Any, str]
"""Name, value and reason of a default that was taken for a fact which neither file nor user gave."""


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
        """rms / reference_rms."""
        return self.rms / self.reference_rms

    @property
    def passed(self) -> bool:
        """Whether the artefact may be used."""
        return self.relative <= self.limit


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


@dataclass(frozen=True, slots=True)
class NetworkEntry(Generic[Config]):
    """One network of a bundle.

    files: its files, and what each of them computes in, such as "fp32 throughout". fp32_parts: (module, reason) of what
    the network needs in fp32 where the rest is fp16 (engine.networks.half). verification: how far the files are from
    the fp32 network.
    """

    config: Config
    files: dict[str, str] = field(default_factory=dict)
    fp32_parts: tuple[tuple[str, str], ...] = ()
    plans: tuple[PlanEntry, ...] = ()
    verification: tuple[Measurement, ...] = ()


@dataclass(frozen=True, slots=True)
class ClassifierEntry(NetworkEntry[ClassifierConfig]):
    """The classifier whose gradient the bundle holds.

    checkpoint_sha256, assumptions: of its own file. gain: the factor on the cotangent in classifier.fp16.onnx, a power
    of two chosen by calibration; None without that file.
    """

    checkpoint_sha256: str = field(kw_only=True)
    assumptions: tuple[Assumed, ...] = ()
    gain: float | None = None


@dataclass(frozen=True, slots=True)
class Networks:
    """The networks of a bundle; None for one that it does not have."""

    unet: NetworkEntry[UNetConfig]
    classifier: ClassifierEntry | None = None

    def named(self) -> dict[str, NetworkEntry[UNetConfig | ClassifierConfig]]:
        """Those that there are, by name; their files are named so too."""
        entries = {UNET: self.unet, CLASSIFIER: self.classifier}
        return {name: entry for name, entry in entries.items() if entry is not None}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """sha256 (hex) and size of one file of the bundle."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """Everything a bundle says about itself; see the fields' types.

    checkpoint_sha256, assumptions: of the U-Net's file. files: every file of the folder but the manifest. versions:
    library -> version at build time.
    """

    family: str
    networks: Networks
    diffusion: Diffusion
    checkpoint_sha256: str
    assumptions: tuple[Assumed, ...] = ()
    files: dict[str, FileEntry] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def unet(self) -> NetworkEntry[UNetConfig]:
        """The network that is sampled from."""
        return self.networks.unet

    @property
    def classifier(self) -> ClassifierEntry | None:
        """The classifier that guides it, if the bundle has one."""
        return self.networks.classifier
