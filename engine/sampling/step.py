"""One step's mathematics for a batch of images, each at a row of its own table.

Pure functions of tensors, for slots on the host and on a device alike: nothing here waits for a device, allocates what
stays, or knows where state lives. What a row means is said by kernels.reference.solver_update.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.diffusion.guidance import ClassifierFreeGuidance, Interval, is_within
from engine.diffusion.prediction import Prediction
from engine.diffusion.solvers import COLUMNS, StepTable
from kernels.reference import Coefficients, limit_x0

TIMESTEP, PERCENTILE, PUSH = (COLUMNS.index(name) for name in ("timestep", "percentile", "push"))
NOISE_SCALE, KNOWN_NOISE = COLUMNS.index("S"), COLUMNS.index("N")
_COEFFICIENTS = {name: place for place, name in enumerate(COLUMNS) if name not in ("timestep", "push")}

OLDER = 3
"""How many outs of earlier rows a row can take."""


def table_key(table: StepTable) -> bytes:
    """A digest of a table's rows: tables of equal rows are one table."""
    return hashlib.blake2b(table.to_array().tobytes(), digest_size=16).digest()


def has_thresholds(table: StepTable) -> bool:
    """Whether some row limits x0 by a percentile (dynamic thresholding)."""
    return bool(table.percentile.any())


def is_multistep(table: StepTable) -> bool:
    """Whether some row keeps its out for later ones or takes those of earlier ones."""
    return any(getattr(table, name).any() for name in ("push", "O1", "O2", "O3"))


def active_rows(table: StepTable, interval: Interval, timestep_scale: float) -> np.ndarray:
    """[N] bool: the rows whose training timestep (in continuous time log-SNR) lies in a guidance's interval.

    timestep_scale: of engine.diffusion.prediction.Diffusion, which the table's timesteps are multiples of.
    """
    return np.array([is_within(float(time) / timestep_scale, interval) for time in table.timestep], dtype=bool)


def coefficients(rows: Tensor, thresholds: bool) -> Coefficients:
    """rows [B, len(COLUMNS)] float32, a row of a table for each image, as Coefficients of [B, 1, 1, 1].

    thresholds: whether some row has a percentile.
    """
    columns = rows[:, :, None, None, None].unbind(1)
    values: dict[str, Tensor | None] = {name: columns[place] for name, place in _COEFFICIENTS.items()}
    if not thresholds:
        values["percentile"] = None
    return Coefficients(**values)  # type: ignore[arg-type]


def guidance_numbers(guidance: ClassifierFreeGuidance) -> tuple[float, float, float, float]:
    """strength, rescale, removed and plus_plus of an image, as guided_out takes them: scale - 1, 1 - parallel."""
    # Differences are taken in float64 here; of float32 numbers they would be off by an ulp.
    return guidance.scale - 1, guidance.rescale, 1 - guidance.parallel, float(guidance.plus_plus)


UNGUIDED = (0.0, 0.0, 0.0, 0.0)
"""guidance_numbers of an image without classifier-free guidance."""


def guided_out(
    with_label: Tensor,
    without_label: Tensor,
    strength: Tensor,
    rescale_and_removed: tuple[Tensor, Tensor] | None,
    channels: int,
) -> Tensor:
    """The network's result after classifier-free guidance, [B, C', H, W] float32, each image with its own numbers.

        update = with_label - without_label, less `removed` of its component along with_label
        out    = with_label + strength update
        out    = out (rescale std(with_label) / std(out) + 1 - rescale)

    with_label, without_label: [B, C', H, W] float32, of which channels from `channels` = C on, of a learned variance,
    stay those of with_label. strength, rescale, removed: [B] float32; None for 0 in all images. Sums run over one
    image. ClassifierFreeGuidance says which papers these lines are from.
    """
    labelled = with_label[:, :channels]
    update = labelled - without_label[:, :channels]
    if rescale_and_removed is not None:
        removed = _per_image(rescale_and_removed[1])
        # In float64: what is kept is a small difference of two large vectors.
        unit = F.normalize(labelled.flatten(1).double(), dim=1)
        along = (update.flatten(1).double() * unit).sum(dim=1, keepdim=True) * unit
        kept = update - removed * along.reshape(update.shape).to(update.dtype)
        update = torch.where(removed != 0, kept, update)
    out = labelled + _per_image(strength) * update
    if rescale_and_removed is not None:
        rescale = rescale_and_removed[0]
        factor = rescale * labelled.flatten(1).std(dim=1) / out.flatten(1).std(dim=1) + 1 - rescale
        out = torch.where(_per_image(rescale) != 0, out * _per_image(factor), out)
    return torch.cat([out, with_label[:, channels:]], dim=1)


def implied_out(row: Coefficients, x_t: Tensor, out: Tensor, prediction: Prediction) -> Tensor:
    """What E multiplies in a step of CFG++: the result [B, C, H, W] without its condition, limit included.

    A network of x0 or v has its eps from a limited x0, so that limit is put back into its out: out = (x0 - A x_t) / B.
    out: [B, C, H, W], the unlabelled result. Chung et al., CFG++ (2024), algorithm 2.
    """
    if prediction is Prediction.EPS:
        return out
    x0 = limit_x0(row.A * x_t + row.B * out, row.clip, row.percentile)
    return (x0 - row.A * x_t) / row.B


def pushed(older: Tensor, out: Tensor, rows: Tensor) -> Tensor:
    """The outs that later rows take as o1, o2 and o3, after a step: [3, B, C, H, W], newest first.

    older: those before it. out: [B, C', H, W]. rows: [B, len(COLUMNS)]; an image whose row has no push keeps its own.
    """
    newest = torch.cat([out[None, :, : older.shape[2]], older[:-1]])
    return torch.where(rows[None, :, PUSH, None, None, None] != 0, newest, older)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]
