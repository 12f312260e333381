"""What each operator means, in plain PyTorch. Every faster implementation is judged by these functions.

Shapes are written [B, C, H, W] for images and [B, heads, N, head_dim] for tokens.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    """Group normalisation of x [B, C, ...] over each group's channels and positions.

    y = (x - mean) / sqrt(var + eps) * weight + bias, var biased; weight and bias are [C].
    Wu & He, Group Normalization (2018), eq. 1 and 7.
    """
    return F.group_norm(x, num_groups, weight, bias, eps)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    """SiLU(GroupNorm(x)) for x [B, C, H, W]; same dtype and shape as x."""
    return F.silu(group_norm(x, weight, bias, num_groups, eps))


def scale_shift_silu(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """SiLU(h * (1 + scale) + shift) for h [B, C, H, W], scale and shift [B, C].

    Adaptive group normalisation of Improved DDPM (Nichol & Dhariwal, 2021), section 3.
    """
    return F.silu(h * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v over tokens; q, k, v and the result are [B, heads, N, head_dim].

    The softmax runs in float32 whatever the tokens' dtype. The factor 1/sqrt(head_dim) of Vaswani et al. (2017),
    eq. 1 is already part of q: it is folded into the projection's weights when a checkpoint is read.
    """
    return torch.softmax((q @ k.transpose(-2, -1)).float(), dim=-1).to(v.dtype) @ v


def bytes_of(x: Tensor, scale: float, zero: int) -> Tensor:
    """x as bytes and back, any shape, float32: (clamp(round(x / scale) + zero, 0, 255) - zero) * scale.

    Jacob et al., Quantization and Training of Neural Networks (2018), eq. 1; 0 stays 0.
    """
    return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale


def channel_levels(weight: Tensor) -> Tensor:
    """A convolution's weight [Cout, Cin, k, k] as 255 levels and back, the largest of each output channel kept."""
    scale = weight.abs().amax(dim=(1, 2, 3), keepdim=True) / 127
    return torch.where(scale > 0, (weight / scale).round() * scale, torch.zeros_like(weight))


def conv2d_int8(x: Tensor, weight: Tensor, bias: Tensor, scale: float, zero: int) -> Tensor:
    """A 3x3 convolution of bytes by 8-bit weights: x [B, Cin, H, W], weight [Cout, Cin, 3, 3] -> [B, Cout, H, W]."""
    return F.conv2d(bytes_of(x, scale, zero), channel_levels(weight), bias, padding=1)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / |x| * sqrt(C) * weight at each pixel of x [B, C, H, W], |x| over channels; weight [C].

    Zhang & Sennrich, Root Mean Square Layer Normalization (2019), without eps: |x| is at least 1e-12.
    """
    return (F.normalize(x.float(), dim=1) * (weight * weight.shape[0] ** 0.5)[:, None, None].float()).to(x.dtype)


def channel_layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight at each pixel of x [B, C, H, W], over channels; var biased; weight [C].

    Ba et al., Layer Normalization (2016), without bias.
    """
    h = x.float()
    mean = h.mean(dim=1, keepdim=True)
    var = (h - mean).square().mean(dim=1, keepdim=True)
    return ((h - mean) * torch.rsqrt(var + eps) * weight[:, None, None].float()).to(x.dtype)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(softmax_d(q) * scale) (softmax_n(k)^T v); q [B, heads, N, d], k and v [B, heads, M, d] -> [B, heads, N, d].

    softmax_d is over each query's channels, softmax_n over the tokens of each key channel.
    Shen et al., Efficient Attention (2018), eq. 5.
    """
    weights = k.float().softmax(dim=2).to(k.dtype)
    queries = (q.float().softmax(dim=3) * scale).to(q.dtype)
    return queries @ (weights.transpose(2, 3) @ v)


def fir_downsample(x: Tensor) -> Tensor:
    """x [B, C, H, W] filtered with (1, 3, 3, 1) / 8 each way (zeros outside), every second pixel: [B, C, H/2, W/2].

    The antialiased resampling of StyleGAN2 (Karras et al., 2020), as NCSN++ uses it.
    """
    return F.conv2d(x, _fir_kernel(x) / 64, stride=2, padding=1, groups=x.shape[1])


def fir_upsample(x: Tensor) -> Tensor:
    """x [B, C, H, W] with zeros between its pixels, filtered with (1, 3, 3, 1) / 4 each way: [B, C, 2H, 2W]."""
    return F.conv_transpose2d(x, _fir_kernel(x) / 16, stride=2, padding=1, groups=x.shape[1])


def _fir_kernel(x: Tensor) -> Tensor:
    """[C, 1, 4, 4], the sum over a channel is 64."""
    # Made on the device: a copy from the host cannot be part of a CUDA graph.
    line = torch.ones(4, dtype=x.dtype, device=x.device)
    line[1:3] = 3.0
    return torch.outer(line, line).expand(x.shape[1], 1, 4, 4)


def timestep_embedding(
    timestep: Tensor, dim: int, max_period: float = 10000.0, shift: float = 0.0, order: str = "cos_sin"
) -> Tensor:
    """Sinusoidal embedding [B, dim] of timestep [B] (float32, may be fractional).

    Frequencies are max_period^(-i / (dim // 2 - shift)); order: "cos_sin", "sin_cos" or "interleaved" (sin, cos, sin,
    cos, ...); an odd dim is padded with one zero. Vaswani et al. (2017), section 3.5.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timestep.device)
    freqs = torch.exp(-math.log(max_period) * index / (half - shift))
    return F.pad(_sin_and_cos(timestep.float()[:, None] * freqs[None], order), (0, dim - 2 * half))


