"""scikit-build-core, and for editable installs the CPU engine's library where a checkout keeps it, build/native.

scikit-build-core itself would build among the sources, because editable.mode is "inplace".
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from scikit_build_core.build import build_editable as _build_editable
from scikit_build_core.build import (
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

Settings = dict[str, list[str] | str] | None

# CMake, and what it calls, where the system has none.
get_requires_for_build_editable = get_requires_for_build_wheel


def _build_library(folder: str = "build/native") -> None:
    """The library in `folder`; without a compiler a note instead, because the package works without the library."""
    generator = [] if shutil.which("make") else ["-G", "Ninja"]
    jobs = str(os.cpu_count() or 1)
    try:
        subprocess.run(["cmake", "-S", ".", "-B", folder, *generator], check=True)
        subprocess.run(["cmake", "--build", folder, "--parallel", jobs, "--target", "unetrt_native"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"the CPU engine is left out: {error}", file=sys.stderr)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """See PEP 660."""
    _build_library()
    return _build_editable(wheel_directory, config_settings, metadata_directory)
