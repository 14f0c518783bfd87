"""The mathematics of every operator in plain PyTorch.

These functions have the names and signatures of ``bitkern.ops``, run on any device and any
floating dtype (float64 included), and can be differentiated any number of times. Everything else
in the package is tested against them. 16-bit inputs are computed in float32 and rounded once.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkern.layout import cast_like
from bitkern.variant import SgdOptions, Variant

Activation = Literal["relu", "silu", "leaky_relu", "gelu", "mish", "hardswish", "none"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "none": lambda x: x,
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weight_standardize(
    weight: Tensor,
    eps: float = 1e-10,
    *,
    gain: Tensor | None = None,
    scale: float = 1.0,
    eps_outside: bool = False,
    unbiased: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Weight standardization (Qiao et al., arXiv 1903.10520), per output filter.

    With mean m and variance v of a filter: ``gain * scale * (w - m) / sqrt(v + eps)``, or
    ``/ (sqrt(v) + eps)`` with ``eps_outside``. See ``bitkern.ops.weight_standardize``.
    """
    w = weight.to(compute_dtype(weight.dtype)).flatten(1)
    centered = w - w.mean(1, keepdim=True)
    var = centered.square().sum(1, keepdim=True) / (w.shape[1] - int(unbiased))
    std = _root(var) + eps if eps_outside else (var + eps).sqrt()
    out = (centered / std).view_as(weight) * scale
    if gain is not None:
        out = out * gain.to(out.dtype).reshape(-1, *[1] * (weight.ndim - 1))
    return out.to(weight.dtype if dtype is None else dtype)


def _root(var: Tensor) -> Tensor:
    """sqrt(var), with the gradient 0 at 0, where its slope is infinite: a constant filter."""
    constant = var == 0
    return torch.where(constant, 1.0, var).sqrt().masked_fill(constant, 0.0)


def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: Activation = "relu",
) -> Tensor:
    """Group normalization (Wu & He, arXiv 1803.08494) followed by an activation.

    See ``bitkern.ops.group_norm_act``.
    """
    y = ACTIVATIONS[act](_group_norm(x, num_groups, weight, bias, eps))
    return cast_like(y, x)


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalize; the result has the dtype of the arithmetic."""
    dtype = compute_dtype(x.dtype)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    # torch.group_norm, because F.group_norm refuses groups of a single element.
    if all(p is None or p.ndim == 1 for p in (weight, bias)):
        return torch.group_norm(x.to(dtype), num_groups, weight, bias, eps)
    return _affine(torch.group_norm(x.to(dtype), num_groups, None, None, eps), weight, bias)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``weight * x + bias`` for parameters of (C,) or (N, C), in the dtype of x."""
    maps = [1] * (x.ndim - 2)
    if weight is not None:
        x = x * weight.to(x.dtype).reshape(*weight.shape, *maps)
    if bias is not None:
        x = x + bias.to(x.dtype).reshape(*bias.shape, *maps)
    return x


def add_group_norm_act(
    x: Tensor,
    residual: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: Activation = "relu",
) -> tuple[Tensor, Tensor]:
    """``summed = x + residual`` and ``group_norm_act(summed)``; returns both, the sum first.

    See ``bitkern.ops.add_group_norm_act``.
    """
    summed = x + residual
    return summed, group_norm_act(summed, num_groups, weight, bias, eps, act)


