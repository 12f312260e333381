"""The files beside a bundle that peers run: its checkpoint and its classifier, after they proved to be those."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peer_quality import ASSETS
from engine.bundle.folder import Bundle
from engine.checkpoints.folder import read_folder
from engine.checkpoints.load import load_checkpoint
from engine.errors import BundleError, RequestError
from engine.files import file_sha256
from engine.networks.classifier import Classifier
from engine.networks.config import Attention, ClassifierConfig


def checkpoint_of(bundle: Bundle, given: Path | None) -> Path | None:
    """The checkpoint given, after it proved to be the one that the bundle was exported from; raises RequestError."""
    if given is None:
        return None
    found = read_folder(given).sha256 if given.is_dir() else file_sha256(_existing(given))
    if found != bundle.manifest.checkpoint_sha256:
        raise RequestError(
            f"{given} is not what {bundle.path} was exported from (sha256 {found[:12]}, the manifest has "
            f"{bundle.manifest.checkpoint_sha256[:12]}); pass that checkpoint, or export this one"
        )
    return given


def classifier_of(bundle: Bundle, given: Path | None) -> Classifier | str:
    """The classifier of the bundle's gradient in torch, or why there is none; raises RequestError for another file.

    Unless given it is the shipped classifier, where that is the bundle's.
    """
    entry = bundle.manifest.classifier
    if entry is None:
        if given is not None:
            raise RequestError(f"{bundle.path} holds no classifier; export it again with --classifier {given}")
        return "the bundle holds no classifier; export it with --classifier FILE"
    path = ASSETS / "classifier.pt" if given is None else _existing(given)
    is_same = path.is_file() and file_sha256(path) == entry.checkpoint_sha256
    if given is None and not is_same:
        return "the peers' gradient needs the classifier's file; give it with --classifier"
    if not is_same:
        raise RequestError(f"{path} is not the classifier in {bundle.path}; pass the file it was exported with")
    return _read_classifier(path, entry.config)


def _read_classifier(path: Path, config: ClassifierConfig) -> Classifier:
    """The loader asks for a schedule, which the classifier does not depend on."""
    widths = {block.head_dim for block in config.blocks if isinstance(block, Attention)}
    facts = {"num_head_channels": widths.pop()} if len(widths) == 1 else {}
    read = load_checkpoint(
        path, family="openai-guided", image_size=config.image_size, noise_schedule="cosine", **facts
    ).classifier()
    if read.config != config:
        raise BundleError(f"{path} does not read back as the classifier in the bundle; export the bundle again")
    return read


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise RequestError(f"{path} is no file; pass an existing one")
    return path
