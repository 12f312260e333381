"""Input gradients of single operators, written in operators that every ONNX runtime runs forwards.

Tracing a backward pass yields operators such as convolution_backward, which ONNX does not have. Each rule here states
one of them in plain forward operators, for the gradient of the input only: the weights are frozen. The gradient of a
convolution is again a convolution, never a transposed one: OpenVINO 2026.4 on a CPU returns wrong numbers where one
constant feeds a Conv and a ConvTranspose with as many input as output channels, and optimisers merge equal constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import get_decompositions

from engine.errors import ExportError

_aten = torch.ops.aten


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    _output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, None, None]:
    """d x of conv2d(x [B, Cin, H, W], weight [Cout, Cin, kh, kw]): grad [B, Cout, h, w] -> [B, Cin, H, W].

    conv2d(stuffed grad, weight flipped in both directions with its channels exchanged, padding kernel - 1 - padding),
    where a stride s puts s - 1 zeros behind every element first. Raises ExportError for a transposed, dilated or
    grouped convolution and for a padding of the kernel's size or more.
    """
    _only_input(output_mask)
    kernel = tuple(int(size) for size in weight.shape[2:])
    if transposed or groups != 1 or any(d != 1 for d in dilation) or any(padding[i] >= kernel[i] for i in (0, 1)):
        raise ExportError(
            f"no input gradient for a convolution with kernel {kernel}, padding {tuple(padding)}, dilation "
            f"{tuple(dilation)}, {groups} groups, transposed {transposed}; expected a plain one with padding < kernel"
        )
    # What reached each output: H + 2 padding - kernel + 1 positions, of which every stride-th was kept.
    height, width = (int(x.shape[i + 2]) + 2 * padding[i] - kernel[i] + 1 for i in (0, 1))
    stuffed = _stuff_zeros(grad, stride[0], stride[1])
    rest = (0, width - int(stuffed.shape[3]), 0, height - int(stuffed.shape[2]))
    if any(rest):
        stuffed = F.pad(stuffed, rest)
    turned = weight.flip(2, 3).transpose(0, 1)
    return F.conv2d(stuffed, turned, padding=[kernel[i] - 1 - padding[i] for i in (0, 1)]), None, None


def _stuff_zeros(x: Tensor, rows: int, columns: int) -> Tensor:
    """[B, C, h, w] -> [B, C, h rows, w columns]: each element at the top left of a block of zeros."""
    if rows == 1 and columns == 1:
        return x
    batch, channels, height, width = x.shape
    blocks = F.pad(x[:, :, :, None, :, None], (0, columns - 1, 0, 0, 0, rows - 1))
    return blocks.reshape(batch, channels, height * rows, width * columns)


def avg_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    _ceil_mode: bool,
    _count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    """d x of an average over k x k tiles: grad [B, C, h, w] / k^2 repeated over each tile, zeros beyond the last.

    Raises ExportError unless the tiles neither overlap nor reach outside.
    """
    rows, columns = (kernel[0], kernel[-1])
    steps = tuple(stride) or tuple(kernel)
    if (steps[0], steps[-1]) != (rows, columns) or any(padding) or divisor is not None:
        raise ExportError(
            f"no input gradient for avg_pool2d with kernel {tuple(kernel)}, stride {steps}, padding {tuple(padding)}, "
            f"divisor {divisor}; expected tiles that neither overlap nor are padded"
        )
    batch, channels, height, width = grad.shape
    tiles = (grad / (rows * columns))[:, :, :, None, :, None].expand(batch, channels, height, rows, width, columns)
    whole = tiles.reshape(batch, channels, height * rows, width * columns)
    rest = (0, int(x.shape[3]) - int(width) * columns, 0, int(x.shape[2]) - int(height) * rows)
    return F.pad(whole, rest) if any(rest) else whole


def upsample_nearest2d_backward(
    grad: Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    _scale_h: float | None = None,
    _scale_w: float | None = None,
) -> Tensor:
    """d x of a repetition k x k: the sum over each tile of grad [B, C, H k, W k], as an average times k^2.

    Raises ExportError where the sizes are no whole multiples.
    """
    (height, width), (rows, columns) = output_size, input_size[2:]
    if height % rows or width % columns:
        raise ExportError(
            f"no input gradient for a nearest upsampling from {tuple(input_size[2:])} to {tuple(output_size)}; "
            "expected a whole multiple each way"
        )
    tile = [height // rows, width // columns]
    return F.avg_pool2d(grad, tile) * (tile[0] * tile[1])


def select_backward(grad: Tensor, input_sizes: Sequence[int], dim: int, index: int) -> Tensor:
    """d x of x.select(dim, index): grad between zeros, joined along dim."""
    axis, size = dim % len(input_sizes), input_sizes[dim]
    return _between_zeros(grad.unsqueeze(axis), input_sizes, axis, index % size)


def slice_backward(grad: Tensor, input_sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Tensor:
    """d x of x[start:end] along dim: grad between zeros; raises ExportError for a step other than 1."""
    if step != 1:
        raise ExportError(f"no input gradient for a slice of step {step}; expected a step of 1")
    axis, size = dim % len(input_sizes), input_sizes[dim]
    if start == 0 and end >= size:
        return grad
    return _between_zeros(grad, input_sizes, axis, start if start >= 0 else start + size)


def _between_zeros(grad: Tensor, sizes: Sequence[int], axis: int, before: int) -> Tensor:
    """grad with `before` zeros in front of it along axis and as many behind as fill up to sizes[axis]."""

    def zeros(count: int) -> Tensor:
        return grad.new_zeros([*sizes[:axis], count, *sizes[axis + 1 :]])

    after = sizes[axis] - before - grad.shape[axis]
    parts = [zeros(before) if before else None, grad, zeros(after) if after else None]
    return torch.cat([part for part in parts if part is not None], dim=axis)


def native_group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, batch: int, channels: int, hw: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and 1 / sqrt(var + eps) of kernels.reference.group_norm; all computed in float32, y in x's type.

    x [B, C, ...]; mean and rstd [B, G] float32, which the backward rule takes up again.
    """
    h = x.float().reshape(batch, groups, -1)
    mean = h.mean(dim=2, keepdim=True)
    centred = h - mean
    rstd = torch.rsqrt(centred.square().mean(dim=2, keepdim=True) + eps)
    y = (centred * rstd).reshape(batch, channels, hw)
    if weight is not None:
        y = y * weight.float()[:, None]
    if bias is not None:
        y = y + bias.float()[:, None]
    return y.reshape(x.shape).to(x.dtype), mean[:, :, 0], rstd[:, :, 0]


