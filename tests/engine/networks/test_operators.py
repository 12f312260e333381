"""engine.networks.operators: a network on the Triton kernels is the network on the reference."""

from __future__ import annotations

import pytest
import torch
from helpers import adm_unet, random_network
from triton_cases import DEVICE, largest_error

from engine.backends.eager.eager_backend import fuse
from engine.networks.blocks.self_attention import AttentionModule
from engine.networks.config import UNetConfig
from engine.networks.half import cast_unet
from engine.networks.layers import Normalise
from engine.networks.operators import REFERENCE, TritonOperators
from engine.networks.unet import UNet

pytest.importorskip("triton")

CONFIGS = [
    pytest.param(adm_unet(), id="scale-shift"),
    pytest.param(adm_unet(scale_shift=False, head_dim=16, updown=True), id="added-projection"),
]


def pair(config: UNetConfig) -> tuple[UNet, UNet]:
    plain, fused = random_network(config).to(DEVICE).eval(), random_network(config).to(DEVICE).eval()
    fused.load_state_dict(plain.state_dict())
    fuse(fused)
    return plain, fused


@pytest.mark.parametrize("config", CONFIGS)
def test_the_fused_network_is_the_network(config: UNetConfig) -> None:
    plain, fused = pair(config)
    x_t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    timestep = torch.tensor([3.0, 900.0], device=DEVICE)
    with torch.no_grad():
        exact = plain.double()(x_t.double(), timestep)
        plain.float()
        # float32 sums in another order, through every layer.
        assert largest_error(fused(x_t, timestep), exact) <= 1e-5 * float(exact.abs().max())
        half = cast_unet(fused, torch.float16)(x_t, timestep)
        theirs = cast_unet(plain, torch.float16)(x_t, timestep)
    # Twice torch's own error in float16; below 1e-3 of the largest value both are roundings.
    assert largest_error(half, exact) <= 2 * largest_error(theirs, exact) + 1e-3 * float(exact.abs().max())


def test_every_block_changes_its_operators() -> None:
    plain, fused = pair(adm_unet())
    for network, expected in ((plain, REFERENCE), (fused, TritonOperators())):
        found = [module.operators for module in network.modules() if isinstance(module, Normalise | AttentionModule)]
        assert found
        assert set(found) == {expected}


def test_a_crop_is_made_dense() -> None:
    x = torch.randn(1, 8, 6, 6, device=DEVICE)[:, :, 1:-1, 1:-1]
    weight, bias = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    for name in ("group_norm", "group_norm_silu"):
        ours = getattr(TritonOperators(), name)(x, weight, bias, 2, 1e-5)
        torch.testing.assert_close(ours, getattr(REFERENCE, name)(x, weight, bias, 2, 1e-5), atol=1e-5, rtol=1e-5)


def test_a_head_too_large_for_the_kernel_takes_the_reference() -> None:
    q, k, v = (torch.randn(1, 1, 4, 520, device=DEVICE) for _ in range(3))
    assert torch.equal(TritonOperators().attention(q, k, v), REFERENCE.attention(q, k, v))
