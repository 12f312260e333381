"""What calibration keeps of what convolutions read, and which step it takes."""

import torch
from helpers import adm_unet, random_network

from engine.networks.inputs import Inputs
from engine.networks.unet import UNet
from export.int8.calibration import CLIPS, SAMPLES, SMALLEST, Seen, best_scale, watch_inputs


def test_the_ends_are_of_every_value_and_the_samples_of_each_call_alike():
    seen = Seen()
    large = torch.linspace(0.5, 2.0, 10 * SAMPLES).reshape(10, -1)
    large[3, 7] = 9.0
    seen.add(large)
    assert (seen.low, seen.high) == (0.0, 9.0)
    seen.add(torch.tensor([[-3.0, 1.0]]))
    assert (seen.low, seen.high) == (-3.0, 9.0)
    assert len(seen.values) == SAMPLES + 2
    assert torch.equal(seen.values[:3], large.flatten()[[0, 10, 20]])
    assert seen.values[-2:].tolist() == [-3.0, 1.0]


def test_what_a_convolution_reads_is_kept_and_the_network_is_left_as_it_was():
    unet = random_network(adm_unet(width=32))
    assert isinstance(unet, UNet)
    calls = [
        Inputs(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(i)), torch.tensor([9.0, 500]))
        for i in range(2)
    ]
    seen = watch_inputs(unet, ["blocks.0", "blocks.2.conv1"], calls)
    assert list(seen) == ["blocks.0", "blocks.2.conv1"]
    images = torch.cat([call.x_t.flatten() for call in calls])
    assert torch.equal(seen["blocks.0"].values, images)
    assert (seen["blocks.0"].low, seen["blocks.0"].high) == (float(images.min()), float(images.max()))
    unet(**calls[0].tensors())
    assert len(seen["blocks.0"].values) == len(images)


def test_the_best_scale_is_the_one_of_least_squared_error():
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    span = float(values.abs().max())

    def restore(given: torch.Tensor, scale: float) -> torch.Tensor:
        return (given / scale).round().clamp(-7, 7) * scale

    found = best_scale(values, span, 7, restore)
    errors = {clip: float((restore(values, span * clip / 7) - values).square().sum()) for clip in CLIPS}
    best = min(errors, key=errors.__getitem__)
    assert found == span * best / 7
    assert CLIPS[-1] < best < 1
    assert best_scale(torch.zeros(3), 0.0, 7, restore) == SMALLEST
