"""The measurements that a data-centre TensorRT makes of its kernels, kept from one build to the next."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from engine.errors import OutputError
from engine.files import atomic_path, make_folder

logger = logging.getLogger(__name__)


def use_timings(config: Any, file: Path) -> None:
    """Give a builder's config the measurements of a file, or none where it is missing or another library's."""
    try:
        blob = file.read_bytes()
    except OSError:
        blob = b""
    for content in dict.fromkeys((blob, b"")):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return
        logger.info("the timings in %s are not used: they are another library's or GPU's", file)


def keep_timings(config: Any, file: Path) -> None:
    """Write what a build measured; a folder that cannot be written is a warning, because the plan itself is made."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    try:
        make_folder(file.parent)
        with atomic_path(file) as path:
            path.write_bytes(bytes(cache.serialize()))
    except (OSError, OutputError) as error:
        logger.warning("the timings are not kept for the next build: %s", error)
