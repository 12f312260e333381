"""UNet-RT: from a bundle or a trained DDPM-family checkpoint to images.

from engine import Sampler
images = Sampler.open("ckpt.engine").sample(64, steps=50, seed=0)     # float32 [64, C, H, W] in [-1, 1]
"""

from engine._kernels_check import require_own_kernels

require_own_kernels()

from engine.backends.registry import open_backend  # noqa: E402
from engine.checkpoints.load import load_checkpoint  # noqa: E402
from engine.checkpoints.types import Checkpoint  # noqa: E402
from engine.diffusion.guidance import ClassifierFreeGuidance, ClassifierGuidance  # noqa: E402
from engine.diffusion.noise import RecordedNoise  # noqa: E402
from engine.diffusion.prediction import Variance  # noqa: E402
from engine.diffusion.schedule import NoiseSchedule  # noqa: E402
from engine.diffusion.solvers import ddim_table, ddpm_table, dpmpp_table, plms_table  # noqa: E402
from engine.errors import (  # noqa: E402
    BackendError,
    BundleError,
    CheckpointError,
    ConfigError,
    ExportError,
    MissingPackageError,
    OutputError,
    RequestError,
    UNetRTError,
    UnknownFamilyError,
)
from engine.networks.config import UNetConfig  # noqa: E402
from engine.sampling.options import SamplingOptions  # noqa: E402
from engine.sampling.sampler import Sampler  # noqa: E402

__version__ = "0.1.0"
"""The version of the package, which pyproject.toml reads here."""

__all__ = [
    "BackendError",
    "BundleError",
    "Checkpoint",
    "CheckpointError",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "ConfigError",
    "ExportError",
    "MissingPackageError",
    "NoiseSchedule",
    "OutputError",
    "RecordedNoise",
    "RequestError",
    "Sampler",
    "SamplingOptions",
    "UNetConfig",
    "UNetRTError",
    "UnknownFamilyError",
    "Variance",
    "__version__",
    "ddim_table",
    "ddpm_table",
    "dpmpp_table",
    "load_checkpoint",
    "open_backend",
    "plms_table",
]
