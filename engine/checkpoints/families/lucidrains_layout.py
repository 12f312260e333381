"""Where lucidrains' denoising-diffusion-pytorch keeps its network, release by release, and what a release computes.

    init_conv, downs.i.(0, 1: ResBlocks; 2: attention; 3: the way down), mid_block1, mid_attn, mid_block2,
    ups.j.(0, 1; 2; 3), final_res_block, final_conv

Both ResBlocks of a level leave a skip connection (the second behind its attention), and so does init_conv. Attention is
linear in the number of pixels but for some levels and the middle.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.checkpoints.families.common import check_groups
from engine.checkpoints.families.state_dict import StateDict, submodules
from engine.checkpoints.types import Assumptions
from engine.errors import CheckpointError
from engine.networks import config as c

Placed = tuple[c.Block, str]
"""A block and the prefix of its tensors; "" for one that has none."""

LAYER_NORM_EPS = 1e-5
DEFAULT_HEADS, DEFAULT_HEAD_CHANNELS = 4, 32


@dataclass(frozen=True, slots=True)
class Release:
    """What a version of the project computes that neither keys nor shapes show."""

    standardises_weights: bool
    attention_norm: c.Norm
    divides_values: bool
    normalises_over_pixels: bool
    keeps_eps: bool

    @classmethod
    def of(cls, version: str) -> Release:
        """The traits of a version like "1.7.2"; raises CheckpointError for one that cannot be read."""
        found = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", version)
        if found is None:
            raise CheckpointError(f"cannot read {version!r} as a version; give one like 1.7.2 with --release")
        number = tuple(int(part or 0) for part in found.groups())
        return cls(
            standardises_weights=number < (1, 7, 2),
            attention_norm=c.Norm.LAYER if number < (1, 7, 0) else c.Norm.RMS,
            divides_values=number < (1, 7, 4),
            normalises_over_pixels=number < (0, 28, 0),
            keeps_eps=number < (1, 4, 2),
        )


def release_of(state: StateDict, version: str | None, is_of_trainer: bool, assume: Assumptions) -> Release:
    """The release that wrote a file: its version entry, else what its keys leave, else the user's word or a guess.

    is_of_trainer: it is a Trainer's file, which has had a version entry since 1.0.0.
    Raises CheckpointError if the user's word contradicts the file.
    """
    given = assume.given("release")
    if version is not None:
        if given is not None and Release.of(given) != Release.of(version):
            raise CheckpointError(f"the file was written by version {version}, --release says {given}; leave it out")
        return Release.of(version)
    if not state.has("model.mid_attn.fn."):
        return Release.of("1.8")
    if state.has("model.mid_block1.block1.norm.g"):
        return Release.of("2.0")
    is_strided = state.has("model.downs.1.") and state.has("model.downs.0.3.weight")
    if is_strided and not has_classes(state):
        reason = "without a version entry it is 0.31 or older, and attention changed in 0.28"
        return Release.of(assume.take("release", "0.27", reason))
    if is_of_trainer or state.has("p2_loss_weight"):
        return Release.of(given or "0.32")
    return Release.of(assume.take("release", "1.7.7", "the newest with these keys; the file has no version entry"))


def has_classes(state: StateDict) -> bool:
    """Whether it is the network of the classifier_free_guidance module."""
    return state.has("model.classes_emb.")


class Layout:
    """Reads the block list from keys and shapes; heads and groups where the file does not say are facts."""

    def __init__(self, state: StateDict, release: Release, assume: Assumptions) -> None:
        self._state, self._release, self._assume = state, release, assume
        self._levels = len(submodules(state, "model.downs"))
        is_grouped = state.has("model.mid_block1.block1.norm.weight")
        self._norm = c.Norm.GROUP if is_grouped else c.Norm.RMS
        self._groups = assume.take("num_groups", 8, "the default of the project") if is_grouped else 1

    def blocks(self) -> list[Placed]:
        """The whole network in the order in which it runs."""
        first = self._conv("model.init_conv")
        placed = [first, (c.Push(), "")]
        for level in range(self._levels):
            prefix = f"model.downs.{level}"
            placed += [self._res(f"{prefix}.0"), (c.Push(), ""), self._res(f"{prefix}.1")]
            placed += [self._attention(f"{prefix}.2", level), (c.Push(), ""), *self._down(f"{prefix}.3", level)]
        last = self._levels - 1
        placed += [
            self._res("model.mid_block1"),
            self._attention("model.mid_attn", last),
            self._res("model.mid_block2"),
        ]
        for number in range(self._levels):
            prefix = f"model.ups.{number}"
            placed += [(c.Pop(), ""), self._res(f"{prefix}.0"), (c.Pop(), ""), self._res(f"{prefix}.1")]
            placed += [self._attention(f"{prefix}.2", last - number), *self._up(f"{prefix}.3")]
        return [*placed, (c.Pop(), ""), self._res("model.final_res_block"), self._conv("model.final_conv")]

    def _conv(self, prefix: str) -> Placed:
        shape = self._state.shape(f"{prefix}.weight")
        if len(shape) != 4:
            raise CheckpointError(f"{prefix} is no 2D convolution (shape {shape}); only networks of images are known")
        return c.Conv(shape[1], shape[0], shape[2]), prefix

    def _res(self, prefix: str) -> Placed:
        out, cin = self._state.shape(f"{prefix}.block1.proj.weight")[:2]
        if self._norm is c.Norm.GROUP:
            check_groups(self._groups, [out])
        has_shortcut = self._state.has(f"{prefix}.res_conv.")
        block = c.ResBlock(
            cin,
            out,
            scale_shift=True,
            groups=self._groups,
            norm=self._norm,
            conv_first=True,
            has_shortcut=has_shortcut and cin == out,
        )
        return block, prefix

    def _down(self, prefix: str, level: int) -> list[Placed]:
        if level == self._levels - 1:
            return [self._conv(prefix)]
        if self._state.has(f"{prefix}.1."):
            conv, place = self._conv(f"{prefix}.1")
            assert isinstance(conv, c.Conv)
            return [(c.SpaceToDepth(conv.in_channels // 4), ""), (conv, place)]
        out, cin, kernel = self._state.shape(f"{prefix}.weight")[:3]
        return [(c.Downsample(cin, conv=True, kernel=kernel, out_channels=out), prefix)]

    def _up(self, prefix: str) -> list[Placed]:
        if not self._state.has(f"{prefix}.1."):
            return [self._conv(prefix)]
        conv, place = self._conv(f"{prefix}.1")
        assert isinstance(conv, c.Conv)
        return [(c.Upsample(conv.in_channels, conv=False), ""), (conv, place)]

    def _attention(self, prefix: str, level: int) -> Placed:
        state, release = self._state, self._release
        if state.has(f"{prefix}.fn."):
            prefix = f"{prefix}.fn"
        inner = attention_prefix(state, prefix)
        rows, channels = state.shape(f"{inner}.to_qkv.weight")[:2]
        is_linear = state.has(f"{inner}.to_out.0.")
        memory = 0
        if state.has(f"{inner}.mem_kv"):
            shape = state.shape(f"{inner}.mem_kv")
            heads, dim, memory = (shape[1], shape[2], shape[3]) if is_linear else (shape[1], shape[3], shape[2])
        else:
            is_fixed = is_linear and inner.endswith(".fn")
            heads, dim = (4, rows // 12) if is_fixed else self._heads(prefix, rows // 3, level)
        if 3 * heads * dim != rows:
            raise CheckpointError(f"{inner} has {rows} qkv rows; expected 3 x {heads} heads x {dim} channels")
        if is_linear:
            linear = c.LinearAttention(
                channels,
                heads,
                dim,
                eps=LAYER_NORM_EPS,
                norm=release.attention_norm,
                out_norm=release.attention_norm,
                memory=memory,
                divides_values=release.divides_values,
            )
            return linear, prefix
        full = c.Attention(
            channels,
            heads,
            dim,
            eps=LAYER_NORM_EPS,
            norm=release.attention_norm,
            memory=memory,
            cosine_scale=10.0 if release.normalises_over_pixels else None,
        )
        return full, prefix

    def _heads(self, prefix: str, inner: int, level: int) -> tuple[int, int]:
        """(heads, channels a head) of an attention whose file does not say; raises CheckpointError if they misfit."""
        heads = self._of_level("level_heads", level) or self._assume.given("num_heads")
        dim = self._of_level("level_head_channels", level) or self._assume.given("num_head_channels")
        if heads is None and dim is None:
            if inner != DEFAULT_HEADS * DEFAULT_HEAD_CHANNELS:
                raise CheckpointError(
                    f"{prefix} has {inner} channels, which are not the default 4 heads of 32; give --num-heads or "
                    "--num-head-channels (or --level-heads where levels differ)"
                )
            if all(made.name != "num_heads" for made in self._assume.made()):
                self._assume.take("num_heads", DEFAULT_HEADS, "the default of the project, with 32 channels each")
            return DEFAULT_HEADS, DEFAULT_HEAD_CHANNELS
        heads = heads or inner // dim
        dim = dim or inner // heads
        if not heads or heads * dim != inner:
            raise CheckpointError(
                f"{prefix} has {inner} channels, which {heads} heads of {dim} do not make; give the training's "
                "--num-heads or --num-head-channels"
            )
        return heads, dim

    def _of_level(self, name: str, level: int) -> int | None:
        values = self._assume.given(name)
        if values is None:
            return None
        if len(values) != self._levels:
            raise CheckpointError(
                f"{name} has {len(values)} numbers and the network {self._levels} levels; give one for each level"
            )
        return int(values[level])


def attention_prefix(state: StateDict, prefix: str) -> str:
    """Where an attention keeps its projections: up to 1.7 below a wrapper that holds its norm."""
    return f"{prefix}.fn" if state.has(f"{prefix}.fn.") else prefix
