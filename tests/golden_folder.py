"""Where the reference data of the original implementations lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GOLDEN_VARIABLE = "UNET_RT_GOLDEN"


def golden_root(config: pytest.Config) -> Path | None:
    """The folder of golden cases; None where none is given.

    A folder that is given, by option or by environment, must exist and hold cases: UsageError otherwise.
    """
    option = config.getoption("--golden")
    source = GOLDEN_VARIABLE if option is None else "--golden"
    given = os.environ.get(GOLDEN_VARIABLE) if option is None else option
    if not given:
        if option is not None:
            raise pytest.UsageError("--golden is empty; give the folder of golden cases")
        return None
    root = Path(given)
    if not root.is_dir():
        raise pytest.UsageError(f"{source}: {root} is not a folder; give the folder of golden cases")
    if not any(root.glob("*/case.json")):
        raise pytest.UsageError(f"{source}: {root} holds no golden case (no */case.json)")
    return root.resolve()
