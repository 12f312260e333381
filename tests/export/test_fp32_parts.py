"""Which parts of a network its float16 form leaves in float32, and what that does to its float16 form."""

import pytest
import torch
from helpers import adm_unet, random_network, tiny_manifest, with_unet

from engine.backends.eager.eager_backend import EagerBackend
from engine.networks import config as c
from engine.networks.half import cast_unet, norm_names
from engine.networks.inputs import Inputs
from engine.networks.unet import UNet
from export.fp32_parts import LARGEST, find_fp32_parts, stream_writers, watch
from export.precision import GpuHalf, Precision, typed_unet
from export.verify import LIMITS, Difference

CONFIG = adm_unet(width=32, scale_shift=False)
FIRST = 2  # the first ResBlock


def network(config: c.UNetConfig = CONFIG) -> UNet:
    """A random U-Net whose first ResBlock the tests change."""
    unet = random_network(config)
    assert isinstance(unet, UNet)
    assert isinstance(config.blocks[FIRST], c.ResBlock)
    return unet.eval().requires_grad_(False)


def cases() -> list[Inputs]:
    generator = torch.Generator().manual_seed(1)
    return [Inputs(torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([999.0, t])) for t in (0, 500)]


def names(unet: UNet) -> dict[str, str]:
    return {part.name: part.reason for part in find_fp32_parts(unet, cases())}


def fp16_error(unet: UNet, parts: list[str]) -> float:
    """Of the float16 network with these parts in float32, as a GPU rounds it, relative to the output's rms."""
    typed, difference = typed_unet(unet, Precision.FP16, parts), Difference()
    for inputs in cases():
        with torch.no_grad(), GpuHalf():
            difference.add(typed(**inputs.tensors()), unet(**inputs.tensors()))
    return difference.relative


def test_a_sane_network_is_fp16_throughout():
    unet = network()
    assert names(unet) == {}
    assert fp16_error(unet, []) < LIMITS["fp16"]


