"""The end of a step for all slots in one launch: limit, guidance terms, Philox noise, known parts, and the next row.

kernels.reference.solver_update says what a row of coefficients means, engine.diffusion.noise which numbers the noise
is. A
program takes four times QUADS elements of one slot; the last program of a slot to finish moves the slot's row and draw.
Where some row has a dynamic threshold, `abs_quantile` runs before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

ROW = (
    "timestep", "A", "B", "clip", "percentile", "P", "Q", "H", "L0", "L1", "E", "R", "G", "S", "K", "N", "O1", "O2",
    "O3", "push",
)  # fmt: skip
"""What the columns of the arena must be."""

NOISE_STREAM: tl.constexpr = tl.constexpr(0)
KNOWN_STREAM: tl.constexpr = tl.constexpr(1)
_COLUMNS: tl.constexpr = tl.constexpr(len(ROW))
_A, _B, _CLIP, _PERCENTILE, _P, _Q, _H, _L0, _L1, _E, _R, _G, _S, _K, _N, _O1, _O2, _O3, _PUSH = (
    tl.constexpr(index) for index in range(1, len(ROW))
)
QUADS = 128
SELECT_TILE = 2048


@dataclass(frozen=True, slots=True, eq=False)
class SlotTensors:
    """Device memory of B slots, contiguous; see engine.sampling.device_state for what each holds.

    arena [R, len(ROW)] float32; row, last, seed_low, seed_high, draw [B] int32; x_t, x0, known, mask [B, C, H, W] and
    older [3, B, C, H, W] float32. arrived [B] int32, zeros, and threshold [B] float32 are the kernels' own.
    """

    arena: Tensor
    row: Tensor
    last: Tensor
    seed_low: Tensor
    seed_high: Tensor
    draw: Tensor
    x_t: Tensor
    x0: Tensor
    older: Tensor
    known: Tensor
    mask: Tensor
    arrived: Tensor
    threshold: Tensor


@triton.jit
def _term(coefficient, operand):
    """coefficient * operand, and 0 where the coefficient is 0, whatever the operand holds."""
    return tl.where(coefficient != 0.0, coefficient * operand, 0.0)


@triton.jit
def _sin_cos_turns(turns):
    """Sine and cosine of 2 pi turns, turns [..] float64 in [0, 1]: Taylor's series within an eighth of a turn of 0."""
    quarter = (turns * 4.0 + 0.5).to(tl.int32)
    angle = (turns - quarter.to(tl.float64) * 0.25) * 6.283185307179586
    square = angle * angle
    sine = 1.0 - square / 272.0
    sine = 1.0 - square / 210.0 * sine
    sine = 1.0 - square / 156.0 * sine
    sine = 1.0 - square / 110.0 * sine
    sine = 1.0 - square / 72.0 * sine
    sine = 1.0 - square / 42.0 * sine
    sine = 1.0 - square / 20.0 * sine
    sine = angle * (1.0 - square / 6.0 * sine)
    cosine = 1.0 - square / 240.0
    cosine = 1.0 - square / 182.0 * cosine
    cosine = 1.0 - square / 132.0 * cosine
    cosine = 1.0 - square / 90.0 * cosine
    cosine = 1.0 - square / 56.0 * cosine
    cosine = 1.0 - square / 30.0 * cosine
    cosine = 1.0 - square / 12.0 * cosine
    cosine = 1.0 - square / 2.0 * cosine
    swapped = (quarter & 1) == 1
    up, right = tl.where(swapped, cosine, sine), tl.where(swapped, sine, cosine)
    return tl.where((quarter & 2) == 2, -up, up), tl.where(((quarter + 1) & 2) == 2, -right, right)


@triton.jit
def _normal_pair(first, second):
    """Two standard normals float32 from two words uint32; Box & Muller (1958) in float64, rounded once."""
    radius = tl.sqrt(-2.0 * tl.log(((first >> 9).to(tl.float64) + 0.5) * 1.1920928955078125e-07))
    sine, cosine = _sin_cos_turns(((second >> 9).to(tl.float64) + 0.5) * 1.1920928955078125e-07)
    return (radius * cosine).to(tl.float32), (radius * sine).to(tl.float32)


@triton.jit
def _normals(seed_low, seed_high, draw, stream, quad, QUADS: tl.constexpr):
    """Noise [4 QUADS] float32 of elements 4 quad to 4 quad + 3; the counter is (quad, draw, stream, 0)."""
    key = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_low.to(tl.uint32, bitcast=True).to(
        tl.uint64
    )
    zero = quad * 0
    w0, w1, w2, w3 = tl.philox(key, quad, zero + draw, zero + stream, zero)
    z0, z1 = _normal_pair(w0, w1)
    z2, z3 = _normal_pair(w2, w3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (4 * QUADS,))


