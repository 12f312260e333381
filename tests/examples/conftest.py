"""A bundle of the shipped digits model, made in a second: weights and manifest, which native and eager run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from engine import load_checkpoint
from engine.bundle.bundle_folder import Bundle
from engine.bundle.file_names import UNET, weights_name
from engine.bundle.from_checkpoint import checkpoint_manifest
from export.weights import save_weights

ROOT = Path(__file__).resolve().parents[2]
FACTS = {
    "family": "openai-guided",
    "image_size": (32, 32),
    "num_head_channels": 32,
    "noise_schedule": "cosine",
    "prediction": "x0",
    "null_class": 10,
}


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    checkpoint = load_checkpoint(ROOT / "assets" / "digits.pt", **FACTS)
    folder = tmp_path_factory.mktemp("bundle") / "digits.engine"
    folder.mkdir()
    save_weights(checkpoint.weights, folder / weights_name(UNET))
    Bundle.write(folder, checkpoint_manifest(checkpoint))
    return str(folder)


@pytest.fixture(scope="session")
def example():
    """The module of an example by its path below examples/, without .py."""

    def load(name: str) -> ModuleType:
        path = ROOT / "examples" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
