"""The evaluator: a small CNN that reads 32x32 digits, and the features in which image sets are compared."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

FEATURES = 96
WIDTHS = (24, 48, FEATURES)


class Stage(nn.Module):
    """Two 3x3 convolutions, each followed by batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Cin, H, W] -> [B, Cout, H, W]."""
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)))


class Evaluator(nn.Module):
    """A strided stem, stages at 16x16, 8x8 and 4x4, one weighted sum of positions a channel, a linear layer.

    The penultimate activations are the features; `logits = head(features)`.
    """

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTHS[0], 5, stride=2, padding=2)
        self.stages = nn.ModuleList(
            Stage(cin, cout) for cin, cout in zip((WIDTHS[0], *WIDTHS[:-1]), WIDTHS, strict=True)
        )
        # One weight per channel and position: a mean over positions would forget where a stroke lies.
        self.gather = nn.Conv2d(FEATURES, FEATURES, 4, groups=FEATURES)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """images [B, 1, 32, 32] in [-1, 1] -> [B, FEATURES]."""
        h = F.relu(self.stem(images))
        for index, stage in enumerate(self.stages):
            h = stage(h if index == 0 else F.max_pool2d(h, 2))
        features: Tensor = self.gather(h).flatten(1)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 1, 32, 32] in [-1, 1] -> logits [B, 10]."""
        logits: Tensor = self.head(self.dropout(self.features(images)))
        return logits


def load_evaluator(path: Path) -> Evaluator:
    """The evaluator whose weights are in a safetensors file, in evaluation mode and without gradients."""
    model = Evaluator()
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def read_digits(model: Evaluator, images: Tensor, batch: int = 250) -> tuple[Tensor, Tensor]:
    """(logits [N, 10], features [N, FEATURES]) of images [N, 1, 32, 32]."""
    features = torch.cat([model.features(part) for part in images.split(batch)])
    return model.head(features), features
