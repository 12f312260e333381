"""What a block may call when it is lowered onto the CPU engine; engine.backends.native.lowering implements it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from engine.networks.kinds import Activation, Norm, Resample

Operand = tuple[int, ...]
"""One map, or two whose channels follow one another; () for none. Blocks only pass operands on."""


@dataclass(frozen=True, slots=True)
class NormRule:
    """A norm and the activation behind it; groups as in engine.networks.kinds.Norm, 0 for one channel a group."""

    norm: Norm
    groups: int
    eps: float
    activation: Activation = Activation.NONE


@dataclass(frozen=True, slots=True)
class Then:
    """What follows in the same operator, in this order.

    row: the columns of a time projection, from Target.take_row: added to a convolution's result, a norm's scale and
    shift. extra: a 1x1 convolution of these maps, with the weights `extra_name`, is added. add: these maps are added.
    scale: a factor on all of it.
    """

    row: int | None = None
    add: Operand = ()
    extra: Operand = ()
    extra_name: str = ""
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Window:
    """Of a convolution of pixels x pixels. pad: zeros above and on the left, None for pixels // 2. size: (height,
    width) of the result, None where the stride is 1. is_upsampled: each pixel of the input is repeated 2x2 first."""

    pixels: int = 3
    stride: int = 1
    pad: int | None = None
    size: tuple[int, int] | None = None
    is_upsampled: bool = False


@dataclass(frozen=True, slots=True)
class Heads:
    """Of an attention over all pixels. memory: learned keys and values a head in front of the pixels', which are the
    weights `memory_name` [2, heads, memory, dim]."""

    heads: int
    dim: int
    memory: int = 0
    memory_name: str = ""


ALONE, THREE, ONE = Then(), Window(), Window(1)


class MapSize(Protocol):
    """Channels, and height and width in pixels."""

    @property
    def channels(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...


class Target(Protocol):
    """The program so far. h, image, skips: as in engine.networks.blocks.base.Stream, which a block's `lower` changes.

    Every method but shape and take_row emits operators and returns where their result is.
    """

    h: Operand
    image: Operand
    skips: list[Operand]

    def shape(self, src: Operand) -> MapSize:
        """Of all maps of an operand together."""
        ...

    def take_row(self, count: int) -> int | None:
        """The next time projection, of `count` columns; None for 0. Blocks take theirs in the order of the list."""
        ...

    def concatenate(self, first: Operand, second: Operand) -> Operand:
        """Both along channels."""
        ...

    def conv(self, name: str, src: Operand, channels: int, window: Window = THREE, then: Then = ALONE) -> Operand:
        """To so many channels, with the weights `name`.weight [channels, C, k, k] and `name`.bias."""
        ...

    def transposed_conv(self, name: str, src: Operand, channels: int) -> Operand:
        """4x4 of stride 2 and padding 1, to twice the size; `name`.weight is [C, channels, 4, 4]."""
        ...

    def normalise(self, name: str, src: Operand, rule: NormRule, then: Then = ALONE) -> Operand:
        """With the weights `name`.weight and `name`.bias, as far as the norm has them."""
        ...

    def attend(self, qkv: Operand, heads: Heads, cosine_scale: float | None = None) -> Operand:
        """kernels.reference.attention of rows ordered q, k, v; cosine_scale as in the block Attention."""
        ...

    def attend_linearly(self, qkv: Operand, heads: Heads, value_factor: float = 1.0) -> Operand:
        """kernels.reference.linear_attention with scale dim**-0.5; value_factor is on the pixels' values."""
        ...

    def tokens(self, src: Operand, position_name: str = "") -> Operand:
        """A map of height 1: the mean of all pixels, then each of them; with the weights `position_name`
        [C, pixels + 1] added to them, if it names any."""
        ...

    def classify(self, name: str, tokens: Operand, classes: int) -> Operand:
        """A classifier's last layer, `name`.weight [classes, C] and `name`.bias, on the first of the tokens.

        log p(label) becomes the program's second result; what is returned is its gradient at the tokens.
        """
        ...

    def resample(self, src: Operand, how: Resample, fir: bool = False, add: Operand = ()) -> Operand:
        """Half or double the size by averaging or repeating, or with the filter (1, 3, 3, 1); then `add` is added."""
        ...

    def space_to_depth(self, src: Operand) -> Operand:
        """2x2 pixels as four channels."""
        ...

    def pad(self, src: Operand, pixels: int) -> Operand:
        """Zeros on every side; a negative number crops."""
        ...