def fourier_features(x: Tensor, frequencies: Tensor, order: str, keeps_input: bool) -> Tensor:
    """Sines and cosines of 2 pi x f for x [B] and frequencies [F]: [B, 2F], with x in front if keeps_input.

    Tancik et al., Fourier Features (2020), eq. 4.
    """
    features = _sin_and_cos(x[:, None] * frequencies[None] * (2.0 * math.pi), order)
    return torch.cat([x[:, None], features], dim=1) if keeps_input else features


def _sin_and_cos(angle: Tensor, order: str) -> Tensor:
    match order:
        case "cos_sin":
            return torch.cat([angle.cos(), angle.sin()], dim=1)
        case "sin_cos":
            return torch.cat([angle.sin(), angle.cos()], dim=1)
        case _:
            return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


@dataclass(frozen=True, slots=True)
class Coefficients:
    """One row of a solver's table for each image: tensors [B, 1, 1, 1], float32, named as in solver_update.

    percentile: None where no image has one.
    """

    A: Tensor
    B: Tensor
    clip: Tensor
    percentile: Tensor | None
    H: Tensor
    L0: Tensor
    L1: Tensor
    P: Tensor
    Q: Tensor
    E: Tensor
    R: Tensor
    G: Tensor
    S: Tensor
    K: Tensor
    N: Tensor
    O1: Tensor
    O2: Tensor
    O3: Tensor


@dataclass(frozen=True, slots=True)
class Known:
    """A part of the picture that is given: image, mask and noise [B, C, H, W]; mask is 1 where the picture is made.

    Lugmayr et al., RePaint (2022), eq. 8.
    """

    image: Tensor
    mask: Tensor
    noise: Tensor


def _term(coefficient: Tensor, operand: Tensor) -> Tensor:
    """coefficient * operand, and exactly 0 where the coefficient is 0, whatever the operand holds."""
    return torch.where(coefficient != 0, coefficient * operand, 0.0)


