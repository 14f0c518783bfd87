"""The functions that a rewritten graph calls.

Sizes, dtypes and autocast are known when they run; where no kernel supports them, a function
computes what the original graph did.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkern import ops
from bitkern.ops import Conv
from bitkern.ops.convolution import convolution_parameters
from bitkern.ops.group_norm_act import modulated as modulated_affine
from bitkern.ops.ws_conv2d import conv_channels_last, conv_dtype
from bitkern.reference import ACTIVATIONS, Activation, compute_dtype
from bitkern.variant import Variant

# num_groups, weight, bias, eps, act; num_groups is None for one group per channel.
Affine = tuple[int | None, Tensor | None, Tensor | None, float, Activation]
# The name of the graph's function in torch, and its arguments behind the bias.
Call = tuple[str, tuple[Any, ...]]


def _groups(x: Tensor, num_groups: int | None) -> int | None:
    """The number of groups; None for inputs that ``F.instance_norm`` refuses."""
    if num_groups is not None:
        return num_groups
    return x.shape[1] if x.ndim > 2 and x.shape[2:].numel() > 1 else None


def modulated(
    x: Tensor,
    affine: tuple[Tensor | None, Tensor | None],
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of ``norm(x) * scale + shift``, which broadcast to (N, C, 1, …)."""
    scale, shift = (None if given is None else _per_channel(given, x) for given in (scale, shift))
    return modulated_affine(*affine, scale, shift)


def _per_channel(given: Tensor, x: Tensor) -> Tensor:
    """(C,), or (N, C) if there is one for each sample; in the dtype of the arithmetic."""
    given = given.to(compute_dtype(x.dtype)).flatten(1).expand(-1, x.shape[1])
    return given[0] if len(given) == 1 else given


def norm_act(x: Tensor, affine: Affine) -> Tensor:
    """``act(norm(x))``."""
    num_groups, weight, bias, eps, act = affine
    groups = _groups(x, num_groups)
    if groups is None:
        return ACTIVATIONS[act](F.instance_norm(x, weight=weight, bias=bias, eps=eps))
    return ops.group_norm_act(x, groups, weight, bias, eps, act)


def add_norm_act(x: Tensor, residual: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    """``summed = x + residual`` and ``act(norm(summed))``."""
    num_groups, weight, bias, eps, act = affine
    groups = _groups(x, num_groups)
    if groups is None or x.shape != residual.shape or x.dtype != residual.dtype:
        summed = x + residual
        return summed, norm_act(summed, affine)
    return ops.add_group_norm_act(x, residual, groups, weight, bias, eps, act)


def norm_add_relu(x: Tensor, residual: Tensor, affine: Affine) -> Tensor:
    """``relu(norm(x) + residual)``."""
    num_groups, weight, bias, eps, _ = affine
    groups = _groups(x, num_groups)
    if groups is None or x.shape != residual.shape or x.dtype != residual.dtype:
        return F.relu(norm_act(x, affine) + residual)
    return ops.group_norm_add_relu(x, residual, groups, weight, bias, eps)


def norm_act_conv(
    x: Tensor,
    residual: Tensor | None,
    affine: Affine,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    convs: Sequence[tuple[Any, ...]],
    calls: Sequence[Call],
) -> tuple[Tensor, ...]:
    """``summed = x (+ residual)`` and convolutions of ``act(norm(summed))``; the sum comes first.

    One node of autograd, which computes the activation again in backward, where the convolutions
    run in x's dtype; else autocast converts what each of them gets.
    """
    num_groups, weight, bias, eps, act = affine
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        x, residual = x + residual, None
    groups = _groups(x, num_groups)
    parameters = convolution_parameters(x, weights, biases)
    if groups is not None and parameters is not None:
        specs = [Conv(*conv) for conv in convs]
        summed, outs = ops.group_norm_act_conv(
            x, residual, groups, weight, bias, eps, act, *parameters, specs
        )
        return summed, *outs
    if residual is None:
        summed, a = x, norm_act(x, affine)
    else:
        summed, a = add_norm_act(x, residual, affine)
    each = zip(weights, biases, calls, strict=True)
    return summed, *(getattr(torch, name)(a, w, b, *rest) for w, b, (name, rest) in each)


class LazyWeights:
    """A group of weights for ``standardized_weight``."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        gains: Sequence[Tensor],
        scales: Sequence[float],
        variant: tuple[float, bool, bool],
    ) -> None:
        self.weights, self.scales, self.variant = weights, scales, Variant(*variant)
        self.gains = gains or None
        self.outs: dict[Any, list[Tensor]] = {}


def standardized_weight(group: LazyWeights, index: int, x: Tensor) -> Tensor:
    """A weight of a group, in the dtype in which a convolution of x runs.

    The first that is needed standardizes all in one launch.
    """
    weight = group.weights[0]
    dtype = conv_dtype(x, weight)
    key = dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    if key not in group.outs:
        group.outs[key] = ops.weight_standardize_all(
            group.weights,
            group.variant,
            gains=group.gains,
            scales=group.scales,
            dtype=dtype,
            channels_last=x.ndim == weight.ndim == 4 and conv_channels_last(x, weight),
        )
    return group.outs[key][index]
