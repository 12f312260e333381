"""Everything this package raises on purpose.

UNetRTError
 +- ConfigError          a network description that contradicts itself
 +- CheckpointError      a file that cannot be read as a checkpoint
 |   +- UnknownFamilyError   readable, but no translator knows its layout
 +- BundleError          a bundle that is damaged, foreign or from another version
 +- BackendError         a backend that is missing here or does not fit the bundle
 |   +- MissingPackageError  names the pip line that brings it
 +- ExportError          an artefact that could not be built, or differs from the checkpoint by too much
 +- RequestError         a sampling request with impossible values
 +- OutputError          a file or folder that cannot be written

Messages say what, got, expected and remedy. Command lines print them without a traceback and exit with status 2.
"""


class UNetRTError(Exception):
    """Base of every deliberate error."""


class ConfigError(UNetRTError):
    """A network description that contradicts itself."""


class CheckpointError(UNetRTError):
    """A file that cannot be read as a checkpoint."""


class UnknownFamilyError(CheckpointError):
    """A readable checkpoint whose layout no translator knows."""


class BundleError(UNetRTError):
    """A bundle that is damaged, foreign or made by another version."""


class BackendError(UNetRTError):
    """A backend that is missing here or does not fit the bundle."""


class MissingPackageError(BackendError):
    """An optional package is not installed; the message names the pip line."""

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(f"{purpose} needs the package {package}; install it with: pip install 'unet-rt[{extra}]'")


class ExportError(UNetRTError):
    """An artefact that could not be built or that differs from the checkpoint by too much."""


class RequestError(UNetRTError):
    """A sampling request with impossible values."""


class OutputError(UNetRTError):
    """A file or folder that cannot be written."""
