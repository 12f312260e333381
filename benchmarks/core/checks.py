"""Whether a backend computes in the precision that it says, by its error beside fp32 on the same inputs."""

from __future__ import annotations

from torch import Tensor

from benchmarks.core.report import Check, Comparison, case_text
from benchmarks.core.stats import Verdict
from export.verify import LIMITS, Difference

FLOORS = {
    # No limit below: sums in another order may agree to the last bit.
    "fp32": 0.0,
    # Each operator rounds to 2^-11; 5e-4 to 2.4e-3 measured, and 1.6e-4 where only the operators' results are rounded.
    "fp16": 3e-5,
    # Each operator rounds to 2^-8; 5e-3 to 7e-2 measured.
    "bf16": 3e-4,
    # Eight bits at every large convolution: 3.5e-2 to 6.5e-2 measured.
    "int8": 1e-3,
}
"""Least rms error, relative to the rms of the output, of a network that does compute in this precision."""

CEILINGS = {**LIMITS, "bf16": 1e-1, "int8": 1e-1}
"""Largest rms error accepted. An export only records those of bf16 and int8; a benchmark wants them comparable."""


def error_of(got: Tensor, wanted: Tensor) -> Difference:
    """The error of an output beside the fp32 one, tensors of one shape."""
    difference = Difference()
    difference.add(got, wanted)
    return difference


def precision_checks(variant: str, precision: str, error: Difference) -> tuple[Check, Check]:
    """That the error is not above what this precision may have, nor below what it must have."""
    ceiling, floor = CEILINGS[precision], FLOORS[precision]
    relative = error.relative
    return (
        Check(
            f"{variant}: error beside fp32 is one of {precision}",
            relative <= ceiling,
            relative,
            ceiling,
            f"it computes in a lower precision than {precision}, or wrongly; run `python -m engine info --verify` on "
            "the bundle and export it again",
        ),
        Check(
            f"{variant}: computes in {precision}, not above",
            relative >= floor,
            relative,
            floor,
            f"it computes in a higher precision than {precision}; this machine may not have {precision}, so do not "
            f"quote its time as one of {precision}",
        ),
    )


def not_slower(comparison: Comparison) -> Check:
    """That the variant of a comparison is not slower than its baseline."""
    ratio = comparison.ratio
    return Check(
        f"{comparison.variant} is not slower than {comparison.baseline} ({case_text(comparison.case)})",
        ratio.verdict is not Verdict.SLOWER,
        ratio.low,
        1.0,
        f"it takes {ratio.value:.2f} times as long, between {ratio.low:.2f} and {ratio.high:.2f}",
    )
