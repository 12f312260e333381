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
    """Timestep (and label) to the stacked projections of all blocks that take one: one linear layer for the network.

    Of a network that does not see the timestep only a table of labels is left, or nothing.
    """

    def __init__(self, config: c.UNetConfig | c.ClassifierConfig) -> None:
        super().__init__()
        self.config, self.projections = config.time, config.projection_channels
        if config.time is not None:
            self._add_time_layers(config.time)
        is_labelled = isinstance(config, c.UNetConfig) and config.num_classes is not None
        self.label_input = config.label if isinstance(config, c.UNetConfig) and is_labelled else None
        self.label_projects = isinstance(config, c.UNetConfig) and config.label_projection
        if self.label_input is c.LabelInput.TABLE:
            assert config.num_classes is not None
            self.label = nn.Embedding(config.num_classes, self._label_width())
        elif self.label_input is c.LabelInput.NUMBER:
            assert config.time is not None
            self.label_linear1 = nn.Linear(config.time.embed_channels, config.time.channels)
            self.label_linear2 = nn.Linear(config.time.channels, config.time.channels)

    def _add_time_layers(self, time: c.TimeConfig) -> None:
        self.linear1 = nn.Linear(time.embed_channels, time.channels)
        self.linear2 = nn.Linear(time.channels, time.channels)
        self.projection = nn.Linear(time.channels, sum(self.projections))
        if time.table_rows is not None:
            self.table = nn.Embedding(time.table_rows, time.embed_channels)
        if time.has_frequencies:
            self.frequencies = nn.Parameter(torch.ones((time.embed_channels - time.keeps_timestep) // 2))

    def _label_width(self) -> int:
        if self.label_projects or self.config is None:
            return sum(self.projections)
        return self.config.channels

    def forward(self, timestep: Tensor, label: Tensor | None) -> tuple[Tensor, ...]:
        """timestep [B] float32, label as LabelInput says or None -> one projection [B, C] for each block with one."""
        if not self.projections:
            return ()
        projected = None if self.config is None else self._project_time(timestep, label, self.config)
        if label is not None and self.label_projects:
            rows = self.label(label)
            projected = rows if projected is None else projected + rows
        if projected is None:
            projected = timestep.new_zeros(len(timestep), sum(self.projections))
        return projected.split(self.projections, dim=1)

    def _project_time(self, timestep: Tensor, label: Tensor | None, time: c.TimeConfig) -> Tensor:
        emb = self._mlp(timestep, self.linear1, self.linear2, time)
        if label is not None and self.label_input is not None and not self.label_projects:
            emb = emb + self._embed_label(label, time).to(emb.dtype)
        return self.projection(activate(emb, time.projection_activation))

    def _mlp(self, number: Tensor, first: nn.Linear, second: nn.Linear, time: c.TimeConfig) -> Tensor:
        # Angles need fp32: at timestep 999 half precision is off by a whole radian.
        features = self._features(number.float(), time).to(first.weight.dtype)
        return second(activate(first(features), time.activation))

    def _features(self, number: Tensor, time: c.TimeConfig) -> Tensor:
        """[B] float32 -> [B, embed_channels] float32."""
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
        return ops.timestep_embedding(scaled, time.embed_channels, time.theta, time.shift, time.order.value)

    def _embed_label(self, label: Tensor, time: c.TimeConfig) -> Tensor:
        match self.label_input:
            case c.LabelInput.TABLE:
                return self.label(label)
            case c.LabelInput.NUMBER:
                return self._mlp(label, self.label_linear1, self.label_linear2, time)
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