def native_group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    batch: int,
    channels: int,
    hw: int,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, None, None]:
    """d x of group norm: rstd * (g - mean(g) - n mean(g n)), n = (x - mean) rstd, g = grad * weight, in float32.

    Means are over each group. grad, x [B, C, ...]; mean, rstd [B, G].
    """
    _only_input(output_mask)
    g = grad.float().reshape(batch, channels, hw)
    if weight is not None:
        g = g * weight.float()[:, None]
    g = g.reshape(batch, groups, -1)
    scale = rstd.float()[:, :, None]
    n = (x.float().reshape(batch, groups, -1) - mean.float()[:, :, None]) * scale
    dx = scale * (g - g.mean(dim=2, keepdim=True) - n * (g * n).mean(dim=2, keepdim=True))
    return dx.reshape(x.shape).to(x.dtype), None, None


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """d x of x * s, s = sigmoid(x): grad * s * (1 + x (1 - s))."""
    s = torch.sigmoid(x)
    return grad * (s * (1 + x * (1 - s)))


def softmax_backward(grad: Tensor, y: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    """d x of y = softmax(x): y * (grad - sum(grad * y)), in y's type, which is float32 throughout the engine."""
    product = (grad * y).movedim(dim, -1)
    # As a product with ones: ONNX Runtime adds up a row in an order that depends on where it lies in memory, so that
    # an image in a batch would differ in a bit from the same image alone.
    total = (product @ product.new_ones(product.shape[-1], 1)).movedim(-1, dim)
    return (grad * y - y * total).to(input_dtype)


def _only_input(output_mask: Sequence[bool]) -> None:
    if any(output_mask[1:]):
        raise ExportError("the backward pass asks for a weight's gradient; freeze the network: requires_grad_(False)")


def input_gradient_rules() -> dict[Any, Callable[..., Any]]:
    """Operator -> rule, for torch.fx.experimental.proxy_tensor.make_fx."""
    own: dict[Any, Callable[..., Any]] = {
        _aten.convolution_backward.default: convolution_backward,
        _aten.avg_pool2d_backward.default: avg_pool2d_backward,
        _aten.upsample_nearest2d_backward.default: upsample_nearest2d_backward,
        _aten.select_backward.default: select_backward,
        _aten.slice_backward.default: slice_backward,
        _aten.native_group_norm.default: native_group_norm,
        _aten.native_group_norm_backward.default: native_group_norm_backward,
        _aten.silu_backward.default: silu_backward,
        _aten._softmax_backward_data.default: softmax_backward,
    }
    # Pointwise rules that torch states in forward operators itself.
    pointwise = get_decompositions([_aten.threshold_backward, _aten.gelu_backward, _aten.mish_backward])
    return {**pointwise, **own}
