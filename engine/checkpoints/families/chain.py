"""U-Nets that their project keeps as three lists of layers: down, middle, up.

Every layer of the way down leaves a skip connection, every ResBlock of the way up takes one; a ResBlock may end in
attention. abarankab/DDPM and w86763777/pytorch-ddpm are of this form, and differ in names; the tensors of a ResBlock
or attention are renamed by the same code wherever they stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoints.families.common import check_groups, fold_attention_scale, fold_batch_norm
from engine.checkpoints.families.state_dict import StateDict, submodules
from engine.errors import CheckpointError
from engine.networks import config as c

Placed = tuple[c.Block, str]
"""A block and the prefix of its tensors in the file; Push, Pop and Pad have none ("")."""


@dataclass(frozen=True, slots=True)
class Names:
    """A project's names for the layers of a block: ours -> theirs, below the block's prefix.

    res: norm1, conv1, norm2, conv2, shortcut and projection (of the timestep). attention: norm, qkv and out; qkv is
    one layer, or three that are stacked.
    """

    res: Mapping[str, str]
    attention: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Chain:
    """Where a project keeps its layers. attention, down_conv, up_conv: what follows a layer's prefix."""

    names: Names
    head: str
    down: str
    middle: str
    up: str
    tail_norm: str
    tail_conv: str
    attention: str
    down_conv: str
    up_conv: str


@dataclass(frozen=True, slots=True)
class Style:
    """What the blocks have in common and a file does not say. groups: 0 for instance norm."""

    norm: c.Norm = c.Norm.GROUP
    groups: int = 32
    activation: c.Activation = c.Activation.SILU


def read_chain(state: StateDict, chain: Chain, style: Style) -> list[Placed]:
    """The blocks of a network and where they are; raises CheckpointError where a layer is of no known kind."""
    placed: list[Placed] = [(read_conv(state, chain.head), chain.head), (c.Push(), "")]
    for name in submodules(state, chain.down):
        conv = f"{name}.{chain.down_conv}"
        if state.has(f"{conv}."):
            placed.append((c.Downsample(read_conv(state, conv).in_channels, conv=True), conv))
        else:
            placed += _layer(state, name, chain, style)
        placed.append((c.Push(), ""))
    for name in submodules(state, chain.middle):
        placed += _layer(state, name, chain, style)
    for name in submodules(state, chain.up):
        conv = f"{name}.{chain.up_conv}"
        if state.has(f"{conv}."):
            placed.append((c.Upsample(read_conv(state, conv).in_channels, conv=True), conv))
        else:
            placed += [(c.Pop(), ""), *_layer(state, name, chain, style)]
    last = read_conv(state, chain.tail_conv)
    tail = c.NormSiLU(last.in_channels, style.groups, norm=style.norm, activation=style.activation)
    return [*placed, (tail, chain.tail_norm), (last, chain.tail_conv)]


def read_conv(state: StateDict, name: str) -> c.Conv:
    out, cin, kernel = state.shape(f"{name}.weight")[:3]
    return c.Conv(cin, out, kernel)


def _layer(state: StateDict, name: str, chain: Chain, style: Style) -> list[Placed]:
    """A ResBlock and the attention that may follow it."""
    if not state.has(f"{name}.{chain.names.res['conv1']}."):
        raise CheckpointError(f"{name} is no ResBlock and no resampling; the file is of a modified version")
    layer: list[Placed] = [(res_block(state, name, chain.names, style), name)]
    if state.has(f"{name}.{chain.attention}."):
        place = f"{name}.{chain.attention}"
        layer.append((attention_block(state, place, chain.names, style), place))
    return layer


def res_block(state: StateDict, prefix: str, names: Names, style: Style) -> c.ResBlock:
    """The ResBlock at a prefix; raises CheckpointError for groups that do not fit its width."""
    conv = read_conv(state, f"{prefix}.{names.res['conv1']}")
    if style.norm is c.Norm.GROUP and style.groups:
        check_groups(style.groups, (conv.in_channels, conv.out_channels))
    return c.ResBlock(
        conv.in_channels,
        conv.out_channels,
        scale_shift=False,
        groups=style.groups,
        norm=style.norm,
        activation=style.activation,
    )


