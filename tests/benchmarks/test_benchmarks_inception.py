"""InceptionV3 of FID: its tensors, its blocks beside plain arithmetic, its resizing, and files that are not it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inception import BlockA, BlockC, BlockE, Inception, load_inception, resize
from engine.errors import CheckpointError

# The layers of the published file, by what its PyTorch ports call them.
A = "branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 branch_pool"
B = "branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
C = (
    "branch1x1 branch7x7_1 branch7x7_2 branch7x7_3 branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 "
    "branch7x7dbl_5 branch_pool"
)
D = "branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4"
E = (
    "branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a branch3x3dbl_3b "
    "branch_pool"
)
BLOCKS = {"5b": A, "5c": A, "5d": A, "6a": B, "6b": C, "6c": C, "6d": C, "6e": C, "7a": D, "7b": E, "7c": E}
STEM = {
    "Conv2d_1a_3x3": (32, 3, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (64, 32, 3, 3),
    "Conv2d_3b_1x1": (80, 64, 1, 1),
    "Conv2d_4a_3x3": (192, 80, 3, 3),
}
SHAPES = {
    "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
    "Mixed_5c.branch_pool.conv.weight": (64, 256, 1, 1),
    "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
    "Mixed_6e.branch7x7dbl_2.conv.weight": (192, 192, 7, 1),
    "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
    "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
    "Mixed_7c.branch3x3dbl_1.conv.weight": (448, 2048, 1, 1),
    "fc.weight": (1008, 2048),
}


@pytest.fixture(scope="module")
def network() -> Inception:
    """Random weights that keep the activations of order 1, and statistics that are not 0 and 1."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Inception()
        for name, value in model.state_dict().items():
            if name.endswith("conv.weight"):
                value.normal_(0, (2 / value[0].numel()) ** 0.5)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif ".bn." in name:
                value.add_(0.2 * torch.randn_like(value))
    return model.eval().requires_grad_(False)


def test_the_tensors_are_those_of_the_published_file():
    layers = [*STEM, *(f"Mixed_{block}.{branch}" for block, names in BLOCKS.items() for branch in names.split())]
    assert len(layers) == 94
    tensors = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    wanted = {f"{layer}.{tensor}" for layer in layers for tensor in tensors} | {"fc.weight", "fc.bias"}
    with torch.device("meta"):
        state = Inception().state_dict()
    assert state.keys() == wanted
    shapes = {f"{name}.conv.weight": shape for name, shape in STEM.items()} | SHAPES
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    # torchvision states 27 161 264 for 1000 classes with an auxiliary head of 3 326 696; 8 more classes are 16 392.
    parameters = sum(value.numel() for name, value in state.items() if "running" not in name)
    assert parameters == 27_161_264 - 3_326_696 + 16_392 == 23_850_960
    assert sum(value.numel() for value in state.values()) == 23_885_392


