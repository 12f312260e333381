"""Write a network of ours as the bare state dict that OpenAI's guided-diffusion trains and loads."""

from __future__ import annotations

from torch import Tensor

from engine.checkpoints.families.openai_layout import block_keys, block_prefixes, classifier_prefixes, unfold_qkv
from engine.networks import config as c


def to_openai(state: dict[str, Tensor], config: c.UNetConfig | c.ClassifierConfig) -> dict[str, Tensor]:
    """Rename our state dict to guided-diffusion's keys and shapes (legacy attention order)."""
    out: dict[str, Tensor] = {}
    for ours, theirs in (("time.linear1", "time_embed.0"), ("time.linear2", "time_embed.2")):
        out |= {f"{theirs}.{p}": state[f"{ours}.{p}"] for p in ("weight", "bias")}
    if isinstance(config, c.UNetConfig) and config.num_classes is not None:
        out["label_emb.weight"] = state["time.label.weight"]
    widths = iter(config.projection_channels)
    start = 0
    prefixes = block_prefixes if isinstance(config, c.UNetConfig) else classifier_prefixes
    for index, block, prefix in prefixes(config.blocks):
        for ours, theirs in block_keys(index, block, prefix).items():
            for p in ("weight", "bias"):
                out[f"{theirs}.{p}"] = _their_tensor(state[f"{ours}.{p}"], block, theirs)
        if isinstance(block, c.ResBlock):
            stop = start + next(widths)
            for p in ("weight", "bias"):
                out[f"{prefix}.emb_layers.1.{p}"] = state[f"time.projection.{p}"][start:stop]
            start = stop
        if isinstance(block, c.AttentionPool):
            out[f"{prefix}.positional_embedding"] = state[f"blocks.{index}.position"]
    return {key: value.detach().float().contiguous().clone() for key, value in out.items()}


def _their_tensor(tensor: Tensor, block: c.Block, key: str) -> Tensor:
    if isinstance(block, c.Attention) and key.endswith((".qkv", ".proj_out")):
        tensor = unfold_qkv(tensor, block.heads, legacy=True) if key.endswith(".qkv") else tensor
        return tensor[..., 0] if tensor.ndim == 4 else tensor
    if isinstance(block, c.AttentionPool):
        tensor = unfold_qkv(tensor, block.heads, legacy=False) if key.endswith(".qkv_proj") else tensor
        return tensor[..., None] if tensor.ndim == 2 else tensor
    if isinstance(block, c.AveragePool) and tensor.ndim == 2:
        return tensor[..., None, None]
    return tensor