def attention_block(
    state: StateDict, prefix: str, names: Names, style: Style, heads: int = 1, adds_to_norm: bool = False
) -> c.Attention:
    """The attention at a prefix; raises CheckpointError for groups or heads that do not fit its width."""
    inner, channels = state.shape(f"{prefix}.{names.attention['out'][0]}.weight")[1::-1]
    if style.norm is c.Norm.GROUP and style.groups:
        check_groups(style.groups, (channels,))
    if inner % heads:
        raise CheckpointError(f"an attention of {inner} channels cannot have {heads} heads; is --num-heads right?")
    return c.Attention(channels, heads, inner // heads, groups=style.groups, norm=style.norm, adds_to_norm=adds_to_norm)


def rename(state: StateDict, placed: list[Placed], names: Names) -> dict[str, Tensor]:
    """The tensors of all blocks under our names; those of the time are the caller's (time_projections)."""
    weights: dict[str, Tensor] = {}
    for index, (block, prefix) in enumerate(placed):
        ours = f"blocks.{index}"
        match block:
            case c.ResBlock():
                weights |= _res_weights(state, prefix, ours, block, names)
            case c.Attention():
                weights |= _attention_weights(state, prefix, ours, block, names)
            case c.NormSiLU():
                weights |= _norm_weights(state, prefix, f"{ours}.norm", block.channels, block.norm, block.eps)
            case c.Conv() | c.TransposedConv():
                weights |= _layer_weights(state, prefix, ours)
            case c.Downsample() | c.Upsample():
                weights |= _layer_weights(state, prefix, f"{ours}.conv")
            case _:
                pass
    return weights


def time_projections(state: StateDict, placed: list[Placed], names: Names) -> dict[str, Tensor]:
    """The linear layers from the time embedding to each ResBlock as one."""
    layers = [f"{prefix}.{names.res['projection']}" for block, prefix in placed if isinstance(block, c.ResBlock)]
    return {
        f"time.projection.{part}": torch.cat([state.take(f"{layer}.{part}") for layer in layers])
        for part in ("weight", "bias")
    }


def _layer_weights(state: StateDict, theirs: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.{part}": state.take(f"{theirs}.{part}") for part in ("weight", "bias")}


def _res_weights(state: StateDict, prefix: str, ours: str, block: c.ResBlock, names: Names) -> dict[str, Tensor]:
    layers = {k: f"{prefix}.{v}" for k, v in names.res.items()}
    weights = _norm_weights(state, layers["norm1"], f"{ours}.norm1", block.in_channels, block.norm, block.eps)
    weights |= _norm_weights(state, layers["norm2"], f"{ours}.norm2", block.out_channels, block.norm, block.eps)
    convs = ["conv1", "conv2"] + (["shortcut"] if block.in_channels != block.out_channels else [])
    for name in convs:
        weights |= _layer_weights(state, layers[name], f"{ours}.{name}")
    return weights


def _attention_weights(state: StateDict, prefix: str, ours: str, block: c.Attention, names: Names) -> dict[str, Tensor]:
    layers = {k: [f"{prefix}.{name}" for name in v] for k, v in names.attention.items()}
    weights = _norm_weights(state, layers["norm"][0], f"{ours}.norm", block.channels, block.norm, block.eps)
    for part in ("weight", "bias"):
        qkv = torch.cat([state.take(f"{layer}.{part}") for layer in layers["qkv"]])
        if len(layers["qkv"]) == 1 and block.heads > 1:
            # One layer keeps q, k and v of each head together.
            qkv = qkv.unflatten(0, (block.heads, 3, block.head_dim)).transpose(0, 1).flatten(0, 2)
        out = state.take(f"{layers['out'][0]}.{part}")
        for name, tensor in (("qkv", fold_attention_scale(qkv, block.heads)), ("out", out)):
            is_linear = tensor.ndim == 2
            weights[f"{ours}.{name}.{part}"] = tensor[:, :, None, None] if is_linear else tensor
    return weights


def _norm_weights(
    state: StateDict, theirs: str, ours: str, channels: int, norm: c.Norm, eps: float
) -> dict[str, Tensor]:
    """A norm's scale and shift; 1 and 0 where it was made without, and a batch norm's folded with its statistics."""
    if norm is c.Norm.NONE:
        return {}
    if not state.has(f"{theirs}."):
        return {f"{ours}.weight": torch.ones(channels), f"{ours}.bias": torch.zeros(channels)}
    weight, bias = state.take(f"{theirs}.weight"), state.take(f"{theirs}.bias")
    if norm is c.Norm.AFFINE:
        mean, variance = state.take(f"{theirs}.running_mean"), state.take(f"{theirs}.running_var")
        if state.has(f"{theirs}.num_batches_tracked"):
            state.take(f"{theirs}.num_batches_tracked")
        weight, bias = fold_batch_norm(weight, bias, mean, variance, eps)
    return {f"{ours}.weight": weight, f"{ours}.bias": bias}