def limit_x0(x0: Tensor, clip: Tensor, percentile: Tensor | None) -> Tensor:
    """x0 [B, C, H, W] kept in a range; clip and percentile are [B, 1, 1, 1].

    Where percentile is None or 0: clamp(x0, -clip, clip), clip inf for no limit. Elsewhere dynamic thresholding: with
    s the quantile of an image's |x0| at percentile (in (0, 1], linear between elements), raised to 1 and cut at clip,
    clamp(x0, -s, s) / s. Saharia et al., Imagen (2022), section 2.3; the cut is diffusers' sample_max_value.
    """
    fixed = torch.maximum(torch.minimum(x0, clip), -clip)
    if percentile is None:
        return fixed
    magnitudes = x0.abs().flatten(1).sort(dim=1).values
    # In float64, because a position among more than 2^24 / 100 elements has no exact fraction in float32.
    position = percentile.reshape(-1, 1).double() * (magnitudes.shape[1] - 1)
    low = position.floor().long()
    high = (low + 1).clamp(max=magnitudes.shape[1] - 1)
    quantile = torch.lerp(
        magnitudes.gather(1, low).double(), magnitudes.gather(1, high).double(), position - low.double()
    )
    s = torch.minimum(quantile.to(x0.dtype).reshape(clip.shape).clamp(min=1.0), clip)
    return torch.where(percentile > 0, torch.maximum(torch.minimum(x0, s), -s) / s, fixed)


def solver_update(
    row: Coefficients,
    x_t: Tensor,
    out: Tensor,
    x0_before: Tensor | None = None,
    grad: Tensor | None = None,
    noise: Tensor | None = None,
    known: Known | None = None,
    older: Tensor | None = None,
    raw_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of any table-driven sampler: returns (x_prev, x0), each [B, C, H, W] float32.

        x0     = limit_x0(A*x_t + B*out, clip, percentile) + H*grad
        var    = exp(L0 + f*(L1 - L0)),  f = (v + 1)/2
        x_prev = P*x0 + Q*x_t + E*out + R*x0_before + O1*o1 + O2*o2 + O3*o3 + G*var*grad + S*sqrt(var)*noise
        x_prev = m*x_prev + (1 - m)*(K*image + N*z')      with a known image

    older: o1, o2, o3 as [3, B, C, H, W]. raw_out: [B, C, H, W] that E multiplies instead of out, where given. x_t,
    x0_before, grad, noise: [B, C, H, W] float32; None stands for an operand whose coefficients are all 0.
    out: [B, C, H, W], or [B, 2C, H, W] with v in the second half. Without v, f is 0.
    """
    channels = x_t.shape[1]
    mean_out = out[:, :channels]
    x0 = limit_x0(_term(row.A, x_t) + _term(row.B, mean_out), row.clip, row.percentile)
    if grad is not None:
        x0 = x0 + _term(row.H, grad)
    x_prev = _term(row.P, x0) + _term(row.Q, x_t) + _term(row.E, mean_out if raw_out is None else raw_out)
    if x0_before is not None:
        x_prev = x_prev + _term(row.R, x0_before)
    if older is not None:
        x_prev = x_prev + _term(row.O1, older[0]) + _term(row.O2, older[1]) + _term(row.O3, older[2])
    if grad is not None or noise is not None:
        x_prev = _with_variance(row, x_prev, out[:, channels:], grad, noise)
    return x_prev if known is None else _kept(row, x_prev, known), x0


def _with_variance(row: Coefficients, x_prev: Tensor, v: Tensor, grad: Tensor | None, noise: Tensor | None) -> Tensor:
    """x_prev + G*var*grad + S*sqrt(var)*noise; v [B, 0 or C, H, W]."""
    log_var = row.L0
    if v.shape[1] == x_prev.shape[1]:
        log_var = log_var + _term(row.L1 - row.L0, (v + 1) / 2)
    if grad is not None:
        x_prev = x_prev + _term(row.G, log_var.exp() * grad)
    if noise is not None:
        x_prev = x_prev + _term(row.S, (0.5 * log_var).exp() * noise)
    return x_prev


def _kept(row: Coefficients, x_prev: Tensor, known: Known) -> Tensor:
    there = _term(row.K, known.image) + _term(row.N, known.noise)
    # Where the mask is 1 nothing of the known image may reach the result, nor of what it holds there.
    return torch.where(known.mask == 1, x_prev, known.mask * x_prev + (1 - known.mask) * there)