@triton.jit
def solver_step(arena, rows, last, seed_low, seed_high, draw, arrived, x_t, x0, out, grad, raw_out, older, known, mask,
                threshold, elements, slots, out_stride, raw_stride, QUADS: tl.constexpr, HAS_NOISE: tl.constexpr,
                HAS_GRAD: tl.constexpr, HAS_RAW: tl.constexpr, HAS_VARIANCE: tl.constexpr,
                HAS_EXTRAS: tl.constexpr):  # fmt: skip
    """Program (slot, part of its elements). out_stride, raw_stride: elements from one slot's result to the next."""
    slot = tl.program_id(0)
    at_row = tl.load(rows + slot)
    at_draw = tl.load(draw + slot)
    row = arena + at_row.to(tl.int64) * _COLUMNS
    quad = tl.program_id(1) * QUADS + tl.arange(0, QUADS)
    element = tl.program_id(1) * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    exists = element < elements
    at = slot.to(tl.int64) * elements + element
    at_out = slot.to(tl.int64) * out_stride + element
    x = tl.load(x_t + at, mask=exists, other=0.0)
    mean_out = tl.load(out + at_out, mask=exists, other=0.0).to(tl.float32)
    clip = tl.load(row + _CLIP)
    unlimited = _term(tl.load(row + _A), x) + _term(tl.load(row + _B), mean_out)
    clean = tl.clamp(unlimited, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    if HAS_EXTRAS:
        if tl.load(row + _PERCENTILE) > 0.0:
            limit = tl.minimum(tl.maximum(tl.load(threshold + slot), 1.0), clip)
            clean = tl.clamp(unlimited, -limit, limit, propagate_nan=tl.PropagateNan.ALL) / limit
    if HAS_GRAD:
        gradient = tl.load(grad + at, mask=exists, other=0.0).to(tl.float32)
        clean += _term(tl.load(row + _H), gradient)
    implied = mean_out
    if HAS_RAW:
        implied = tl.load(raw_out + slot.to(tl.int64) * raw_stride + element, mask=exists, other=0.0).to(tl.float32)
    before = tl.load(x0 + at, mask=exists, other=0.0)
    x_prev = _term(tl.load(row + _P), clean) + _term(tl.load(row + _Q), x) + _term(tl.load(row + _E), implied)
    x_prev += _term(tl.load(row + _R), before)
    if HAS_EXTRAS:
        image = tl.cast(slots, tl.int64) * elements
        old1 = tl.load(older + at, mask=exists, other=0.0)
        old2 = tl.load(older + image + at, mask=exists, other=0.0)
        old3 = tl.load(older + 2 * image + at, mask=exists, other=0.0)
        x_prev += _term(tl.load(row + _O1), old1) + _term(tl.load(row + _O2), old2) + _term(tl.load(row + _O3), old3)
        if tl.load(row + _PUSH) > 0.0:
            tl.store(older + at, mean_out, mask=exists)
            tl.store(older + image + at, old1, mask=exists)
            tl.store(older + 2 * image + at, old2, mask=exists)
    if HAS_GRAD or HAS_NOISE:
        log_variance = tl.load(row + _L0)
        if HAS_VARIANCE:
            share = (tl.load(out + at_out + elements, mask=exists, other=0.0).to(tl.float32) + 1.0) / 2.0
            log_variance += _term(tl.load(row + _L1) - tl.load(row + _L0), share)
        if HAS_GRAD:
            x_prev += _term(tl.load(row + _G), tl.exp(log_variance) * gradient)
        if HAS_NOISE:
            noise = _normals(tl.load(seed_low + slot), tl.load(seed_high + slot), at_draw, NOISE_STREAM, quad, QUADS)
            x_prev += _term(tl.load(row + _S), tl.exp(0.5 * log_variance) * noise)
    if HAS_EXTRAS:
        made = tl.load(mask + at, mask=exists, other=1.0)
        if tl.min(made) < 1.0:
            again = _normals(tl.load(seed_low + slot), tl.load(seed_high + slot), at_draw, KNOWN_STREAM, quad, QUADS)
            there = _term(tl.load(row + _K), tl.load(known + at, mask=exists, other=0.0))
            there += _term(tl.load(row + _N), again)
            x_prev = tl.where(made == 1.0, x_prev, made * x_prev + (1.0 - made) * there)
    tl.store(x_t + at, x_prev, mask=exists)
    tl.store(x0 + at, clean, mask=exists)
    # Every warp has read row and draw before this program counts as arrived.
    tl.debug_barrier()
    if tl.atomic_add(arrived + slot, 1) == tl.num_programs(1) - 1:
        tl.store(rows + slot, tl.minimum(at_row + 1, tl.load(last + slot)))
        tl.store(draw + slot, at_draw + 1)
        tl.store(arrived + slot, 0)


@triton.jit
def _magnitude_bits(row, x_t, out, slot, element, elements, out_stride):
    """|A x_t + B out| as the bits of a float32, whose order is that of the values; 2^31 - 1 behind the end."""
    exists = element < elements
    x = tl.load(x_t + slot.to(tl.int64) * elements + element, mask=exists, other=0.0)
    mean_out = tl.load(out + slot.to(tl.int64) * out_stride + element, mask=exists, other=0.0).to(tl.float32)
    value = tl.abs(_term(tl.load(row + _A), x) + _term(tl.load(row + _B), mean_out))
    return tl.where(exists, value.to(tl.int32, bitcast=True), 2147483647)


@triton.jit
def abs_quantile(arena, rows, x_t, out, threshold, elements, out_stride, TILE: tl.constexpr):
    """Program (slot): threshold = the quantile of |x0| at the row's percentile, linear between elements.

    The k-th smallest is found bit by bit: the largest number with at most k values below it.
    """
    slot = tl.program_id(0)
    row = arena + tl.load(rows + slot).to(tl.int64) * _COLUMNS
    percentile = tl.load(row + _PERCENTILE)
    line = tl.arange(0, TILE)
    if percentile > 0.0:
        place = percentile.to(tl.float64) * tl.cast(elements - 1, tl.float64)
        below = place.to(tl.int32)
        found = below * 0
        for bit in range(30, -1, -1):
            trial = found | (1 << bit)
            smaller = tl.zeros((TILE,), tl.int32)
            for start in range(0, elements, TILE):
                bits = _magnitude_bits(row, x_t, out, slot, start + line, elements, out_stride)
                smaller += (bits < trial).to(tl.int32)
            found = tl.where(tl.sum(smaller) <= below, trial, found)
        up_to = tl.zeros((TILE,), tl.int32)
        above = tl.full((TILE,), 2147483647, tl.int32)
        for start in range(0, elements, TILE):
            bits = _magnitude_bits(row, x_t, out, slot, start + line, elements, out_stride)
            up_to += (bits <= found).to(tl.int32)
            above = tl.minimum(above, tl.where(bits > found, bits, 2147483647))
        is_last = below + 1 > elements - 1
        following = tl.where(is_last | (tl.sum(up_to) > below + 1), found, tl.min(above))
        low = found.to(tl.float32, bitcast=True).to(tl.float64)
        high = following.to(tl.float32, bitcast=True).to(tl.float64)
        share = place - below.to(tl.float64)
        tl.store(threshold + slot, (low + share * (high - low)).to(tl.float32))


def step(
    state: SlotTensors, out: Tensor, grad: Tensor | None, raw_out: Tensor | None, *, noise: bool, extras: bool
) -> None:
    """One step of every slot, in place: x_t, x0 and older by each slot's row; row = min(row + 1, last); draw += 1.

    out: [B, C, H, W] or, with a variance, [B, 2C, H, W]; grad, raw_out: [B, C, H, W] or None. Each image of them is
    contiguous. noise: some row adds noise; extras: some row has a percentile, outs of rows before, or some slot a
    known part. Nothing is allocated. Raises ValueError for other shapes.
    """
    _check(state, out, grad, raw_out)
    slots = len(state.x_t)
    elements = state.x_t[0].numel()
    if extras:
        abs_quantile[(slots,)](
            state.arena, state.row, state.x_t, out, state.threshold, elements, out.stride(0), SELECT_TILE, num_warps=8
        )
    solver_step[(slots, triton.cdiv(elements, 4 * QUADS))](
        state.arena, state.row, state.last, state.seed_low, state.seed_high, state.draw, state.arrived, state.x_t,
        state.x0, out, out if grad is None else grad, out if raw_out is None else raw_out, state.older, state.known,
        state.mask, state.threshold, elements, slots, out.stride(0), 0 if raw_out is None else raw_out.stride(0),
        QUADS, noise, grad is not None, raw_out is not None, out.shape[1] == 2 * state.x_t.shape[1], extras,
        num_warps=4,
    )  # fmt: skip


def _check(state: SlotTensors, out: Tensor, grad: Tensor | None, raw_out: Tensor | None) -> None:
    if state.arena.shape[1:] != (len(ROW),) or not state.arena.is_contiguous():
        raise ValueError(f"arena is {tuple(state.arena.shape)}, expected [R, {len(ROW)}], contiguous, columns {ROW}")
    batch, channels, *size = state.x_t.shape
    for name, values, allowed in (
        ("out", out, (channels, 2 * channels)),
        ("grad", grad, (channels,)),
        ("raw_out", raw_out, (channels,)),
    ):
        if values is None:
            continue
        if len(values) != batch or values.shape[1] not in allowed or list(values.shape[2:]) != size:
            raise ValueError(f"{name} is {tuple(values.shape)}, expected one for x_t {tuple(state.x_t.shape)}")
        if not values[0].is_contiguous():
            raise ValueError(f"{name} has strides {values.stride()}, expected contiguous images")
    if grad is not None and not grad.is_contiguous():
        raise ValueError(f"grad has strides {grad.stride()}, expected contiguous memory")
