"""Which operators of which networks are measured, and how often each runs in a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.kernels.shapes import AttentionShape, ConvShape, NormShape, Shape

NETWORKS: Mapping[str, Sequence[Shape]] = {
    "ddpm-cifar10": (
        NormShape(128, 32, 8),
        NormShape(256, 16, 6),
        NormShape(512, 8, 3),
        AttentionShape(1, 256, 256, 5),
        ConvShape(128, 128, 32, 7),
        ConvShape(256, 256, 16, 7),
        ConvShape(256, 256, 8, 8),
        ConvShape(512, 256, 16, 2),
    ),
    "adm-64": (
        NormShape(192, 64, 7, modulated=True),
        NormShape(384, 32, 7, modulated=True),
        NormShape(192, 64, 5),
        AttentionShape(6, 1024, 64, 7),
        AttentionShape(9, 256, 64, 7),
        AttentionShape(12, 64, 64, 8),
        ConvShape(192, 192, 64, 10),
        ConvShape(384, 384, 32, 9),
        ConvShape(576, 576, 16, 9),
        ConvShape(768, 768, 8, 13),
    ),
    "digits": (
        NormShape(32, 32, 3, modulated=True),
        NormShape(64, 16, 3, modulated=True),
        AttentionShape(2, 64, 32, 3),
        ConvShape(32, 32, 32, 4),
        ConvShape(64, 64, 16, 4),
    ),
}
"""Of each network the operators that take most of a step, of each kind the largest first."""


def heaviest(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """The first shape of every operator."""
    first: dict[str, Shape] = {}
    for shape in shapes:
        first.setdefault(shape.operator, shape)
    return tuple(first.values())
