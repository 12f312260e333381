"""Noise as a function of (seed, draw, stream, element): the same in any batch, at any slot, in any order.

The generator is Philox 4x32-10 (Salmon, Moraes, Dror & Shaw, Parallel random numbers: as easy as 1, 2, 3, SC
2011). Its key is the low and the high word of an image's seed, its counter is (element // 4, draw, stream,
0): element is the logical NCHW index inside the image, draw 0 is x_T and draw k + 1 the k-th executed step.
Each counter gives four 32-bit words w, each word a uniform u = ((w >> 9) + 0.5) * 2^-23 in (0, 1), and each
pair of uniforms two normals (Box & Muller, A note on the generation of random normal deviates, 1958):

    r = sqrt(-2 ln u0), angle = 2 pi u1
    elements 4k, 4k + 1 = r cos(angle), r sin(angle) from words 0 and 1; 4k + 2, 4k + 3 from words 2 and 3

Box-Muller runs in float64 and is rounded once to float32. The words and uniforms are exact on every machine.
The last bits of a float64 log or cosine belong to the maths library, and about one normal in 10^8 lies so
near to the middle of two float32 values that another library may round it to the neighbour.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine.errors import RequestError

NOISE, INPAINTING, LABELS = 0, 1, 2
"""The streams: what a draw is used for."""

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
LOW_WORD = np.uint64(0xFFFFFFFF)
ROUNDS = 10
# Counters worked on at once: a dozen 8-byte temporaries of this length stay in the L2 cache, and their memory
# does not grow with the batch or the image.
CHUNK = 1 << 13

Words = npt.NDArray[np.uint64]


class NoiseSource(Protocol):
    """Where a sampler gets its noise; `normal` is the usual one, `RecordedNoise` replays given arrays."""

    def __call__(
        self, seeds: Sequence[int], draws: Sequence[int], shape: tuple[int, ...], stream: int = NOISE
    ) -> npt.NDArray[np.float32]:
        """Noise [B, *shape] float32: entry b is draw draws[b] of the image with seed seeds[b]."""
        ...


def philox_words(
    key_low: npt.ArrayLike,
    key_high: npt.ArrayLike,
    counter0: npt.ArrayLike,
    counter1: npt.ArrayLike,
    counter2: npt.ArrayLike,
    counter3: npt.ArrayLike,
) -> npt.NDArray[np.uint32]:
    """Philox 4x32-10 of two key words and four counter words, each an integer array of values below 2**32.

    The arguments broadcast against each other to [...]; returns uint32 [..., 4]. Salmon et al. (2011),
    section 3.3.
    """
    arguments = (key_low, key_high, counter0, counter1, counter2, counter3)
    key0, key1, *counter = (np.asarray(word, dtype=np.uint64) for word in arguments)
    words = _philox(key0, key1, *counter)
    return np.stack(np.broadcast_arrays(*words), axis=-1).astype(np.uint32)


def normal(
    seeds: Sequence[int], draws: Sequence[int], shape: tuple[int, ...], stream: int = NOISE
) -> npt.NDArray[np.float32]:
    """Standard normal noise [B, *shape], float32 and contiguous.

    seeds: B integers in [0, 2**64), one an image; draws: B integers in [0, 2**32); shape: (C, H, W) of one
    image, or any other sizes. Entry b depends on seeds[b], draws[b], stream and the index in the image, and
    on nothing else. |value| < 5.78, because the smallest uniform is 2^-24. Box & Muller (1958), over Salmon
    et al. (2011). Raises RequestError for a seed, draw, stream or size out of range and for unequal numbers
    of seeds and draws.
    """
    key, draw = _keys_and_draws(seeds, draws, stream)
    if any(size < 1 for size in shape):
        raise RequestError(f"noise shape {shape}: every size must be at least 1")
    elements = math.prod(shape)
    blocks = -(-elements // 4)
    if blocks > 2**32:
        raise RequestError(f"noise shape {shape} has {elements} elements; one image can have 2**34 at most")

    normals = np.empty((len(key), blocks, 4), dtype=np.float32)
    rows = max(1, CHUNK // blocks)
    for first in range(0, len(key), rows):
        images = slice(first, first + rows)
        low, high, step = key[images, None] & LOW_WORD, key[images, None] >> np.uint64(32), draw[images, None]
        for start in range(0, blocks, CHUNK):
            block = np.arange(start, min(start + CHUNK, blocks), dtype=np.uint64)[None]
            words = _philox(low, high, block, step, np.array(stream, np.uint64), np.array(0, np.uint64))
            _box_muller(*words, out=normals[images, start : start + CHUNK])
    flat = normals.reshape(len(key), 4 * blocks)[:, :elements]
    return np.ascontiguousarray(flat).reshape(len(key), *shape)


def uniform(seeds: Sequence[int], draws: Sequence[int], stream: int = LABELS) -> npt.NDArray[np.float64]:
    """One uniform number an image, [B] float64 in (0, 1), of the first word of counter (0, draw, stream, 0).

    It is an odd multiple of 2^-24. In float64 floor(u * n) is below n for every n up to 2**29; in float32 it
    may round up to n. seeds, draws and errors are those of `normal`.
    """
    key, draw = _keys_and_draws(seeds, draws, stream)
    purpose, zero = np.array(stream, np.uint64), np.array(0, np.uint64)
    word, _, _, _ = _philox(key & LOW_WORD, key >> np.uint64(32), zero, draw, purpose, zero)
    return _to_uniform(word)


@dataclass(frozen=True, eq=False)
class RecordedNoise:
    """A NoiseSource that replays given arrays: the one way to inject noise into a sampler.

    x_T: [N, C, H, W] float32, the start of image s. z: [K, N, C, H, W] float32, the noise of each executed
    step. Here a seed s in [0, N) chooses a recorded image: draw 0 is x_T[s], draw k + 1 is z[k, s]. Only
    stream NOISE is recorded. Raises RequestError for arrays that do not fit each other and for what was not
    recorded.
    """

    x_T: npt.NDArray[np.float32]
    z: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        for name, array, axes in (("x_T", self.x_T, "[N, C, H, W]"), ("z", self.z, "[K, N, C, H, W]")):
            if array.ndim != axes.count(",") + 1 or array.dtype != np.float32:
                raise RequestError(f"recorded {name} is {array.dtype} {list(array.shape)}; expected float32 {axes}")
        if self.z.shape[1:] != self.x_T.shape:
            raise RequestError(
                f"recorded z is {list(self.z.shape)}; expected [K, *x_T.shape] = [K, "
                f"{', '.join(map(str, self.x_T.shape))}]"
            )

    def __call__(
        self, seeds: Sequence[int], draws: Sequence[int], shape: tuple[int, ...], stream: int = NOISE
    ) -> npt.NDArray[np.float32]:
        """Recorded noise [B, *shape] float32, a copy; arguments as those of `normal`, seeds in [0, N)."""
        if stream != NOISE:
            raise RequestError(f"recorded noise holds stream {NOISE} only; got stream {stream}")
        if tuple(shape) != self.x_T.shape[1:]:
            raise RequestError(f"recorded images are {list(self.x_T.shape[1:])}; got shape {list(shape)}")
        images, steps = _integers("seed", seeds, 64), _integers("draw", draws, 32)
        _check_lengths(images, steps)
        for seed, draw in zip(images, steps, strict=True):
            if seed >= len(self.x_T):
                raise RequestError(
                    f"seed {seed} has no recorded noise; with recorded noise seeds choose one of "
                    f"{len(self.x_T)} images, 0 to {len(self.x_T) - 1}"
                )
            if draw > len(self.z):
                raise RequestError(
                    f"draw {draw} was not recorded: z holds {len(self.z)} steps, draws 1 to {len(self.z)}; "
                    "record noise for every step, or ask for fewer steps"
                )
        noise = np.empty((len(images), *shape), dtype=np.float32)
        for slot, (seed, draw) in enumerate(zip(images, steps, strict=True)):
            noise[slot] = self.x_T[seed] if draw == 0 else self.z[draw - 1, seed]
        return noise


def _philox(key0: Words, key1: Words, c0: Words, c1: Words, c2: Words, c3: Words) -> tuple[Words, Words, Words, Words]:
    """The ten rounds on 32-bit words held in uint64; Salmon et al. (2011), figure 2, with two S-P pairs."""
    half = np.uint64(32)
    for round_index in range(ROUNDS):
        if round_index:
            key0, key1 = (key0 + WEYL[0]) & LOW_WORD, (key1 + WEYL[1]) & LOW_WORD
        product0, product1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> half) ^ c1 ^ key0,
            product1 & LOW_WORD,
            (product0 >> half) ^ c3 ^ key1,
            product0 & LOW_WORD,
        )
    return c0, c1, c2, c3


def _to_uniform(word: Words) -> npt.NDArray[np.float64]:
    """u = ((word >> 9) + 0.5) * 2^-23, exact."""
    # Signed, because processors before AVX-512 convert signed integers to float much faster.
    number = (word >> np.uint64(9)).astype(np.int32).astype(np.float64)
    return (number + 0.5) * 2.0**-23


def _box_muller(w0: Words, w1: Words, w2: Words, w3: Words, out: npt.NDArray[np.float32]) -> None:
    """Four normals a counter into out [..., 4]; the words are [...]."""
    for pair, (first, second) in enumerate(((w0, w1), (w2, w3))):
        radius = np.sqrt(-2.0 * np.log(_to_uniform(first)))
        angle = (2.0 * math.pi) * _to_uniform(second)
        out[..., 2 * pair] = radius * np.cos(angle)
        out[..., 2 * pair + 1] = radius * np.sin(angle)


def _keys_and_draws(seeds: Sequence[int], draws: Sequence[int], stream: int) -> tuple[Words, Words]:
    """seeds and draws as [B] uint64, checked."""
    key, draw = _integers("seed", seeds, 64), _integers("draw", draws, 32)
    _integers("stream", [stream], 32)
    _check_lengths(key, draw)
    return np.array(key, dtype=np.uint64), np.array(draw, dtype=np.uint64)


def _integers(what: str, values: Sequence[int], bits: int) -> list[int]:
    """values as Python integers; RequestError unless each is in [0, 2**bits)."""
    numbers = []
    for value in values:
        try:
            number = operator.index(value)
        except TypeError:
            number = -1
        if not 0 <= number < 2**bits:
            raise RequestError(f"{what} is {value!r}; expected an integer, 0 <= {what} < 2**{bits}")
        numbers.append(number)
    return numbers


def _check_lengths(seeds: Sequence[int], draws: Sequence[int]) -> None:
    if len(seeds) != len(draws):
        raise RequestError(f"{len(seeds)} seeds and {len(draws)} draws; expected one draw for each seed")
