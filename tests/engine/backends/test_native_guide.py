"""A classifier's gradient on the CPU engine: its program by autograd, then on every instruction set of this machine."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import adm_classifier, adm_unet, random_network, tiny_manifest, with_classifier
from native_cases import instruction_sets, rms
from native_interpreter import run_program
from safetensors.torch import save_file
from torch import Tensor

from engine.backends.native import weight_cache as native_cache
from engine.backends.native.lowering import build_program
from engine.backends.native.native_backend import NativeBackend
from engine.backends.native.native_guide import NativeGuide, build_gradient, unsupported
from engine.backends.native.program import Form
from engine.backends.registry import open_guide
from engine.bundle.bundle_folder import Bundle
from engine.bundle.file_names import CLASSIFIER, weights_name
from engine.bundle.manifest import ClassifierEntry
from engine.errors import BackendError
from engine.networks import config as c
from engine.networks.classifier import AutogradGuide, Classifier
from kernels.native import library
from kernels.native.library import Engine, Isa, Network
from recipes.classifier_net import digits_classifier

needs_library = pytest.mark.skipif(
    library.find_library() is None, reason="the native engine was not built (no C++ compiler)"
)

# Sums in another order, through two passes, relative to the gradient's root mean square.
FP32_LIMIT = 1e-4
# Beside torch's autocast, forwards and backwards.
BF16_TO_AUTOCAST = 2.0
BF16_ROUNDING = 2**-8


def relu(config: c.ClassifierConfig) -> c.ClassifierConfig:
    """With ReLU for SiLU, and without activation at the end."""
    blocks = [
        replace(block, activation=c.Activation.RELU)
        if isinstance(block, c.ResBlock)
        else replace(block, activation=c.Activation.NONE)
        if isinstance(block, c.NormSiLU)
        else block
        for block in config.blocks
    ]
    return replace(config, blocks=tuple(blocks))


def with_block(*blocks: c.Block) -> c.ClassifierConfig:
    """Behind the first convolution, on maps of 32 channels."""
    config = adm_classifier()
    return replace(config, blocks=(config.blocks[0], *blocks, *config.blocks[1:]))


CLASSIFIERS: dict[str, c.ClassifierConfig] = {
    "plain": adm_classifier(),
    "added": adm_classifier(scale_shift=False, conv_resample=False),
    "updown": adm_classifier(updown=True, mult=(1, 2, 2), attention=(0, 1, 2)),
    "average pool": adm_classifier(attention_pool=False, depth=2),
    "colour, not square": adm_classifier(channels=3, size=(8, 12), num_classes=3),
    "odd widths": adm_classifier(width=96, head_dim=24, attention=(0, 1)),
    "four pixels": adm_classifier(size=(4, 4), num_classes=1000),
    "relu": relu(adm_classifier(mult=(1, 1))),
    "convolution first": with_block(
        c.ResBlock(32, 48, True, groups=16, conv_first=True), c.ResBlock(48, 32, True, groups=16)
    ),
    "residual of the norm": with_block(c.Attention(32, 2, 16, adds_to_norm=True)),
    "large kernel": with_block(c.Conv(32, 32, 7)),
    "digits": digits_classifier(),
}


def make(config: c.ClassifierConfig) -> Classifier:
    network = random_network(config)
    assert isinstance(network, Classifier)
    return network.eval().requires_grad_(False)


def make_inputs(config: c.ClassifierConfig, batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, timestep, y, scale; the last scale is 0."""
    rng = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, config.in_channels, *config.image_size, generator=rng)
    scale = torch.rand(batch, generator=rng) * 8
    scale[-1] = 0
    labels = torch.randint(config.num_classes, (batch,), generator=rng)
    return x_t, torch.rand(batch, generator=rng) * 999, labels, scale


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_program_is_the_gradient(name: str) -> None:
    """In float64, beside autograd."""
    config = CLASSIFIERS[name]
    network, program = make(config).double(), build_gradient(config)
    x_t, timestep, y, scale = make_inputs(config, 3)
    x = x_t.double().requires_grad_(True)
    log_p = network(x, timestep.double()).log_softmax(1)[range(3), y]
    (wanted,) = torch.autograd.grad((log_p * scale).sum(), x)
    rows = torch.cat([*network.time(timestep.double(), None), y[:, None], scale[:, None]], dim=1)
    weights = program.gather(network.state_dict())
    run = run_program(program.words(), weights, x_t.double(), rows)
    assert run.output is not None
    assert run.log_p is not None
    log_p = log_p.detach()
    assert wanted.abs().max() > 1e-6
    # Weights of the network are float32 numbers; its softmax rounds to float32 once.
    assert float((run.output - wanted).abs().max()) < 5e-6 * float(wanted.abs().max())
    assert float((run.log_p - log_p).abs().max()) < 5e-6 * float(log_p.abs().max())


