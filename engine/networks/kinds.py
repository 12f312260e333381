"""The kinds of normalisation, non-linearity and change of resolution that blocks choose from."""

from __future__ import annotations

from enum import Enum


class Resample(Enum):
    """How a block changes resolution: by 2x nearest repetition, or by 2x2 average."""

    UP = "up"
    DOWN = "down"


class Norm(Enum):
    """Normalisation: over groups of channels; at each pixel over channels by root mean square or by mean and variance
    (LAYER); AFFINE only scales and shifts (a folded batch norm); NONE is the identity and holds no weights.

    Instance norm is GROUP with one channel a group, which `groups` = 0 says whatever the number of channels.
    """

    GROUP = "group"
    RMS = "rms"
    LAYER = "layer"
    AFFINE = "affine"
    NONE = "none"


class Activation(Enum):
    """Pointwise non-linearities; GELU is the exact one (erf), NONE the identity."""

    SILU = "silu"
    RELU = "relu"
    MISH = "mish"
    GELU = "gelu"
    NONE = "none"
