"""What a backend asks of a machine and a bundle before it opens anything."""

from __future__ import annotations

import importlib.util

from engine.bundle.bundle_folder import Bundle
from engine.errors import BundleError
from engine.networks.config import ClassifierConfig


def missing_package(module: str, extra: str) -> str | None:
    """That a package is not installed, with the pip line of the extra that brings it; None where it is."""
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed (pip install 'unet-rt[{extra}]')"
    return None


def missing_file(bundle: Bundle, name: str) -> str | None:
    """That a bundle does not hold a file, or None where it does."""
    return None if bundle.has(name) else f"the bundle holds no {name}"


def classifier_config(bundle: Bundle) -> ClassifierConfig:
    """Of the classifier in the bundle; raises BundleError where there is none."""
    entry = bundle.manifest.classifier
    if entry is None:
        raise BundleError(
            f"{bundle.path} holds no classifier; pass its file with --classifier, or build the bundle again with: "
            "python -m export.to_trt CHECKPOINT --classifier FILE"
        )
    return entry.config
