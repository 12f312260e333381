"""8-bit convolutions on the CPU engine: beside their definition, in every block, chosen at export, from a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exported import call, in_float64, network_inputs
from helpers import adm_unet, random_network, tiny_manifest, write_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import ADM, BLOCKS, EMPTY_LAYER, between, instruction_sets, network, networks, res, rms
from native_interpreter import run_program
from torch import Tensor

from engine.backends.native.byte_ranges import ByteRange, find_candidates, read_ranges, with_int8, write_ranges
from engine.backends.native.lowering import build_program
from engine.backends.native.native_backend import NativeBackend
from engine.backends.native.program import Builder, Code, MapShape, Operator, Program
from engine.backends.registry import open_backend
from engine.bundle.bundle_folder import Bundle
from engine.bundle.file_names import UNET, ranges_name
from engine.errors import BackendError, ExportError
from engine.networks import config as c
from engine.networks.inputs import Inputs
from export.int8 import native_int8
from export.int8.native_int8 import best_range, calibrate, choose_int8, int8_convolutions
from export.subject import real_cases
from kernels import reference as ops
from kernels.native import library
from kernels.native.library import Isa, NativeError, Network

pytestmark = pytest.mark.filterwarnings(EMPTY_LAYER)


BF16_SETS = [isa for isa in instruction_sets() if isa.precision == "bf16"]
needs_bf16 = pytest.mark.skipif(not BF16_SETS, reason="int8 needs a CPU and a library with bf16")


def candidates_of(config: c.UNetConfig) -> tuple[str, ...]:
    return tuple(find_candidates(build_program(config)))


def ranges_of(config: c.UNetConfig, inputs: Inputs, seed: int = 0) -> dict[str, ByteRange]:
    return calibrate(random_network(config, seed), candidates_of(config), [inputs])


NAMES = [name for name, config in (BLOCKS | ADM).items() if candidates_of(config)]


def one_convolution(channels: int, out: int, size: tuple[int, int], has_more: bool) -> Program:
    """Bytes of the input, a convolution of them, and with has_more a row, a 1x1 convolution and the input added."""
    builder = Builder()
    src = builder.new_map(channels, *size)
    builder.emit(Operator(Code.INPUT, src))
    normed, dst = builder.new_map(channels, *size), builder.new_map(out, *size)
    builder.emit(Operator(Code.NORM, normed, (src,), kind=4))
    operator = Operator(
        Code.CONV, dst, (normed,), kernel=3, stride=1, pad=1,
        weight=builder.weight("a.conv1.weight", out, channels, 3, 3), bias=builder.weight("bias", out),
        row=1 if has_more else -1, extra=(src,) if has_more else (), scale=0.5,
        extra_weight=builder.weight("extra", out, channels) if has_more else -1,
    )  # fmt: skip
    builder.emit(operator)
    return builder.build(channels, out + 1, dst, ["a.conv1"])


def assert_exact(isa: Isa, program: Program, found: ByteRange, batch: int, seed: int) -> None:
    """Inputs that bytes hold, beyond their range too: nothing is rounded but the weights, the extra and the result."""
    rng, given, conv = np.random.default_rng(seed), program.maps[0], program.operators[2]
    out, shape = program.maps[conv.dst].channels, (batch, given.channels, given.height, given.width)
    # Whole numbers that bfloat16 holds.
    x = torch.from_numpy(rng.integers(-256, 257, shape) * found.scale).float()
    rows = torch.from_numpy(rng.standard_normal((batch, out + 1))).float()
    weights = {w.name: torch.from_numpy(rng.standard_normal(w.shape)).float() for w in program.weights}
    got = run_native(with_int8(program, {"a.conv1": found}), isa, weights, x, rows)
    levels = ops.channel_levels(weights["a.conv1.weight"]).double()
    expected = F.conv2d(ops.bytes_of(x.double(), found.scale, found.zero), levels, padding=1)
    expected = expected + weights["bias"].double()[:, None, None]
    added = torch.zeros_like(expected)
    if conv.extra:
        added = F.conv2d(x.double(), weights["extra"].bfloat16().double()[:, :, None, None])
        expected = expected + rows[:, 1:, None, None].double()
    # Half a unit of bf16's eight bits of the extra, before it is added, and of the result; sums in float32 beside it.
    rounding = 2**-8 * ((expected + added).abs() + added.abs()) + 1e-5 * expected.abs().max()
    assert ((got - (expected + added) * 0.5).abs() <= rounding).all()


@needs_bf16
@pytest.mark.parametrize("isa", BF16_SETS)
@pytest.mark.parametrize("has_more", [False, True])
@pytest.mark.parametrize(("channels", "out"), [(3, 5), (40, 33), (64, 64), (70, 100), (130, 20)])
def test_sums_are_exact(isa: Isa, channels: int, out: int, has_more: bool) -> None:
    assert_exact(isa, one_convolution(channels, out, (5, 7), has_more), ByteRange(2.0**-5, 30), 3, 0)


@needs_bf16
@settings(max_examples=40)
@given(
    channels=st.integers(1, 200), out=st.integers(1, 80), height=st.integers(1, 12), width=st.integers(1, 33),
    batch=st.integers(1, 4), has_more=st.booleans(), exponent=st.integers(-9, 3), zero=st.integers(0, 255),
    data=st.data(),
)  # fmt: skip
def test_sums_of_any_shape_are_exact(
    channels: int, out: int, height: int, width: int, batch: int, has_more: bool, exponent: int, zero: int,
    data: st.DataObject,
) -> None:  # fmt: skip
    program = one_convolution(channels, out, (height, width), has_more)
    assert_exact(data.draw(st.sampled_from(BF16_SETS)), program, ByteRange(2.0**exponent, zero), batch, channels)


def run_native(program: Program, isa: Isa, weights: dict[str, Tensor], x: Tensor, rows: Tensor) -> Tensor:
    net = Network(program.words(), isa)
    engine = library.Engine(net, net.pack(program.gather(weights)), 2)
    assert net.precision == "int8"
    return torch.from_numpy(engine.run(x.numpy(), rows.numpy()))


@needs_bf16
@pytest.mark.parametrize("isa", BF16_SETS)
def test_what_no_byte_holds(isa: Isa) -> None:
    """Values far outside are held at the ends of the range; weights that are zeros or no numbers stay that."""
    program = with_int8(one_convolution(2, 3, (1, 1), False), {"a.conv1": ByteRange(1.0, 5)})
    weight = torch.zeros(3, 2, 3, 3)
    weight[0, 0, 1, 1] = weight[2, 0, 1, 1] = 1.0
    weight[2, 1, 0, 0] = torch.nan
    x = torch.tensor([1e30, -1e30, 3e9, -3e9, torch.inf, -torch.inf, 100.0]).reshape(7, 1, 1, 1).expand(7, 2, 1, 1)
    weights = {"a.conv1.weight": weight, "bias": torch.zeros(3)}
    got = run_native(program, isa, weights, x.contiguous(), torch.zeros(7, 4))
    assert got[:, 0].flatten().tolist() == [125.0, -2.5, 125.0, -2.5, 125.0, -2.5, 50.0]
    assert (got[:, 1] == 0).all()
    assert got[:, 2].isnan().all()


def assert_runs(config: c.UNetConfig, isa: Isa, seed: int = 0) -> None:
    """As close to fp32 as 8 bits in torch and bf16 in torch's autocast are."""
    inputs = network_inputs(config, 3, 100, seed)
    ranges, unet = ranges_of(config, inputs, seed), random_network(config, seed)
    with torch.inference_mode():
        exact = unet(**inputs.tensors())
        with torch.autocast("cpu", torch.bfloat16):
            half = unet(**inputs.tensors()).float()
        with int8_convolutions(unet, ranges):
            eighth = unet(**inputs.tensors())
    limit = 2 * (rms(half - exact) + rms(eighth - exact)) + 2**-8 * rms(exact)
    assert rms(run_alone_and_together(config, isa, ranges, seed) - exact) <= limit


