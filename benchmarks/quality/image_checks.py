"""What must hold of a variant's images beside those that fp32 makes from the same seeds."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from benchmarks.core.report import Check, Row
from benchmarks.quality.cells import Cell
from judging.metrics import Psnr, worse_by_chance
from judging.scorers import Score

CHANCE = 1e-3
"""How often a variant that is as good as fp32 fails a check of accuracy or distance."""

FRECHET_MARGIN = 0.05
"""Share of fp32's distance by which another may always differ: what no eye and no table tells apart."""

LEAST_MEDIAN_PSNR_DB = {
    # Sums in another order: 136 to 139 measured of 4 to 50 steps. A result rounded to fp16 gives 87, to bf16 69.
    "fp32": 100.0,
    # Eleven bits: 81 to 85 measured where each convolution's result is rounded. Errors of whole fp16 networks are three
    # to fifteen times as large, which is 10 to 24 dB.
    "fp16": 50.0,
    # Eight bits: 63 to 67 measured in the same way, with the same to come.
    "bf16": 30.0,
    # Eight bits at every large convolution, whose output errs about as much as bf16's.
    "int8": 25.0,
}
"""Of the median image beside fp32's from the same seed; measured on the shipped digits. Not of all images together:
sampling is chaotic, and one image in a thousand that turns out another would decide that figure."""

LEAST_PSNR_OF_FP32_DB = 60.0
"""Of the worst image in fp32, 105 to 132 measured: another order of sums does not make another image."""


def cell_checks(cell: Cell, precision: str, reference: Cell) -> list[Check]:
    """All checks of a cell beside the fp32 one of as many steps."""
    where = f"{cell.variant}, {cell.steps} steps"
    checks = [finite_check(cell)]
    if cell.psnr is None:
        return checks
    checks += psnr_checks(where, cell.psnr, precision)
    for score, wanted in zip(cell.scores, reference.scores, strict=True):
        if score.right is not None and wanted.right is not None:
            checks.append(accuracy_check(where, score, wanted))
        if score.distance is not None and wanted.distance is not None:
            checks.append(frechet_check(where, score, wanted))
    return checks


def finite_check(cell: Cell) -> Check:
    """That the images hold no NaN or infinity."""
    return Check(
        f"{cell.variant}, {cell.steps} steps: all images are finite",
        cell.is_finite,
        remedy="the network overflowed; use bf16 or fp32, or export the bundle again",
    )


def psnr_checks(where: str, psnr: Psnr, precision: str) -> list[Check]:
    """That the images are those of fp32 as far as the precision allows; in fp32 also the worst of them."""
    remedy = (
        f"it computes in a lower precision than {precision}, or wrongly; run `python -m engine info --verify` on the "
        "bundle and export it again"
    )
    limit = LEAST_MEDIAN_PSNR_DB[precision]
    name = f"{where}: PSNR beside fp32 is one of {precision}"
    checks = [Check(name, psnr.median >= limit, psnr.median, limit, remedy)]
    if precision == "fp32":
        limit, name = LEAST_PSNR_OF_FP32_DB, f"{where}: no image is another than fp32's"
        checks.append(Check(name, psnr.least >= limit, psnr.least, limit, remedy))
    return checks


def accuracy_check(where: str, score: Score, reference: Score) -> Check:
    """That images read wrongly are not more than fp32's by more than chance."""
    assert score.right is not None
    assert reference.right is not None
    chance = worse_by_chance(score.right, reference.right)
    return Check(
        f"{where}: as many images are read as their label as of fp32's (value: how likely by chance)",
        chance >= CHANCE,
        chance,
        CHANCE,
        f"{score.figures['accuracy']:.1%} are, {reference.figures['accuracy']:.1%} of fp32's; do not use this variant",
    )


def frechet_check(where: str, score: Score, reference: Score) -> Check:
    """That the distance differs from fp32's by no more than the margin and the noise of these few images.

    The noise is that of the difference, resampled in pairs; where there are no resamples the margin stands alone.
    """
    assert score.distance is not None
    assert reference.distance is not None
    allowed = FRECHET_MARGIN * reference.distance
    if len(score.resampled) and len(reference.resampled):
        z = NormalDist().inv_cdf(1 - CHANCE / 2)
        allowed += z * float(np.std(score.resampled - reference.resampled))
    difference = score.distance - reference.distance
    return Check(
        f"{where}: {score.frechet_name} is fp32's within noise (value: difference)",
        abs(difference) <= allowed,
        abs(difference),
        allowed,
        f"it is {score.distance:.4g}, fp32's {reference.distance:.4g}; do not use this variant",
    )


def likelihood_check(row: Row) -> Check:
    """That the bits per dimension are a finite number."""
    return Check(
        f"{row.case['variant']}: bits per dimension are finite",
        row.metrics["bits_per_dim"] is not None,
        remedy="the network overflowed; use bf16 or fp32, or export the bundle again",
    )