def conv_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Convolution, normalisation and ReLU written out."""
    weight = state[f"{name}.conv.weight"]
    rows, columns = weight.shape[2:]
    x = F.conv2d(x, weight, padding=(rows // 2, columns // 2))
    gamma, beta, mean, var = (
        state[f"{name}.bn.{key}"][:, None, None] for key in ("weight", "bias", "running_mean", "running_var")
    )
    return ((x - mean) / (var + 0.001).sqrt() * gamma + beta).clamp(min=0)


def chain(state: dict[str, Tensor], x: Tensor, *names: str) -> Tensor:
    for name in names:
        x = conv_norm(state, name, x)
    return x


def windows(x: Tensor, outside: float) -> Tensor:
    """[B, C, 9, H, W]: the 3x3 neighbourhood of each position."""
    padded = F.pad(x, (1, 1, 1, 1), value=outside)
    height, width = x.shape[2:]
    return torch.stack([padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)], dim=2)


def mean_inside(x: Tensor) -> Tensor:
    return windows(x, 0.0).sum(dim=2) / windows(torch.ones_like(x), 0.0).sum(dim=2)


def test_block_a(network):
    block: BlockA = network.Mixed_5b
    state, x = block.state_dict(), torch.randn(2, 192, 5, 6).relu()
    wanted = [
        chain(state, x, "branch1x1"),
        chain(state, x, "branch5x5_1", "branch5x5_2"),
        chain(state, x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
        chain(state, mean_inside(x), "branch_pool"),
    ]
    torch.testing.assert_close(block(x), torch.cat(wanted, dim=1), rtol=1e-4, atol=1e-4)


def test_block_c(network):
    block: BlockC = network.Mixed_6c
    state, x = block.state_dict(), torch.randn(1, 768, 5, 4).relu()
    wanted = [
        chain(state, x, "branch1x1"),
        chain(state, x, "branch7x7_1", "branch7x7_2", "branch7x7_3"),
        chain(state, x, *(f"branch7x7dbl_{k}" for k in range(1, 6))),
        chain(state, mean_inside(x), "branch_pool"),
    ]
    torch.testing.assert_close(block(x), torch.cat(wanted, dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Mixed_7b", "Mixed_7c"])
def test_block_e_pools_by_average_first_and_by_maximum_last(network, name):
    block: BlockE = getattr(network, name)
    channels = {"Mixed_7b": 1280, "Mixed_7c": 2048}[name]
    state, x = block.state_dict(), torch.randn(1, channels, 4, 3)
    pooled = mean_inside(x) if name == "Mixed_7b" else windows(x, -torch.inf).amax(dim=2)
    one, two = chain(state, x, "branch3x3_1"), chain(state, x, "branch3x3dbl_1", "branch3x3dbl_2")
    wanted = [
        chain(state, x, "branch1x1"),
        chain(state, one, "branch3x3_2a"),
        chain(state, one, "branch3x3_2b"),
        chain(state, two, "branch3x3dbl_3a"),
        chain(state, two, "branch3x3dbl_3b"),
        chain(state, pooled, "branch_pool"),
    ]
    torch.testing.assert_close(block(x), torch.cat(wanted, dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width", "size"), [(4, 6, 9), (7, 5, 3), (8, 8, 8)])
def test_images_are_resized_as_tensorflow_1_did(height, width, size):
    image = torch.randint(0, 256, (1, 2, height, width)).float()
    wanted = np.empty((2, size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * height / size, j * width / size
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            a, b = y - top, x - left
            p = image[0].double().numpy()
            upper = p[:, top, left] * (1 - b) + p[:, top, right] * b
            lower = p[:, bottom, left] * (1 - b) + p[:, bottom, right] * b
            wanted[:, i, j] = upper * (1 - a) + lower * a
    np.testing.assert_allclose(resize(image, size)[0].numpy(), wanted, atol=1e-3)


def test_the_whole_network(network):
    """Sizes, the input's scale, and the spatial features: the first channels of Mixed_6d's first branch."""
    seen: dict[str, Tensor] = {}
    hooks = [
        network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, x: seen.update(scaled=x[0])),
        network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: seen.update(branch=out)),
        network.Mixed_7c.register_forward_hook(lambda _, __, out: seen.update(last=out)),
    ]
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    out = network(images)
    for hook in hooks:
        hook.remove()
    assert seen["scaled"].shape == (2, 3, 299, 299)
    assert torch.equal(seen["scaled"][:, :, 0, 0], (images[:, :, 0, 0].float() - 128) / 128)
    assert seen["last"].shape == (2, 2048, 8, 8)
    assert [tuple(each.shape) for each in (out.pooled, out.spatial, out.logits)] == [(2, 2048), (2, 2023), (2, 1008)]
    assert 0.01 < out.pooled.std() < 100
    torch.testing.assert_close(out.pooled, seen["last"].flatten(2).mean(dim=2))
    channel_last = seen["branch"].permute(0, 2, 3, 1)[..., :7]
    assert torch.equal(out.spatial.reshape(2, 17, 17, 7), channel_last)
    torch.testing.assert_close(out.logits, out.pooled @ network.fc.weight.T)


def test_weights_come_back_from_their_file(network, tmp_path):
    """As pytorch-fid's file holds them, or with counters that torch adds, or from a wrapped model."""
    state = network.state_dict()
    counters = {name.replace("bias", "num_batches_tracked"): torch.tensor(0) for name in state if ".bn.bias" in name}
    torch.save({f"module.{name}": value for name, value in (state | counters).items()}, tmp_path / "a.pth")
    loaded = load_inception(tmp_path / "a.pth")
    assert not loaded.training
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list; expected a state dict"),
        ({}, r"Conv2d_1a_3x3.conv.weight must have shape \[32, 3, 3, 3\], got nothing"),
        ("1000 classes", r"fc.weight must have shape \[1008, 2048\], got \[1000, 2048\]; pass pt_inception-2015-12-05"),
        ("auxiliary", "it also holds AuxLogits.fc.bias"),
    ],
)
def test_files_that_hold_another_network(tmp_path, content, message):
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Inception().state_dict().items()}
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    if content == "1000 classes":
        content = state | {"fc.weight": torch.zeros(()).expand(1000, 2048)}
    elif content == "auxiliary":
        content = state | {"AuxLogits.fc.bias": torch.zeros(3)}
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        load_inception(tmp_path / "a.pth")
