"""Built plans by what they were built from, in the user's cache folder.

A plan's key is the sha256 over the ONNX file with its external weights, the whole build configuration, and the
library with its version. Two builds of one key give different bytes, so plans are never compared: the key is.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from engine.bundle.file_names import onnx_data_name
from engine.bundle.manifest import FusionReport
from engine.errors import ConfigError, OutputError
from engine.files import atomic_path, file_sha256, make_folder, user_cache_folder
from engine.json_form import decode, encode

logger = logging.getLogger(__name__)


def plan_cache_folder() -> Path:
    """$XDG_CACHE_HOME/unet-rt/plans, by default in ~/.cache."""
    return user_cache_folder("plans")


def plan_key(onnx: Path, configuration: Mapping[str, object]) -> str:
    """sha256 (hex) over the ONNX file, `onnx`.data where there is one, and the configuration (JSON values)."""
    data = onnx.with_name(onnx_data_name(onnx.name))
    files = [file_sha256(path) for path in (onnx, data) if path.exists()]
    return hashlib.sha256(json.dumps([files, configuration], sort_keys=True).encode()).hexdigest()


def load_plan(folder: Path, key: str) -> tuple[bytes, FusionReport | None] | None:
    """The plan of a key and its fusion report; None where there is none or its bytes are not those written."""
    try:
        entry = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        plan = (folder / f"{key}.plan").read_bytes()
        if hashlib.sha256(plan).hexdigest() != entry["sha256"]:
            return None
        return plan, None if entry["fusion"] is None else decode(entry["fusion"], FusionReport)
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None


def store_plan(folder: Path, key: str, plan: bytes, fusion: FusionReport | None) -> None:
    """Keep a plan; a folder that cannot be written is a warning, because the plan itself is made."""
    entry = {
        "sha256": hashlib.sha256(plan).hexdigest(),
        "fusion": None if fusion is None else encode(fusion),
    }
    try:
        make_folder(folder)
        with atomic_path(folder / f"{key}.plan") as path:
            path.write_bytes(plan)
        with atomic_path(folder / f"{key}.json") as path:
            path.write_text(json.dumps(entry), encoding="utf-8")
    except (OSError, OutputError) as error:
        logger.warning("the plan is not kept for the next build: %s", error)