def test_watching_leaves_no_trace():
    unet = network()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    ranges = watch(unet, cases())
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert not any(module._forward_hooks or "operators" in module.__dict__ for module in unet.modules())
    convolutions = {name for name, m in unet.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
    assert convolutions <= set(ranges.peaks)
    assert set(ranges.norm_peaks) == set(ranges.rounding) == set(norm_names(unet))
    with torch.no_grad():
        largest = max(float(unet(**inputs.tensors()).abs().max()) for inputs in cases())
    assert ranges.peaks[f"blocks.{len(unet.blocks) - 1}"].value >= largest


def test_a_block_that_overflows_stays_in_fp32():
    unet = network()
    unet.blocks[FIRST].conv1.weight *= 1e5
    parts = names(unet)
    assert list(parts) == [f"blocks.{FIRST}"]
    assert "conv1 reaches" in parts[f"blocks.{FIRST}"]
    assert "at timestep" in parts[f"blocks.{FIRST}"]
    assert "fp16 ends at 65504" in parts[f"blocks.{FIRST}"]
    assert fp16_error(unet, []) == float("inf")
    assert fp16_error(unet, list(parts)) < LIMITS["fp16"]


def test_a_residual_stream_that_overflows_stays_in_fp32():
    """The block that writes it, every block that reads it, and the skip connection between them."""
    unet = network()
    unet.blocks[FIRST].conv2.weight *= 1e5
    parts = names(unet)
    assert fp16_error(unet, []) == float("inf")
    assert fp16_error(unet, list(parts)) < LIMITS["fp16"]
    typed = typed_unet(unet, Precision.FP16, parts)
    readers = {i for i, writers in enumerate(stream_writers(CONFIG.blocks)) if FIRST in writers}
    computing = {i for i in readers if list(typed.blocks[i].parameters())}
    assert {FIRST} | computing <= {i for i, dtype in enumerate(typed.types) if dtype is torch.float32}
    assert torch.float16 in typed.types


def test_a_weight_beyond_fp16_stays_in_fp32():
    unet = network()
    unet.blocks[FIRST].conv1.weight[0, 0, 0, 0] = 1e5
    parts = names(unet)
    assert f"blocks.{FIRST}" in parts
    assert "conv1 reaches" in parts[f"blocks.{FIRST}"]
    assert fp16_error(unet, list(parts)) < LIMITS["fp16"]


def test_a_time_embedding_that_overflows_stays_in_fp32():
    unet = network()
    unet.time.linear1.weight *= 1e5
    unet.time.linear2.weight *= 1e-5
    parts = names(unet)
    assert list(parts) == ["time"]
    assert fp16_error(unet, []) == float("inf")
    assert fp16_error(unet, ["time"]) < LIMITS["fp16"]


def test_a_norm_whose_input_rounding_ruins_stays_in_fp32():
    """A mean of 3000 beside a deviation of order 1: float16's steps there are 2."""
    unet = network()
    unet.blocks[FIRST].conv1.bias += 3000
    parts = names(unet)
    assert list(parts) == [f"blocks.{FIRST}"]
    assert f"rounding the input of blocks.{FIRST}.norm2 to fp16 moves" in parts[f"blocks.{FIRST}"]
    assert fp16_error(unet, list(parts)) < min(LIMITS["fp16"], 0.2 * fp16_error(unet, []))


def test_rounding_on_the_stream_concerns_its_writer_too():
    unet = network()
    unet.blocks[0].bias += 3000
    parts = names(unet)
    reason = f"rounding the input of blocks.{FIRST}.norm1 to fp16 moves"
    assert reason in parts["blocks.0"]
    assert reason in parts[f"blocks.{FIRST}"]
    assert fp16_error(unet, list(parts)) < fp16_error(unet, [])


def test_a_norm_whose_squares_overflow_is_form_c():
    unet = network()
    unet.blocks[FIRST].conv1.weight *= 1e3
    unet.blocks[FIRST].conv1.bias *= 1e3
    norm = f"blocks.{FIRST}.norm2"
    parts = names(unet)
    assert list(parts) == [norm]
    assert "whose square is beyond" in parts[norm]
    typed = typed_unet(unet, Precision.FP16, parts)
    assert typed.blocks[FIRST].norm2.weight.dtype == torch.float32
    assert typed.blocks[FIRST].conv2.weight.dtype == torch.float16
    assert typed.types[FIRST] is torch.float16
    assert fp16_error(unet, list(parts)) < LIMITS["fp16"]


@pytest.mark.parametrize("scale_shift", [False, True], ids=["added", "scale-shift"])
def test_bf16_rounds_norm_and_silu_once(scale_shift):
    unet = network(adm_unet(width=32, scale_shift=scale_shift))
    typed, plain = (typed_unet(unet, Precision.BF16, names) for names in (norm_names(unet), ()))
    errors = []
    for candidate in (typed, plain):
        difference = Difference()
        for inputs in cases():
            with torch.no_grad(), GpuHalf():
                difference.add(candidate(**inputs.tensors()), unet(**inputs.tensors()))
        errors.append(difference.relative)
    assert 1e-3 < errors[0] < errors[1] < LIMITS["bf16"]


def test_every_part_can_be_named():
    """In float32 but for one block, which is as good as float32 and the block in float16."""
    unet = network()
    everything = [name for name, _ in unet.named_modules() if name == "time" or name.count(".") == 1]
    all_parts = [name for name in everything if name == "time" or name.startswith("blocks.")]
    assert fp16_error(unet, all_parts) == 0
    all_parts.remove(f"blocks.{FIRST}")
    assert 0 < fp16_error(unet, all_parts) < fp16_error(unet, [])


def test_stream_writers():
    blocks = (
        c.Conv(1, 8), c.Push(), c.NormSiLU(8, 4), c.Downsample(8, False), c.Push(), c.Conv(8, 8), c.Pop(),
        c.Conv(16, 8), c.Pop(), c.Conv(16, 1),
    )  # fmt: skip
    expected = [(), (0,), (0,), (2,), (2,), (2,), (5,), (5, 2), (7,), (7, 0)]
    assert stream_writers(blocks) == expected


def test_eager_takes_the_parts_from_the_manifest():
    unet = network()
    unet.blocks[FIRST].conv1.weight *= 1e5
    manifest = with_unet(tiny_manifest(CONFIG), fp32_parts=((f"blocks.{FIRST}", "conv1 reaches 1e+06"),))
    inputs = cases()[0]
    with torch.no_grad():
        wanted = unet(**inputs.tensors())
    backend = EagerBackend(manifest, unet, "fp16", None)
    with GpuHalf():
        result = backend(inputs.x_t, inputs.timestep)
    assert float((result - wanted).abs().max()) < LIMITS["fp16"] * float(wanted.abs().max())
    assert float(unet.blocks[FIRST].conv1.weight.abs().max()) > LARGEST / 10


def test_casting_to_float32_changes_nothing():
    unet, inputs = network(), cases()[0]
    with torch.no_grad():
        before = unet(**inputs.tensors())
        assert torch.equal(cast_unet(unet, torch.float32)(**inputs.tensors()), before)
