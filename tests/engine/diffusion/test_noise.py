"""engine.diffusion.noise against published answers, a scalar implementation, and what noise must be."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.diffusion import noise
from engine.diffusion.noise import INPAINTING, LABELS, NOISE, NoiseSource, RecordedNoise, normal, philox_words, uniform
from engine.errors import RequestError

LAST_SEED = 2**64 - 1
ANY_SEED = st.integers(0, LAST_SEED)
ANY_DRAW = st.integers(0, 2**32 - 1)


def scalar_philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox 4x32-10 on Python integers, written from the paper's text."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def scalar_normal(seed: int, draw: int, stream: int, element: int) -> float:
    """One element by the definition, in Python floats (float64)."""
    words = scalar_philox((seed % 2**32, seed >> 32), (element // 4, draw, stream, 0))
    first = 2 * (element % 4 // 2)
    u0, u1 = (((word >> 9) + 0.5) * 2.0**-23 for word in words[first : first + 2])
    wave = math.cos if element % 2 == 0 else math.sin
    return math.sqrt(-2.0 * math.log(u0)) * wave(2.0 * math.pi * u1)


# kat_vectors of Random123, the authors' own implementation: key, counter, answer.
ONES = 0xFFFFFFFF
PUBLISHED = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES), (ONES, ONES, ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "answer"), PUBLISHED, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_answers(
    key: tuple[int, int], counter: tuple[int, int, int, int], answer: tuple[int, int, int, int]
) -> None:
    words = philox_words(*key, *counter)
    assert words.dtype == np.uint32
    assert tuple(words) == answer
    assert scalar_philox(key, counter) == answer


def test_philox_broadcasts_its_arguments() -> None:
    keys, counters = [0, 7, ONES], [0, 1]
    words = philox_words(np.array(keys)[:, None], 5, np.array(counters)[None], 2, 3, ONES)
    assert words.shape == (3, 2, 4)
    for i, key in enumerate(keys):
        for j, counter in enumerate(counters):
            assert tuple(words[i, j]) == scalar_philox((key, 5), (counter, 2, 3, ONES))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, LAST_SEED])
@pytest.mark.parametrize("stream", [NOISE, INPAINTING])
def test_normal_is_its_definition(seed: int, stream: int) -> None:
    shape = (3, 5, 7)
    for draw in (0, 1, 1000, 2**32 - 1):
        got = normal([seed], [draw], shape, stream)[0].ravel()
        want = np.array([scalar_normal(seed, draw, stream, element) for element in range(math.prod(shape))])
        # One unit in the last place, for a float64 on the edge of a rounding: maths libraries may differ.
        np.testing.assert_allclose(got, want, rtol=2**-23, atol=0)
        assert np.count_nonzero(got != want.astype(np.float32)) <= 1


def test_normal_across_chunks_is_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = normal([3, 4, 5], [0, 1, 2], (3, 17, 11))
    for chunk in (1, 7, 141, 300):
        monkeypatch.setattr(noise, "CHUNK", chunk)
        np.testing.assert_array_equal(normal([3, 4, 5], [0, 1, 2], (3, 17, 11)), whole)


def test_normal_has_the_moments_of_a_standard_normal() -> None:
    x = normal(range(326), [0] * 326, (3, 32, 32)).astype(np.float64)
    n = x.size
    assert n > 1_000_000
    # Each bound is five standard errors.
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() / x.var() ** 2 - 3) < 5 * math.sqrt(24 / n)
    assert np.abs(x).max() < 5.78
    for edge in (-3, -2, -1, -0.5, 0, 0.5, 1, 2, 3):
        below = 0.5 * (1 + math.erf(edge / math.sqrt(2)))
        assert abs((x < edge).mean() - below) < 5 * math.sqrt(below * (1 - below) / n)


def test_neighbours_are_uncorrelated() -> None:
    seeds = range(100)
    by_draw = [normal(seeds, [draw] * 100, (3, 32, 32)).astype(np.float64) for draw in (0, 1, 2)]
    x = by_draw[0]
    flat = x.reshape(100, -1)
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {
        "next element": (flat[:, :-1], flat[:, 1:]),
        "next seed": (flat[:-1], flat[1:]),
        "next draw": (by_draw[0], by_draw[1]),
        "next stream": (x, normal(seeds, [0] * 100, (3, 32, 32), INPAINTING)),
        "high word of the seed": (x, normal([1 << 32 | seed for seed in seeds], [0] * 100, (3, 32, 32))),
    }
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean()) < 5 / math.sqrt(a.size), name
        assert abs((a**2 * b**2).mean() - 1) < 5 * math.sqrt(8 / a.size), name


@settings(max_examples=40, deadline=None)
@given(
    images=st.lists(st.tuples(ANY_SEED, ANY_DRAW), min_size=1, max_size=9),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    stream=st.sampled_from([NOISE, INPAINTING, LABELS]),
    data=st.data(),
)
def test_an_image_depends_on_its_own_seed_and_draw_only(
    images: list[tuple[int, int]], shape: tuple[int, int, int], stream: int, data: st.DataObject
) -> None:
    batch = normal([seed for seed, _ in images], [draw for _, draw in images], shape, stream)
    assert batch.shape == (len(images), *shape)
    assert batch.dtype == np.float32
    assert batch.flags.c_contiguous
    assert np.isfinite(batch).all()
    for slot, (seed, draw) in enumerate(images):
        assert normal([seed], [draw], shape, stream)[0].tobytes() == batch[slot].tobytes()
    order = data.draw(st.permutations(range(len(images))))
    moved = normal([images[i][0] for i in order], [images[i][1] for i in order], shape, stream)
    assert moved.tobytes() == batch[order].tobytes()


def test_a_full_size_batch_is_bit_identical_to_its_images() -> None:
    seeds = [0, 7, 2**40, LAST_SEED, *range(100, 160)]
    batch = normal(seeds, range(64), (3, 32, 32))
    for slot in (0, 1, 2, 3, 21, 22, 63):
        assert normal([seeds[slot]], [slot], (3, 32, 32))[0].tobytes() == batch[slot].tobytes()


@pytest.mark.parametrize("shape", [(1, 3, 3), (1, 1, 1), (2, 1, 3), (1, 2, 2), (6,), ()])
def test_element_index_is_flat_whatever_the_shape(shape: tuple[int, ...]) -> None:
    long = normal([11, 12], [4, 5], (1, 1, 40))
    short = normal([11, 12], [4, 5], shape)
    assert short.shape == (2, *shape)
    assert short.flags.c_contiguous
    np.testing.assert_array_equal(short.reshape(2, -1), long[:, 0, 0, : math.prod(shape)])


def test_seeds_at_both_ends_and_in_between_differ() -> None:
    seeds = [0, 1, 2**32 - 1, 2**32, 2**63, LAST_SEED]
    x = normal(seeds, [0] * len(seeds), (1, 4, 4))
    assert len({image.tobytes() for image in x}) == len(seeds)


def test_integers_of_other_libraries_are_accepted() -> None:
    seeds, draws = list(np.array([0, LAST_SEED], np.uint64)), list(np.array([0, 1]))
    x = normal(seeds, draws, (1, 2, 2))
    np.testing.assert_array_equal(x, normal([0, LAST_SEED], [0, 1], (1, 2, 2)))


def test_no_images_is_an_empty_batch() -> None:
    assert normal([], [], (3, 4, 4)).shape == (0, 3, 4, 4)
    assert uniform([], []).shape == (0,)


@pytest.mark.parametrize("source", [normal, lambda seeds, draws, shape: uniform(seeds, draws)])
@pytest.mark.parametrize(
    ("seeds", "draws", "message"),
    [
        ([0, -1], [0, 0], "seed is -1; expected an integer, 0 <= seed < 2**64"),
        ([2**64], [0], "seed is 18446744073709551616; expected an integer, 0 <= seed < 2**64"),
        ([1.5], [0], "seed is 1.5; expected an integer, 0 <= seed < 2**64"),
        (["7"], [0], "seed is '7'; expected an integer"),
        ([0], [-1], "draw is -1; expected an integer, 0 <= draw < 2**32"),
        ([0], [2**32], "draw is 4294967296; expected an integer, 0 <= draw < 2**32"),
        ([0, 1], [0], "2 seeds and 1 draws; expected one draw for each seed"),
    ],
)
def test_impossible_seeds_and_draws(source: NoiseSource, seeds: list[Any], draws: list[int], message: str) -> None:
    with pytest.raises(RequestError) as error:
        source(seeds, draws, (1, 2, 2))
    assert message in str(error.value)


def test_impossible_streams_and_shapes() -> None:
    with pytest.raises(RequestError, match=r"stream is -1; expected an integer, 0 <= stream < 2\*\*32"):
        normal([0], [0], (1, 2, 2), stream=-1)
    with pytest.raises(RequestError, match=r"noise shape \(3, 0, 4\): every size must be at least 1"):
        normal([0], [0], (3, 0, 4))
    with pytest.raises(RequestError, match=r"17179869185 elements; one image can have 2\*\*34 at most"):
        normal([0], [0], (2**34 + 1,))


def test_uniform_is_the_first_word_and_fills_the_interval() -> None:
    u = uniform(range(50_000), [0] * 50_000)
    assert u.dtype == np.float64
    assert 0 < u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * 50_000)
    counts = np.bincount((u * 10).astype(int), minlength=10)
    assert np.abs(counts - 5000).max() < 5 * math.sqrt(5000 * 0.9)
    for seed, draw in ((0, 0), (9, 3), (LAST_SEED, 2**32 - 1)):
        word = scalar_philox((seed % 2**32, seed >> 32), (0, draw, LABELS, 0))[0]
        assert uniform([seed], [draw])[0] == ((word >> 9) + 0.5) / 2**23


def test_extreme_words_stay_inside_the_open_interval() -> None:
    u = noise._to_uniform(np.array([0, ONES], np.uint64))
    assert u.tolist() == [2.0**-24, 1 - 2.0**-24]
    out = np.empty((2, 4), np.float32)
    words = np.array([0, ONES], np.uint64)
    noise._box_muller(words, words, words[::-1], words[::-1], out=out)
    assert np.isfinite(out).all()
    assert out[0, 0] == pytest.approx(math.sqrt(48 * math.log(2)), rel=1e-6)


def test_streams_and_draws_are_different_noise() -> None:
    several = [normal([5], [draw], (1, 4, 4), stream).tobytes() for draw in (0, 1, 2) for stream in (0, 1, 2)]
    assert len(set(several)) == 9


def recorded(images: int = 3, steps: int = 2) -> RecordedNoise:
    x_T = np.arange(images * 12, dtype=np.float32).reshape(images, 3, 2, 2)
    z = 1000 + np.arange(steps * images * 12, dtype=np.float32).reshape(steps, images, 3, 2, 2)
    return RecordedNoise(x_T, z)


def test_recorded_noise_replays_by_seed_and_draw() -> None:
    source: NoiseSource = recorded()
    seeds, draws = [2, 0, 1, 2], [0, 1, 2, 2]
    got = source(seeds, draws, (3, 2, 2))
    known = recorded()
    want = [known.x_T[2], known.z[0, 0], known.z[1, 1], known.z[1, 2]]
    np.testing.assert_array_equal(got, want)
    assert got.dtype == np.float32


def test_recorded_noise_is_not_changed_through_what_it_returns() -> None:
    source = recorded()
    source([0], [0], (3, 2, 2))[:] = -1
    np.testing.assert_array_equal(source.x_T, recorded().x_T)


def test_recorded_normal_equals_normal() -> None:
    shape, seeds = (3, 4, 4), [0, 1, 2, 3]
    draws = [normal(seeds, [draw] * 4, shape) for draw in range(4)]
    source = RecordedNoise(draws[0], np.stack(draws[1:]))
    for first, second in pairwise(range(4)):
        chosen = [first, second, first, second]
        np.testing.assert_array_equal(source(seeds, chosen, shape), normal(seeds, chosen, shape))


@pytest.mark.parametrize(
    ("seeds", "draws", "shape", "stream", "message"),
    [
        (
            [3],
            [0],
            (3, 2, 2),
            NOISE,
            "seed 3 has no recorded noise; with recorded noise seeds choose one of 3",
        ),
        ([-1], [0], (3, 2, 2), NOISE, "seed is -1; expected an integer, 0 <= seed < 2**64"),
        ([0], [3], (3, 2, 2), NOISE, "draw 3 was not recorded: z holds 2 steps, draws 1 to 2; record noise"),
        ([0], [-1], (3, 2, 2), NOISE, "draw is -1; expected an integer, 0 <= draw < 2**32"),
        ([0, 1], [0], (3, 2, 2), NOISE, "2 seeds and 1 draws; expected one draw for each seed"),
        ([0], [0], (3, 2, 1), NOISE, "recorded images are [3, 2, 2]; got shape [3, 2, 1]"),
        ([0], [0], (3, 2, 2), INPAINTING, "recorded noise holds stream 0 only; got stream 1"),
    ],
)
def test_what_was_not_recorded(
    seeds: list[int], draws: list[int], shape: tuple[int, ...], stream: int, message: str
) -> None:
    with pytest.raises(RequestError) as error:
        recorded()(seeds, draws, shape, stream)
    assert message in str(error.value)


def test_recorded_arrays_must_fit() -> None:
    x_T, z = recorded().x_T, recorded().z
    with pytest.raises(RequestError, match=r"x_T is float64 \[3, 3, 2, 2\]; expected float32 \[N, C, H, W\]"):
        RecordedNoise(x_T.astype(np.float64), z)
    with pytest.raises(RequestError, match=r"z is float32 \[3, 3, 2, 2\]; expected float32 \[K, N, C, H, W\]"):
        RecordedNoise(x_T, z[0])
    with pytest.raises(RequestError, match=r"recorded z is \[2, 2, 3, 2, 2\]; .* = \[K, 3, 3, 2, 2\]"):
        RecordedNoise(x_T, z[:, :2])
