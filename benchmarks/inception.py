"""The InceptionV3 of FID: Google's network of 2015-12-05, under the tensor names that its PyTorch ports share.

It differs from torchvision's: average pools leave the padding out, the last block pools by maximum, there are 1008
classes and no auxiliary head, and images are resized as TensorFlow 1 did. Two published ports, pytorch-fid and
torch-fidelity, convert the same file; pytorch-fid resizes with half-pixel centres and scales by 2 x / 255 - 1, which
the original graph does not. Here both steps follow the original graph, as torch-fidelity's do, so that figures compare
with those of published tables. Szegedy et al., Rethinking the Inception Architecture (2016).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.checkpoints.reading import read_file
from engine.checkpoints.unwrapping import without_wrappers
from engine.errors import CheckpointError

SIZE = 299
CLASSES = 1008
POOLED = 2048
SPATIAL_CHANNELS = 7
NORM_EPS = 1e-3

Kernel = int | tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """pooled: [B, 2048]. spatial: [B, 2023], the first 7 channels at 17x17, channel last. logits: [B, 1008].

    The logits are without the bias of the last layer, which the original Inception Score leaves out.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor


def resize(images: Tensor, size: int = SIZE) -> Tensor:
    """images [B, C, H, W] float32 -> [B, C, size, size], bilinear as TensorFlow 1's ResizeBilinear.

    Output pixel i lies at i * H / size of the input: corners are not aligned and there is no half-pixel centre, so
    that the last rows repeat the last row of the input.
    """
    rows, row_weight = _positions(images.shape[2], size, images.device)
    columns, column_weight = _positions(images.shape[3], size, images.device)
    left, right = images[..., columns[0]], images[..., columns[1]]
    wide = left + (right - left) * column_weight
    top, bottom = wide[:, :, rows[0]], wide[:, :, rows[1]]
    return top + (bottom - top) * row_weight[:, None]


def _positions(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both neighbours [2, size] of each output pixel, and the weight [size] of the second."""
    place = torch.arange(size, dtype=torch.float32, device=device) * (length / size)
    first = place.floor()
    low = first.long()
    return torch.stack([low, (low + 1).clamp(max=length - 1)]), place - first


class FrozenNorm(nn.Module):
    """Batch norm whose statistics never change."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=NORM_EPS)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU. Without stride the size stays unless is_valid."""

    def __init__(self, cin: int, cout: int, kernel: Kernel = 1, stride: int = 1, is_valid: bool = False) -> None:
        super().__init__()
        padding = "valid" if is_valid or stride > 1 else "same"
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = FrozenNorm(cout)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def average_pool(x: Tensor) -> Tensor:
    """3x3 means at stride 1, over those positions that lie inside the image."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    """3x3 maxima at stride 1."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


class BlockA(nn.Module):
    """35x35, to 224 + pool_channels channels."""

    def __init__(self, cin: int, pool_channels: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(cin, 64)
        self.branch5x5_1 = ConvNorm(cin, 48)
        self.branch5x5_2 = ConvNorm(48, 64, 5)
        self.branch3x3dbl_1 = ConvNorm(cin, 64)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3)
        self.branch_pool = ConvNorm(cin, pool_channels)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(average_pool(x))], dim=1)


class BlockB(nn.Module):
    """35x35 to 17x17, by 480 channels more."""

    def __init__(self, cin: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(cin, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(cin, 64)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockC(nn.Module):
    """17x17, 768 channels; 7x7 convolutions as a row and a column."""

    def __init__(self, width: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = ConvNorm(768, 192)
        self.branch7x7_1 = ConvNorm(768, width)
        self.branch7x7_2 = ConvNorm(width, width, row)
        self.branch7x7_3 = ConvNorm(width, 192, column)
        self.branch7x7dbl_1 = ConvNorm(768, width)
        self.branch7x7dbl_2 = ConvNorm(width, width, column)
        self.branch7x7dbl_3 = ConvNorm(width, width, row)
        self.branch7x7dbl_4 = ConvNorm(width, width, column)
        self.branch7x7dbl_5 = ConvNorm(width, 192, row)
        self.branch_pool = ConvNorm(768, 192)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average_pool(x))], dim=1)


class BlockD(nn.Module):
    """17x17 to 8x8, 768 to 1280 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNorm(768, 192)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNorm(768, 192)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockE(nn.Module):
    """8x8, to 2048 channels. The published network pools by average in the first of the two, by maximum in the last."""

    def __init__(self, cin: int, pools_by_maximum: bool) -> None:
        super().__init__()
        self.pool = max_pool if pools_by_maximum else average_pool
        self.branch1x1 = ConvNorm(cin, 320)
        self.branch3x3_1 = ConvNorm(cin, 384)
        self.branch3x3_2a = ConvNorm(384, 384, (1, 3))
        self.branch3x3_2b = ConvNorm(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvNorm(cin, 448)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3)
        self.branch3x3dbl_3a = ConvNorm(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvNorm(384, 384, (3, 1))
        self.branch_pool = ConvNorm(cin, 192)

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch3x3_1(x)
        two = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch3x3_2a(one), self.branch3x3_2b(one), self.branch3x3dbl_3a(two), self.branch3x3dbl_3b(two)]
        return torch.cat([self.branch1x1(x), *parts, self.branch_pool(self.pool(x))], dim=1)


class Inception(nn.Module):
    """The whole network: 23 850 960 weights, and 34 432 running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, is_valid=True)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, is_valid=True)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(128)
        self.Mixed_6c = BlockC(160)
        self.Mixed_6d = BlockC(160)
        self.Mixed_6e = BlockC(192)
        self.Mixed_7a = BlockD()
        self.Mixed_7b = BlockE(1280, pools_by_maximum=False)
        self.Mixed_7c = BlockE(2048, pools_by_maximum=True)
        self.fc = nn.Linear(POOLED, CLASSES)

    def forward(self, images: Tensor) -> Activations:
        """images [B, 3, H, W], numbers from 0 to 255."""
        x = (resize(images.float()) - 128) / 128
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
        # TensorFlow calls the first branch of this block mixed_6/conv; guided-diffusion's sFID takes it after its ReLU.
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pooled = x.mean(dim=(2, 3))
        return Activations(pooled, spatial, F.linear(pooled, self.fc.weight))


def load_inception(path: Path) -> Inception:
    """The network with the weights of a file, in evaluation mode, without gradients; raises CheckpointError."""
    with torch.device("meta"):
        model = Inception()
    weights = _weights(path, without_wrappers(read_file(path)))
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, shape in wanted.items():
        if name not in weights or tuple(weights[name].shape) != shape:
            got = list(weights[name].shape) if name in weights else "nothing"
            raise CheckpointError(
                f"{path} is not the InceptionV3 of FID: {name} must have shape {list(shape)}, got {got}; pass "
                "pt_inception-2015-12-05-6726825d.pth of pytorch-fid or the same weights as torch-fidelity publishes "
                "them (torchvision's own inception_v3 is another network)"
            )
    if extra := sorted(weights.keys() - wanted.keys()):
        raise CheckpointError(f"{path} is not the InceptionV3 of FID: it also holds {', '.join(extra[:3])}")
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def _weights(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state dict")
    return {
        name: value.float()
        for name, value in content.items()
        if isinstance(value, Tensor) and not name.endswith("num_batches_tracked")
    }