def run_alone_and_together(config: c.UNetConfig, isa: Isa, ranges: dict[str, ByteRange], seed: int) -> Tensor:
    """The engine's results for a batch, which for each image are the same bits alone and on one thread."""
    inputs, state = network_inputs(config, 3, 100, seed), random_network(config, seed).state_dict()
    manifest = tiny_manifest(config)
    backend = NativeBackend.from_weights(manifest, state, 2, isa, ranges)
    assert backend.precision == "int8"
    got = call(backend, inputs)
    alone = NativeBackend.from_weights(manifest, state, 1, isa, ranges)
    for i in range(3):
        assert torch.equal(call(alone, inputs.rows([i]))[0], got[i])
    backend.close()
    alone.close()
    return got


@needs_bf16
@pytest.mark.parametrize("isa", BF16_SETS)
@pytest.mark.parametrize("name", NAMES)
def test_each_block_and_option(name: str, isa: Isa) -> None:
    assert_runs((BLOCKS | ADM)[name], isa)


@needs_bf16
@settings(max_examples=15)
@given(config=networks().filter(candidates_of), seed=st.integers(0, 99), data=st.data())
def test_networks_of_any_blocks(config: c.UNetConfig, seed: int, data: st.DataObject) -> None:
    """A norm of a few equal pixels makes any error large, so that only bits are compared."""
    ranges = ranges_of(config, network_inputs(config, 3, 100, seed), seed)
    got = run_alone_and_together(config, data.draw(st.sampled_from(BF16_SETS)), ranges, seed)
    assert got.isfinite().all()


