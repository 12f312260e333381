"""Judges and scorers: the digits' evaluator, and InceptionV3 by torch-fidelity with random weights."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engine.errors import BackendError, CheckpointError, RequestError
from judging import scorers
from judging.digits import EVALUATOR
from judging.image_sets import ImageSet
from judging.metrics import Moments
from judging.scorers import DigitsJudge, FeatureScorer, InceptionJudge


def images(count: int, seed: int, shape: tuple[int, ...] = (8, 8, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(count, *shape), dtype=np.uint8)


def test_the_digits_judge_takes_no_other_images():
    for shape in ((28, 28, 1), (32, 32, 3)):
        with pytest.raises(RequestError, match=r"grey images of 32x32, got \["):
            DigitsJudge(EVALUATOR).read(images(2, 0, shape))


def test_a_scorer_of_digits_counts_what_is_read_as_its_label():
    judge, grey = DigitsJudge(EVALUATOR), images(6, 0, (32, 32, 1))
    read = judge.read(grey).logits.argmax(dim=1).numpy()
    wrong = np.where(np.arange(6) < 2, (read + 1) % 10, read)
    scorer = FeatureScorer(judge, ImageSet("others", images(8, 1, (32, 32, 1))))
    score = scorer.score(grey, wrong)
    assert score.right is not None
    assert score.right.tolist() == [False, False, True, True, True, True]
    assert score.figures["accuracy"] == pytest.approx(4 / 6)
    assert score.distance == score.figures["frechet"] > 0
    assert "accuracy" not in scorer.score(grey, None).figures


def test_moments_of_a_file_are_a_reference_without_images():
    judge = DigitsJudge(EVALUATOR)
    features = judge.read(images(300, 2, (32, 32, 1))).features
    scorer = FeatureScorer(judge, ImageSet("moments", pooled=Moments.of(features)))
    assert "precision" not in scorer.score(images(6, 0, (32, 32, 1)), None).figures
    with pytest.raises(ValueError, match="neither images nor moments"):
        FeatureScorer(judge, ImageSet("nothing"))


def test_a_missing_package_is_named_with_its_pip_line(monkeypatch, tmp_path):
    monkeypatch.setattr(scorers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match="pip install --no-deps torch-fidelity"):
        InceptionJudge(tmp_path / "none.pth")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of InceptionV3 as torch-fidelity names its tensors, random and of order 1 in every layer."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("needs torch-fidelity: pip install --no-deps torch-fidelity")
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]), torch.no_grad():
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        state = scorers._fidelity_inception()("inception-v3", ["2048"], str(path)).state_dict()
    for name, value in state.items():
        if name.endswith("conv.weight"):
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=torch.Generator().manual_seed(1))
    torch.save(state, path)
    return path


def test_inception_judges_images_beside_a_reference(weights, monkeypatch):
    """Its own reference has no distance to itself; other images have one. torchvision is not asked for."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    reference = ImageSet("reference", images(6, 1))
    scorer = FeatureScorer(InceptionJudge(weights), reference)
    same, other = scorer.score(images(6, 1), None), scorer.score(images(5, 2), None)
    names = {"fid", "inception_score", "inception_score_std", "inception_precision", "inception_recall"}
    assert same.figures.keys() == other.figures.keys() == names
    assert abs(same.figures["fid"]) < 1e-6 * other.figures["fid"]
    assert (same.figures["inception_precision"], same.figures["inception_recall"]) == (1, 1)
    assert other.figures["inception_score"] >= 1
    assert not any(name.startswith("torch_fidelity") for name in sys.modules)
    grey = InceptionJudge(weights).read(images(2, 3, (8, 8, 1)))
    assert grey.features.shape == (2, 2048)


def test_another_file_is_no_inception(weights, tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="is not the InceptionV3 of FID"):
        InceptionJudge(tmp_path / "other.pth")