def group_norm_add_relu(
    x: Tensor,
    residual: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``relu(group_norm(x) + residual)``. See ``bitkern.ops.group_norm_add_relu``."""
    y = F.relu(_group_norm(x, num_groups, weight, bias, eps) + residual)
    return cast_like(y, x)


def ws_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    eps: float = 1e-10,
    *,
    gain: Tensor | None = None,
    scale: float = 1.0,
    eps_outside: bool = False,
    unbiased: bool = False,
) -> Tensor:
    """2-d convolution with a standardized weight. See ``bitkern.ops.ws_conv2d``."""
    options: Any = {"gain": gain, "scale": scale, "eps_outside": eps_outside, "unbiased": unbiased}
    weight = weight_standardize(weight, eps, dtype=x.dtype, **options)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


# The same operators as launchers, with the signatures of the kernels. The registered operators run
# them on tensors that no kernel supports; they are the formulas that the kernels implement. The
# backward formulas can be differentiated, also through statistics computed from the inputs.


def group_norm_act_forward(
    x: Tensor,
    residual: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: Activation,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """-> (summed or None, y, mean, rstd); mean and rstd are (N, num_groups)."""
    summed = x if residual is None else x + residual
    y = group_norm_act(summed, num_groups, weight, bias, eps, act)
    statistics = group_statistics(summed, num_groups, eps)
    return None if residual is None else summed, y, *statistics


def group_statistics(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """-> (mean, rstd), each (N, num_groups)."""
    dtype = compute_dtype(x.dtype)
    groups = x.to(dtype).reshape(x.shape[0], num_groups, x.shape[1:].numel() // num_groups)
    var, mean = torch.var_mean(groups, dim=2, correction=0)
    return mean, (var + eps).rsqrt()


def group_norm_act_recompute(
    summed: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    act: Activation,
) -> Tensor:
    """-> y, from what the forward returned besides it."""
    channels, maps = summed.shape[1], [1] * (summed.ndim - 2)

    def per_channel(statistic: Tensor) -> Tensor:
        return statistic.repeat_interleave(channels // num_groups, 1).reshape(-1, channels, *maps)

    y = (summed.to(mean.dtype) - per_channel(mean)) * per_channel(rstd)
    return ACTIVATIONS[act](_affine(y, weight, bias)).to(summed.dtype)


def group_norm_act_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    act: Activation,
    need_dx: bool,
    need_dparams: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """-> (dx, dweight, dbias), None where not wanted.

    With xh = (x - mean) * rstd, z = weight * xh + bias and g = dy * act'(z): dweight and dbias are
    the sums of g * xh and g over pixels, and over samples for parameters of (C,), and, the means
    being over a group,
    ``dx = rstd * (weight * g - mean(weight * g) - xh * mean(weight * g * xh)) + dsummed``.
    """
    n, channels = summed.shape[:2]
    dtype = mean.dtype
    grouped = (n, num_groups, channels // num_groups, summed.shape[2:].numel())

    def per_channel(parameter: Tensor | None, default: float) -> Tensor:
        if parameter is None:
            parameter = torch.full((channels,), default, device=summed.device)
        return parameter.to(dtype).reshape(*parameter.shape[:-1], *grouped[1:3], 1)

    def parameter_gradient(terms: Tensor, parameter: Tensor) -> Tensor:
        terms = terms.sum((0, 3) if parameter.ndim == 1 else 3)
        return terms.reshape(parameter.shape).to(parameter.dtype)

    def per_group(statistic: Tensor) -> Tensor:
        return statistic[:, :, None, None]

    xh = (summed.to(dtype).reshape(grouped) - per_group(mean)) * per_group(rstd)
    gamma = per_channel(weight, 1.0)
    z = gamma * xh + per_channel(bias, 0.0)
    g = dy.to(dtype).reshape(grouped)
    if act == "relu":
        g = torch.where(z <= 0, 0.0, g)
    elif act == "silu":
        sigmoid = z.sigmoid()
        g = g * sigmoid * (1 + z * (1 - sigmoid))
    elif act == "leaky_relu":
        g = torch.where(z > 0, g, 0.01 * g)
    elif act == "gelu":
        density = (-0.5 * z * z).exp() / math.sqrt(2 * math.pi)
        g = g * (torch.special.ndtr(z) + z * density)
    elif act == "mish":
        t = F.softplus(z).tanh()
        g = g * (t + z * z.sigmoid() * (1 - t * t))
    elif act == "hardswish":
        slope = torch.where(z >= 3, 1.0, z / 3 + 0.5)
        g = torch.where(z <= -3, 0.0, g * slope)
    dx = dweight = dbias = None
    if need_dx:
        h = gamma * g
        dx = h - h.mean((2, 3), keepdim=True) - xh * (h * xh).mean((2, 3), keepdim=True)
        dx = (per_group(rstd) * dx).reshape(summed.shape)
        if dsummed is not None:
            dx = dx + dsummed
        dx = cast_like(dx, summed)
    if need_dparams and weight is not None:
        dweight = parameter_gradient(g * xh, weight)
    if need_dparams and bias is not None:
        dbias = parameter_gradient(g, bias)
    return dx, dweight, dbias


def group_norm_add_relu_forward(
    x: Tensor,
    residual: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (y, mean, rstd); mean and rstd are (N, num_groups)."""
    y = group_norm_add_relu(x, residual, num_groups, weight, bias, eps)
    return y, *group_statistics(x, num_groups, eps)


def group_norm_add_relu_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_dx: bool,
    need_dresidual: bool,
    need_dparams: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """-> (dx, dresidual, dweight, dbias), None where not wanted.

    dresidual is g = dy where ReLU was not at 0, which y tells; the others are the gradients of
    group normalization alone, into which g comes.
    """
    g = torch.where(y <= 0, 0.0, dy)
    dx, dweight, dbias = group_norm_act_backward(
        g, None, x, num_groups, weight, bias, mean, rstd, "none", need_dx, need_dparams
    )
    return dx, g if need_dresidual else None, dweight, dbias


def weight_standardize_forward(
    weights: Sequence[Tensor],
    gains: Sequence[Tensor] | None,
    scales: Sequence[float],
    variant: Variant,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[list[Tensor], Tensor]:
    """-> (outs, stats); stats is (2, filters of all layers): mean, and std without an outer eps."""
    options: Any = {"dtype": dtype, **variant._asdict()}
    every: Sequence[Tensor | None] = gains or [None] * len(weights)
    format = torch.channels_last if channels_last else torch.contiguous_format
    outs = [
        weight_standardize(w, gain=gain, scale=scale, **options).contiguous(memory_format=format)
        for w, gain, scale in zip(weights, every, scales, strict=True)
    ]
    return outs, filter_statistics(weights, variant)


def filter_statistics(weights: Sequence[Tensor], variant: Variant) -> Tensor:
    """-> (2, filters of all layers): mean, and std without an outer eps."""
    eps, eps_outside, unbiased = variant
    stats = []
    for w in weights:
        w = w.to(compute_dtype(w.dtype)).flatten(1)
        var, mean = torch.var_mean(w, 1, correction=int(unbiased))
        stats.append(torch.stack([mean, _root(var) if eps_outside else (var + eps).sqrt()]))
    return torch.cat(stats, 1)


def weight_standardize_backward(
    douts: Sequence[Tensor],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor] | None,
    scales: Sequence[float],
    stats: Tensor,
    variant: Variant,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """-> (dweights, dgains or None).

    With c = w - mean, d the denominator, wh = c / d, g = gain * scale * dout and K' the divisor
    of the variance: ``dgain = scale * sum(dout * wh)`` and
    ``dw = (g - mean(g) - c / std * sum(g * wh) / K') / d``, the last term 0 where std is 0.
    """
    eps, eps_outside, unbiased = variant
    dweights, dgains = [], []
    by_layer = torch.split(stats, [w.shape[0] for w in weights], 1)
    for i, (dout, w, (mean, std)) in enumerate(zip(douts, weights, by_layer, strict=True)):
        mean, std = mean[:, None], std[:, None]
        denominator = std + eps if eps_outside else std
        c = w.to(mean.dtype).flatten(1) - mean
        wh = c / denominator
        g = dout.to(mean.dtype).reshape(c.shape) * scales[i]
        if gains is not None:
            dgains.append((g * wh).sum(1).to(gains[i].dtype).view_as(gains[i]))
            g = g * gains[i].to(mean.dtype).reshape(-1, 1)
        direction = torch.where(std == 0, 0.0, c / std.masked_fill(std == 0, 1.0))
        projection = direction * (g * wh).sum(1, keepdim=True) / (c.shape[1] - int(unbiased))
        dw = (g - g.mean(1, keepdim=True) - projection) / denominator
        dweights.append(cast_like(dw.view(w.shape), w))
    return dweights, dgains if gains is not None else None


def weight_standardize_sgd(
    douts: Sequence[Tensor],
    weights: Sequence[Tensor],
    buffers: Sequence[Tensor],
    scales: Sequence[float],
    stats: Tensor,
    variant: Variant,
    options: SgdOptions,
) -> None:
    """Backward, and a step of SGD on weights and the buffers of their momentum, in place."""
    lr, momentum, dampening, weight_decay, nesterov = options
    grads, _ = weight_standardize_backward(douts, weights, None, scales, stats, variant)
    for weight, buffer, grad in zip(weights, buffers, grads, strict=True):
        grad = grad.add(weight, alpha=weight_decay)
        buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
        weight.sub_((grad.add(buffer, alpha=momentum) if nesterov else buffer) * lr)