@pytest.mark.parametrize("name", ["res block", "shortcut", "scale and shift", "groups out", "conv first group, to 12"])
def test_a_program_with_bytes_is_the_network_with_8_bit_convolutions(name: str) -> None:
    """Both in float64, where rounding to a byte goes the same way."""
    config = BLOCKS[name]
    inputs = in_float64(network_inputs(config, 2, 100))
    unet = random_network(config).double()
    ranges = calibrate(unet, candidates_of(config), [inputs])
    program = with_int8(build_program(config), ranges)
    rows = torch.cat(unet.time(inputs.timestep, None), dim=1)
    weights = program.gather(unet.state_dict())
    got = run_program(program.words(), weights, inputs.x_t, rows).output
    stored = {key: ByteRange(float(np.float32(r.scale)), r.zero) for key, r in ranges.items()}
    with torch.no_grad(), int8_convolutions(unet, stored):
        expected = unet(**inputs.tensors())
    assert float((got - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    assert float((unet(**inputs.tensors()) - expected).abs().max()) > 1e-4 * float(expected.abs().max())


def test_what_can_be_in_int8() -> None:
    """Convolutions that alone read what a norm writes; behind a resampling, and at the network's ends, they do not."""
    assert candidates_of(between(res(8, 12), end=12)) == ("blocks.1.conv1", "blocks.1.conv2")
    assert candidates_of(between(res(resample=c.Resample.DOWN))) == ("blocks.1.conv2",)
    assert candidates_of(between(res(resample=c.Resample.UP))) == ("blocks.1.conv2",)
    assert candidates_of(between(c.NormSiLU(8, 4))) == ()
    assert candidates_of(between(res(norm=c.Norm.NONE, activation=c.Activation.NONE))) == ()
    wide = network(c.Conv(3, 8000, 1), c.ResBlock(8000, 8, False, groups=8), c.Conv(8, 3))
    assert candidates_of(wide) == ("blocks.1.conv2",)


def test_names_that_cannot_be_in_int8() -> None:
    program = build_program(BLOCKS["res block"])
    with pytest.raises(BackendError, match=r"blocks.0 cannot be computed in int8: .*--native-int8"):
        with_int8(program, {"blocks.0": ByteRange(1.0, 0)})
    assert with_int8(program, {}) == program
    assert not any(shape.scale for shape in program.maps)


@pytest.mark.skipif(library.find_library() is None, reason="the native engine was not built (no C++ compiler)")
def test_programs_that_the_library_refuses() -> None:
    config = BLOCKS["res block"]
    with pytest.raises(BackendError, match="instruction set portable has no bytes; take bf16"):
        NativeBackend.from_weights(tiny_manifest(config), {}, 1, Isa.PORTABLE, {"blocks.1.conv1": ByteRange(1.0, 0)})
    program = build_program(config)
    for index, shape in enumerate(program.maps):
        maps = list(program.maps)
        maps[index] = MapShape(shape.channels, shape.height, shape.width, 1.0, 3)
        words = Program(3, 3, program.row_width, tuple(maps), program.operators, program.weights).words()
        with pytest.raises(NativeError, match="bytes"):
            Network(words, Isa.PORTABLE)
    bad = (0.0, 1, "zero of a map is 1"), (-1.0, 0, "scale of a map"), (1.0, 256, "zero of a map")
    for scale, zero, reason in bad:
        maps = [MapShape(8, 6, 10, scale, zero), *program.maps[1:]]
        words = Program(3, 3, program.row_width, tuple(maps), program.operators, program.weights).words()
        with pytest.raises(NativeError, match=reason):
            Network(words, Isa.PORTABLE)


def test_a_file_of_ranges(tmp_path: Path) -> None:
    path = tmp_path / ranges_name(UNET)
    ranges = {"blocks.1.conv1": ByteRange(0.0123, 17), "blocks.1.conv2": ByteRange(3.0, 0)}
    write_ranges(path, ranges)
    assert read_ranges(path) == ranges
    good = json.loads(path.read_text())
    entry = {"scale": 1.0, "zero": 0}
    for bad, reason in (
        ("[]", "holds no ranges"),
        ("{", "holds no ranges"),
        (json.dumps(good | {"format": 2}), "has format 2; this version reads 1"),
        (json.dumps(good | {"convolutions": {"a": entry | {"scale": 0}}}), "a scale is 0.0; expected a positive"),
        (json.dumps(good | {"convolutions": {"a": entry | {"scale": "NaN"}}}), "a scale is nan"),
        (json.dumps(good | {"convolutions": {"a": entry | {"zero": 256}}}), "a zero is 256; expected 0 to 255"),
        (json.dumps(good | {"convolutions": {"a": entry | {"zero": 1.5}}}), "a zero is 1.5"),
        (json.dumps(good | {"convolutions": {"a": {"zero": 1}}}), "holds no ranges .*scale"),
        (json.dumps(good | {"convolutions": [1]}), "holds no ranges"),
    ):
        path.write_text(bad)
        with pytest.raises(BackendError, match=reason):
            read_ranges(path)
    with pytest.raises(BackendError, match="holds no ranges"):
        read_ranges(tmp_path / "none.json")


def test_the_best_range() -> None:
    """Of an activation's values the few largest are worth less than finer steps; of two values both ends are kept."""
    values = F.silu(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    low, high = float(values.min()), float(values.max())
    clipped = best_range(values, low, high)
    assert 255 * clipped.scale < 0.96 * (high - low)
    assert clipped.zero == round(-low / clipped.scale)
    whole = ops.bytes_of(values, (high - low) / 255, round(-low / (high - low) * 255))
    assert rms(ops.bytes_of(values, clipped.scale, clipped.zero) - values) < rms(whole - values)
    ends = best_range(torch.tensor([-1.0, 3.0]), -1.0, 3.0)
    assert ends == ByteRange(4 / 255, 64)
    assert best_range(torch.zeros(3), 0.0, 0.0).zero == 0


CONFIG = adm_unet(width=32, num_classes=3)


@pytest.fixture(scope="module")
def chosen():
    unet = random_network(CONFIG)
    return choose_int8(unet, real_cases(unet, tiny_manifest(CONFIG)))


def test_the_choice_keeps_the_limit(chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the limit, with some in bf16 where it is tight; a looser limit takes more, none takes all."""
    unet = random_network(CONFIG)
    cases = real_cases(unet, tiny_manifest(CONFIG))
    counts = {}
    for limit in (0.0, 0.004, 1.0):
        monkeypatch.setattr(native_int8, "NETWORK_LIMIT", limit)
        choice = choose_int8(unet, cases)
        assert {*choice.ranges, *choice.left} == set(candidates_of(CONFIG))
        with torch.no_grad():
            exact = torch.cat([unet(**case.tensors()) for case in cases])
            with int8_convolutions(unet, choice.ranges):
                got = torch.cat([unet(**case.tensors()) for case in cases])
        assert rms(got - exact) <= limit * float(exact.std()) + 1e-6
        assert choice.measurement.rms == pytest.approx(rms(got - exact), abs=1e-6)
        counts[limit] = len(choice.ranges)
    assert 0 == counts[0.0] < counts[0.004] < counts[1.0] == len(candidates_of(CONFIG))
    assert counts[0.004] <= len(chosen.ranges)


def test_a_network_without_such_convolutions() -> None:
    config = network(c.Conv(3, 3))
    unet = random_network(config)
    with pytest.raises(ExportError, match="no 3x3 convolution of a ResBlock behind a norm; leave --native-int8 out"):
        choose_int8(unet, real_cases(unet, tiny_manifest(config)))


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen) -> Bundle:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_bundle(tmp_path / "bundle", CONFIG)
    write_ranges(path / ranges_name(UNET), chosen.ranges)
    Bundle.write(path, tiny_manifest(CONFIG))
    return Bundle.open(path)


@needs_bf16
def test_a_bundle_opens_in_int8_where_asked(bundle: Bundle, chosen) -> None:
    inputs = network_inputs(CONFIG, 2, 100)
    backend = open_backend(bundle, "native", "int8")
    assert (backend.name, backend.precision) == ("native", "int8")
    state = random_network(CONFIG).state_dict()
    isa = library.best_isa("int8")
    expected = call(NativeBackend.from_weights(bundle.manifest, state, 2, isa, chosen.ranges), inputs)
    assert torch.equal(call(backend, inputs), expected)
    assert torch.equal(call(open_backend(bundle, "native", "int8"), inputs), expected)
    assert open_backend(bundle).precision == "bf16"
    assert not torch.equal(call(open_backend(bundle, "native", "bf16"), inputs), expected)


@needs_bf16
def test_a_bundle_without_ranges_or_with_others(tmp_path: Path, bundle: Bundle) -> None:
    plain = write_bundle(tmp_path / "plain", CONFIG)
    with pytest.raises(BackendError, match=r"native: the bundle holds no unet.int8.json"):
        open_backend(plain, "native", "int8")
    write_ranges(bundle.path / ranges_name(UNET), {"blocks.0": ByteRange(1.0, 0)})
    Bundle.write(bundle.path, tiny_manifest(CONFIG))
    with pytest.raises(BackendError, match="blocks.0 cannot be computed in int8"):
        open_backend(bundle.path, "native", "int8")