def autocast_gradient(network: Classifier, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return AutogradGuide(network)(*inputs)[0].float()


@needs_library
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_on_every_instruction_set(name: str, isa: Isa) -> None:
    """Close to autograd, nothing where the scale is 0, and the same bits in a batch, alone and on one thread."""
    config = CLASSIFIERS[name]
    network, inputs = make(config), make_inputs(config, 3)
    wanted, log_p = AutogradGuide(network)(*inputs)
    guide = NativeGuide.from_weights(config, network.state_dict(), 2, isa)
    assert (guide.precision, guide.config) == (isa.precision, config)
    got, got_log_p = guide(*inputs)
    if isa.precision == "fp32":
        limit, of_log_p = FP32_LIMIT * rms(wanted), 1e-5
    else:
        limit = BF16_TO_AUTOCAST * rms(autocast_gradient(network, inputs) - wanted) + BF16_ROUNDING * rms(wanted)
        of_log_p = 2e-2
    assert rms(got - wanted) <= limit
    assert float((got_log_p - log_p).abs().max()) <= of_log_p * float(log_p.abs().max())
    assert (got[-1] == 0).all()
    alone = NativeGuide.from_weights(config, network.state_dict(), 1, isa)
    for i in range(3):
        one, one_log_p = alone(*(value[i : i + 1] for value in inputs))
        assert torch.equal(one[0], got[i])
        assert torch.equal(one_log_p[0], got_log_p[i])
    guide.close()
    alone.close()


@needs_library
def test_inputs_that_do_not_fit() -> None:
    config = adm_classifier(num_classes=3)
    guide, (x_t, timestep, y, scale) = (
        NativeGuide.from_weights(config, make(config).state_dict()),
        make_inputs(config, 2),
    )
    with pytest.raises(BackendError, match=r"x_t is \[2, 2, .*expected \[B, 1, 8, 8\] float32"):
        guide(torch.cat([x_t, x_t], 1), timestep, y, scale)
    with pytest.raises(BackendError, match=r"timestep is \[1\] torch.float32; expected \[2\] torch.float32"):
        guide(x_t, timestep[:1], y, scale)
    with pytest.raises(BackendError, match=r"label is \[2\] torch.float32; expected \[2\] torch.int64"):
        guide(x_t, timestep, y.float(), scale)
    with pytest.raises(BackendError, match=r"scale is \[2\] torch.float64"):
        guide(x_t, timestep, y, scale.double())
    with pytest.raises(BackendError, match=r"labels are \[3, 3\]; expected 0 to 2"):
        guide(x_t, timestep, torch.full_like(y, 3), scale)
    # Of an image that is not guided, the network's label for none.
    assert torch.equal(guide(x_t, timestep, torch.tensor([int(y[0]), 3]), scale)[0], guide(x_t, timestep, y, scale)[0])
    guide.close()
    with pytest.raises(BackendError, match="this classifier was closed"):
        guide(x_t, timestep, y, scale)


def test_classifiers_without_a_gradient() -> None:
    config = adm_classifier(attention_pool=False)
    first, *rest, pool = config.blocks
    narrow_pool = c.AveragePool(32, 10)

    def reason(*blocks: c.Block, size: tuple[int, int] = (8, 8)) -> str:
        found = unsupported(replace(config, blocks=blocks, image_size=size))
        assert found is not None
        assert found.startswith("the native engine has no gradient of ")
        return found.removeprefix("the native engine has no gradient of ")

    assert unsupported(config) is None
    assert reason(c.Conv(1, 10)) == "a classifier without pooling at its end"
    assert reason(first, c.Downsample(32, False), narrow_pool, size=(7, 8)) == "an average of 7x8 pixels"
    assert reason(first, c.Upsample(32, False), *rest, pool) == "its resampling nearest_up"
    assert reason(first, c.LinearAttention(32, 1, 32), *rest, pool) == "its operator linear_attention"
    assert "only of group norm" in reason(first, c.NormSiLU(32, norm=c.Norm.LAYER), *rest, pool)
    assert "blocks.1.norm: only" in reason(first, c.NormSiLU(32, activation=c.Activation.GELU), *rest, pool)
    scaled = reason(first, c.ResBlock(32, 32, True, output_scale=0.5), *rest, pool)
    assert scaled == "blocks.1.conv2, whose result is multiplied by 0.5"
    joined = reason(first, c.Push(), c.Conv(32, 32), c.Pop(), c.ResBlock(64, 32, True), *rest, pool)
    assert joined == "blocks.4.shortcut, which reads two maps at once"
    for attention in (c.Attention(32, 1, 32, memory=4), c.Attention(32, 1, 32, cosine_scale=8.0)):
        assert reason(first, attention, *rest, pool) == "attention with learned tokens or cosine scores"
    assert reason(first, c.Upsample(32, True), *rest, pool).startswith(
        "blocks.1.conv, a convolution of 3x3 pixels, mode upsampled"
    )
    assert "blocks.1, a convolution of 4x4 pixels, mode transposed" in reason(first, c.TransposedConv(32), *rest, pool)
    assert "4x4 pixels, mode plain, stride 2 and padding 1 of" in reason(first, c.Downsample(32, True, 4), *rest, pool)
    assert "3x3 pixels, mode plain, stride 2" in reason(first, c.Downsample(32, True), narrow_pool, size=(7, 8))
    assert "padding 0 of" in reason(first, c.Downsample(32, True, pads_end=True), *rest, pool)
    assert "blocks.0, a convolution of 4x4 pixels, mode plain, stride 1" in reason(c.Conv(1, 64, 4), pool)


def test_what_the_engine_does_not_have_has_no_gradient_either() -> None:
    config = adm_classifier(attention_pool=False)
    reason = unsupported(replace(config, blocks=(c.Conv(1, 64, 9), config.blocks[-1])))
    assert reason == "blocks.0 has a kernel of 9; the native engine has 1 to 7"


@needs_library
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_forward_program_alone_gives_log_p(name: str) -> None:
    """What is transposed is a program too, with a classifier's log p and the weights of its state dict, each once."""
    config = CLASSIFIERS[name]
    network, program = make(config), build_program(config)
    state = network.state_dict()
    assert {weight.form for weight in program.weights} == {Form.AS_IS}
    assert sorted(weight.name for weight in program.weights) == sorted(k for k in state if not k.startswith("time."))
    x_t, timestep, y, scale = make_inputs(config, 3)
    library_network = Network(program.words(), library.best_isa("fp32"))
    engine = Engine(library_network, library_network.pack(program.gather(state)), 1)
    rows = torch.cat([*network.time(timestep, None), y[:, None], scale[:, None]], dim=1)
    _, log_p = engine.classify(x_t.numpy(), rows.numpy())
    wanted = AutogradGuide(network)(x_t, timestep, y, scale)[1]
    assert float((torch.from_numpy(log_p) - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    engine.close()


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """One that holds a classifier's weights, and no graph of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = adm_classifier(num_classes=3)
    folder = tmp_path / "net.engine"
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in make(config).state_dict().items()}, folder / weights_name(CLASSIFIER))
    entry = ClassifierEntry(config, checkpoint_sha256="0" * 64)
    Bundle.write(folder, with_classifier(tiny_manifest(adm_unet()), entry))
    return Bundle.open(folder)


@needs_library
@pytest.mark.skipif(Isa.AVX2 not in instruction_sets(), reason="auto takes it on CPUs with AVX2")
def test_a_bundle_s_classifier(bundle: Bundle) -> None:
    """Its weights are packed once, and it runs in the precision of the U-Net beside it."""
    config = adm_classifier(num_classes=3)
    inputs = make_inputs(config, 2)
    best = instruction_sets()[-1].precision
    for precision, expected in ((None, best), ("bf16", best), ("int8", best), ("fp32", "fp32"), ("fp16", "fp32")):
        guide = open_guide(bundle, "native", precision)
        assert isinstance(guide, NativeGuide)
        assert guide.precision == expected
        again = NativeGuide.from_weights(config, make(config).state_dict(), isa=library.best_isa(expected))
        assert torch.equal(guide(*inputs)[0], again(*inputs)[0])
    assert len(list(native_cache.cache_folder().iterdir())) == len({best, "fp32"})


@needs_library
def test_threads_of_the_network_beside_it() -> None:
    """Calls from several threads to both give the bits that each gives alone, also once the network is closed."""
    config, unet = adm_classifier(num_classes=3), adm_unet()
    network = random_network(unet)
    backend = NativeBackend.from_weights(tiny_manifest(unet), network.state_dict(), 2)
    state, inputs = make(config).state_dict(), make_inputs(config, 2)
    own, _ = NativeGuide.from_weights(config, state, 2)(*inputs)
    guide = NativeGuide.from_weights(config, state, backend.engine)
    expected, wrong = backend(inputs[0], inputs[1]), []

    def call(of_network: bool) -> None:
        for _ in range(20):
            if of_network and not torch.equal(backend(inputs[0], inputs[1]), expected):
                wrong.append("network")
            if not of_network and not torch.equal(guide(*inputs)[0], own):
                wrong.append("classifier")

    threads = [threading.Thread(target=call, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    backend.close()
    assert torch.equal(guide(*inputs)[0], own)
    with pytest.raises(BackendError, match="this backend was closed"):
        NativeGuide.from_weights(config, state, backend.engine)
    guide.close()
