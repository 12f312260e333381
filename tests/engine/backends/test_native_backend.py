"""The CPU engine against torch, on every instruction set of this machine."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import call, in_float64, network_inputs
from helpers import adm_unet, random_network, tiny_manifest, with_unet, write_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import ADM, BLOCKS, EMPTY_LAYER, FAMILIES, instruction_sets, networks, rms

from engine.backends.native import weight_cache as native_cache
from engine.backends.native.lowering import build_program
from engine.backends.native.native_backend import NativeBackend
from engine.backends.native.program import Builder, Code, Operator
from engine.backends.registry import open_backend
from engine.bundle.bundle_folder import Bundle
from engine.errors import BackendError
from engine.networks import config as c
from engine.networks.inputs import Conditions, Inputs
from kernels.native import library
from kernels.native.library import Isa, NativeError, Network

pytestmark = [
    pytest.mark.filterwarnings(EMPTY_LAYER),
    pytest.mark.skipif(library.find_library() is None, reason="the native engine was not built (no C++ compiler)"),
]

# Both round to fp32 and add in another order: relative to the largest output.
FP32_OTHER_ORDER = 1e-4
# Beside torch's autocast, which rounds in other places; 1.17 times its error was the most that was measured.
BF16_TO_AUTOCAST = 2.0
# What rounding the input and the output once gives, relative to the output's root mean square.
BF16_ROUNDING = 2**-8


def open_network(config: c.UNetConfig, isa: Isa | None = None, threads: int = 2, seed: int = 0) -> NativeBackend:
    return NativeBackend.from_weights(tiny_manifest(config), random_network(config, seed).state_dict(), threads, isa)


def allowance(config: c.UNetConfig, inputs: Inputs, precision: str, seed: int) -> float:
    """How much further off than usual a network may be in which roundings grow, as in a norm of two equal pixels.

    By what they grow to in torch's own fp32, whose roundings are 2^-24, bf16's 2^-9.
    """
    unet = random_network(config, seed)
    with torch.no_grad():
        single = unet(**inputs.tensors())
        grown = float((single - unet.double()(**in_float64(inputs).tensors())).abs().max())
    return grown * (4 if precision == "fp32" else 2**15)


def assert_runs(config: c.UNetConfig, isa: Isa, seed: int = 0, is_drawn: bool = False) -> None:
    """Close to torch, and for each image the same bits in a batch, alone, and on one thread.

    is_drawn: the network may be one in which roundings grow, torch's too.
    """
    inputs = network_inputs(config, 3, 100, seed)
    with torch.inference_mode():
        unet = random_network(config, seed)
        expected = unet(**inputs.tensors())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = unet(**inputs.tensors()).float()
    backend = open_network(config, isa, seed=seed)
    assert backend.precision == isa.precision
    got = call(backend, inputs)
    assert got.shape == expected.shape
    more = allowance(config, inputs, isa.precision, seed) if is_drawn else 0.0
    if isa.precision == "fp32":
        assert float((got - expected).abs().max()) <= FP32_OTHER_ORDER * float(expected.abs().max()) + more
    else:
        limit = BF16_TO_AUTOCAST * rms(rounded - expected) + BF16_ROUNDING * rms(expected)
        assert rms(got - expected) <= limit + more
    alone = open_network(config, isa, threads=1, seed=seed)
    for index in range(3):
        assert torch.equal(call(alone, inputs.rows([index]))[0], got[index])
    backend.close()
    alone.close()


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("name", [*BLOCKS, *ADM])
def test_each_block_and_option(name: str, isa: Isa) -> None:
    assert_runs((BLOCKS | ADM)[name], isa)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("name", FAMILIES)
def test_networks_of_each_family(tmp_path: Path, name: str, isa: Isa) -> None:
    assert_runs(FAMILIES[name](tmp_path), isa)


@settings(max_examples=30)
@given(config=networks(), seed=st.integers(0, 99), data=st.data())
def test_networks_of_any_blocks(config: c.UNetConfig, seed: int, data: st.DataObject) -> None:
    assert_runs(config, data.draw(st.sampled_from(instruction_sets())), seed, is_drawn=True)


@pytest.mark.parametrize("isa", [isa for isa in instruction_sets() if isa.precision == "fp32"])
def test_a_large_mean_does_not_cancel(isa: Isa) -> None:
    """Group norm of values 1000 + noise, which E[x^2] - E[x]^2 could not tell from 1000."""
    config = BLOCKS["shortcut"]
    unet = random_network(config)
    state = unet.state_dict()
    state["blocks.0.bias"] = state["blocks.0.bias"] + 1e3
    unet.load_state_dict(state)
    inputs = network_inputs(config, 2, 100)
    with torch.inference_mode():
        single = unet(**inputs.tensors())
        exact = unet.double()(**in_float64(inputs).tensors())
    backend = NativeBackend.from_weights(tiny_manifest(config), state, 2, isa)
    error = (call(backend, inputs) - exact).abs().max()
    assert error <= 2 * (single - exact).abs().max()
    assert error / exact.abs().max() < 1e-2


@pytest.mark.parametrize("isa", instruction_sets())
def test_a_large_mean_does_not_cancel_in_what_is_stored(isa: Isa) -> None:
    """Group norm of multiples of 8 around 1000, which bf16 holds too, beside doubles of the same values."""
    x = 1000 + 8 * torch.randint(-3, 4, (2, 40, 9, 11), generator=torch.Generator().manual_seed(0)).float()
    weight, bias = torch.linspace(0.5, 2, 40), torch.linspace(-1, 1, 40)
    builder = Builder()
    src, dst = (builder.new_map(40, 9, 11) for _ in range(2))
    places = [builder.weight(name, 40) for name in ("weight", "bias")]
    builder.emit(Operator(Code.INPUT, src))
    builder.emit(Operator(Code.NORM, dst, (src,), weight=places[0], bias=places[1], groups=4, eps=1e-5))
    program = builder.build(40, 0, dst)
    network = Network(program.words(), isa)
    packed = network.pack(program.gather({"weight": weight, "bias": bias}))
    got = torch.from_numpy(library.Engine(network, packed, 2).run(x.numpy(), None))
    exact = torch.nn.functional.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-5)
    # An ulp of 1000 in float32, over a deviation of 16, times a weight of 2.
    of_mean = 2 * 2**-14 / 16
    rounding = 2**-8 if isa.precision == "bf16" else 2**-22
    assert ((got - exact).abs() <= rounding * exact.abs() + of_mean).all()


def test_calls_from_several_threads_and_engines() -> None:
    config = adm_unet(num_classes=3)
    inputs = network_inputs(config, 4, 100)
    engines = [open_network(config), open_network(config, threads=3)]
    expected, wrong = call(engines[0], inputs), []

    def repeat(engine: NativeBackend, index: int) -> None:
        for _ in range(5):
            if not torch.equal(call(engine, inputs.rows([index]))[0], expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=repeat, args=(engines[i % 2], i)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_does_not_fit_the_network() -> None:
    config = adm_unet(num_classes=3)
    backend, inputs = open_network(config), network_inputs(config, 2, 100)
    x, timestep, given = inputs.x_t, inputs.timestep, inputs.conditions
    with pytest.raises(BackendError, match=r"x_t is \[2, 2, .*expected \[B, 1, "):
        backend(torch.cat([x, x], 1), timestep, given)
    with pytest.raises(BackendError, match=r"x_t is .*float64; expected .* float32"):
        backend(x.double(), timestep, given)
    with pytest.raises(BackendError, match="x_t has 2 images and timestep 1"):
        backend(x, timestep[:1], given)
    with pytest.raises(BackendError, match=r"labels are \[3, 3\]; expected 0 to 2"):
        backend(x, timestep, Conditions(torch.full_like(given.label, 3)))
    with pytest.raises(BackendError, match="expected .* float32"):
        backend(x, timestep.double(), given)
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend(x, timestep, given)
    with pytest.raises(BackendError, match="threads are 0; expected 1 to 1024"):
        open_network(config, threads=0)


def test_a_profile_has_the_time_of_every_operator() -> None:
    config = adm_unet(mult=(1,))
    program = build_program(config)
    network = Network(program.words())
    packed = network.pack(program.gather(random_network(config).state_dict()))
    engine = library.Engine(network, packed, 2)
    x = np.ones((2, 1, *config.image_size), np.float32)
    rows = np.ones((2, program.row_width), np.float32)
    out, seconds = engine.profile(x, rows)
    assert np.array_equal(out, engine.run(x, rows))
    assert seconds.shape == (len(program.operators),)
    assert (seconds > 0).all()
    assert seconds.sum() < 60


def test_weights_of_another_program() -> None:
    small = Network(build_program(adm_unet(mult=(1,))).words())
    with pytest.raises(NativeError, match="weights: got 1, expected"):
        small.pack(np.zeros(1, np.float32))
    with pytest.raises(NativeError, match="packed weights: got 64, expected"):
        library.Engine(small, library.empty_packed(64), 1)
    with pytest.raises(NativeError, match="these words are no program"):
        Network(np.zeros(40, np.int32))


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Bundle.open(write_bundle(tmp_path / "bundle", adm_unet(mult=(1,), num_classes=3)))


def packed_file() -> Path:
    (path,) = native_cache.cache_folder().iterdir()
    return path


def test_weights_are_packed_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in bundle.path.iterdir())
    inputs = network_inputs(bundle.manifest.unet.config, 2, 100)
    first = call(NativeBackend.open(bundle), inputs)
    written = packed_file().stat().st_mtime_ns
    monkeypatch.setattr("engine.backends.native.native_backend._pack_bundle", lambda *_: pytest.fail("packed again"))
    assert torch.equal(call(NativeBackend.open(bundle), inputs), first)
    assert packed_file().stat().st_mtime_ns == written
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in bundle.path.iterdir())


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "magic bytes": lambda path: flip(path, 0),
    "format": lambda path: flip(path, 8),
    "the header": lambda path: flip(path, 40),
    "crc32 of label.weight": lambda path: flip(path, path.read_bytes().index(b"}}") + 8),
    "the packed weights": lambda path: flip(path, -1),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:15]),
    "bytes; its header says": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "does not begin": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_damaged_packed_files_are_refused_and_made_again(
    bundle: Bundle, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    inputs = network_inputs(bundle.manifest.unet.config, 1, 100)
    expected = call(NativeBackend.open(bundle), inputs)
    whole = packed_file().read_bytes()
    DAMAGES[reason](packed_file())
    with caplog.at_level(logging.WARNING):
        assert torch.equal(call(NativeBackend.open(bundle), inputs), expected)
    assert reason in caplog.text
    assert packed_file().read_bytes() == whole


def test_a_cache_that_cannot_be_written(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    folder = native_cache.cache_folder()
    folder.parent.mkdir(parents=True)
    folder.write_bytes(b"a file where the folder should be")
    inputs = network_inputs(bundle.manifest.unet.config, 1, 100)
    with caplog.at_level(logging.WARNING):
        assert call(NativeBackend.open(bundle), inputs).isfinite().all()
    assert "not kept for the next time" in caplog.text


@pytest.mark.skipif(Isa.AVX2 not in instruction_sets(), reason="auto takes it on CPUs with AVX2")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU auto takes eager before it")
def test_auto_takes_it_and_says_why_not(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.INFO):
        backend = open_backend(bundle)
    assert (backend.name, backend.precision) == ("native", "bf16" if Isa.AVX512_BF16 in instruction_sets() else "fp32")
    isa = library.best_isa(backend.precision).name.lower()
    assert f"backend native in {backend.precision} (first of native, ov, ort, eager, trt)" in caplog.messages
    assert f"backend native computes with {isa} instructions" in caplog.messages
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with caplog.at_level(logging.INFO):
        assert open_backend(bundle).name == "eager"
    assert "native: UNETRT_NATIVE_LIBRARY names" in caplog.text
    with pytest.raises(BackendError, match="native"):
        open_backend(bundle, "native")


def test_a_network_that_it_does_not_have(bundle: Bundle) -> None:
    config = replace(bundle.manifest.unet.config, blocks=(c.Conv(1, 1, 9),))
    with pytest.raises(BackendError, match="has a kernel of 9"):
        NativeBackend.from_weights(with_unet(bundle.manifest, config=config), {})
