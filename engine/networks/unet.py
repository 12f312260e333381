"""The one U-Net: a plain fp32 PyTorch module that runs a UNetConfig's block list.

It is the numerical reference and the source of every export. Parameter names are ours; translators under
engine/checkpoints/families/ rename a checkpoint's weights to them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.networks import config as c
from engine.networks.blocks.base import Tensors
from engine.networks.layers import activate
from kernels import reference as ops


class TimeEmbedding(nn.Module):
    """Timestep (and label) to the stacked time projections of all blocks: one linear layer for the network."""

    def __init__(self, config: c.UNetConfig | c.ClassifierConfig) -> None:
        super().__init__()
        self.embed_channels, self.config = config.embed_channels, config.time
        width, self.projections = config.time_channels, config.projection_channels
        self.linear1 = nn.Linear(config.embed_channels, width)
        self.linear2 = nn.Linear(width, width)
        self.projection = nn.Linear(width, sum(self.projections))
        if config.time.table_rows is not None:
            self.table = nn.Embedding(config.time.table_rows, config.embed_channels)
        if config.time.has_frequencies:
            self.frequencies = nn.Parameter(torch.ones((config.embed_channels - config.time.keeps_timestep) // 2))
        is_labelled = isinstance(config, c.UNetConfig) and config.num_classes is not None
        self.label_input = config.label if isinstance(config, c.UNetConfig) and is_labelled else None
        self.label_projects = isinstance(config, c.UNetConfig) and config.label_projection
        if self.label_input is c.LabelInput.TABLE:
            assert isinstance(config, c.UNetConfig)
            assert config.num_classes is not None
            self.label = nn.Embedding(config.num_classes, sum(self.projections) if self.label_projects else width)
        elif self.label_input is c.LabelInput.NUMBER:
            self.label_linear1 = nn.Linear(config.embed_channels, width)
            self.label_linear2 = nn.Linear(width, width)

    def forward(self, timestep: Tensor, label: Tensor | None) -> tuple[Tensor, ...]:
        """timestep [B] float32, label as LabelInput says or None
        -> one projection [B, C] for each block with one."""
        emb = self._mlp(timestep, self.linear1, self.linear2)
        if label is not None and self.label_input is not None and not self.label_projects:
            emb = emb + self._embed_label(label).to(emb.dtype)
        projected = self.projection(activate(emb, self.config.projection_activation))
        if label is not None and self.label_projects:
            projected = projected + self.label(label)
        return projected.split(self.projections, dim=1)

    def _mlp(self, number: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
        # Angles need fp32: at timestep 999 half precision is off by a whole radian.
        features = self._features(number.float()).to(first.weight.dtype)
        return second(activate(first(features), self.config.activation))

    def _features(self, number: Tensor) -> Tensor:
        """[B] float32 -> [B, embed_channels] float32."""
        time = self.config
        if time.table_rows is not None:
            return self.table(number.round().to(torch.int64))
        if time.has_frequencies:
            return ops.fourier_features(
                number.log() if time.takes_log else number,
                self.frequencies.float(),
                time.order.value,
                time.keeps_timestep,
            )
        scaled = number if time.scale == 1.0 else number * time.scale
        return ops.timestep_embedding(scaled, self.embed_channels, time.theta, time.shift, time.order.value)

    def _embed_label(self, label: Tensor) -> Tensor:
        match self.label_input:
            case c.LabelInput.TABLE:
                return self.label(label)
            case c.LabelInput.NUMBER:
                return self._mlp(label, self.label_linear1, self.label_linear2)
            case _:
                return label


class UNet(nn.Module):
    """epsilon_theta(x_t, t, conditions): a DDPM-family U-Net as its UNetConfig lists it."""

    def __init__(self, config: c.UNetConfig) -> None:
        """Raises ConfigError for a block that gives a vector, which only a classifier may end with."""
        super().__init__()
        self.config = config
        self.time = TimeEmbedding(config)
        if pool := next((block for block in config.blocks if block.is_pool), None):
            raise ConfigError(f"{type(pool).__name__} is not a U-Net block")
        self.blocks = nn.ModuleList(block.module() for block in config.blocks)
        self.types: tuple[torch.dtype | None, ...] = (None,) * len(config.blocks)
        """What each block computes in, set by engine.networks.half.cast_unet; None: in what it is given."""

    def forward(
        self, x_t: Tensor, timestep: Tensor, label: Tensor | None = None, image: Tensor | None = None
    ) -> Tensor:
        """x_t [B, C, H, W], timestep [B] float32, label and image as in Conditions -> [B, C', H, W]."""
        projections = iter(self.time(timestep, label))
        h = x_t
        if image is not None:
            h = torch.cat([image, x_t] if self.config.cond_first else [x_t, image], dim=1)
        h = h.to(next((dtype for dtype in self.types if dtype is not None), h.dtype))
        out = run_blocks(self.config.blocks, self.blocks, h, projections, self.types).to(x_t.dtype)
        return out / timestep[:, None, None, None] if self.config.divides_by_timestep else out


def run_blocks(
    blocks: tuple[c.Block, ...],
    modules: nn.ModuleList,
    h: Tensor,
    projections: Iterator[Tensor],
    types: tuple[torch.dtype | None, ...] | None = None,
) -> Tensor:
    """Run a block program on h [B, C, H, W], taking one time projection for each block that has one.

    types: what each block computes in (engine.networks.half); None: all in the type of h.
    """
    tensors = Tensors(h, h, projections=projections)
    for block, module, dtype in zip(blocks, modules, types or (None,) * len(blocks), strict=True):
        tensors.dtype = dtype
        block.run(module, tensors)
    return tensors.h
