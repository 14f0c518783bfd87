"""A norm, its activation and the convolutions behind it as one node of the autograd graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitkern import _torch, ops
from bitkern.nn.activations import act_of, idle
from bitkern.nn.layers import GroupNormAct, WSConv2d, conv_fusion
from bitkern.nn.norms import InstanceNorm
from bitkern.ops import Conv, group_norm_act, group_norm_add_relu
from bitkern.ops.ws_conv2d import autocast_dtype
from bitkern.reference import ACTIVATIONS, Activation

torch.fx.wrap("group_norm_act")  # recorded as it is

# What comes after a norm: a module, or an activation that is a function.
After = nn.Module | Activation


def watched(module: nn.Module) -> bool:
    """Whether somebody sees a module being called: a hook, or a forward put over its own."""
    return _torch.hooked(module) or "forward" in vars(module)


# By the function, not the class: classes that bitkern.convert puts in have it, and a subclass with
# a forward of its own has not.
_FORWARDS = GroupNormAct.forward, InstanceNorm.forward


def fused_act(norm: Any, after: Sequence[After] = (), x: Tensor | None = None) -> Activation | None:
    """The activation that a kernel computes with a norm, its own or one of those after it.

    None if norm is no such module, if the kernel cannot do all that comes after it, or if it does
    not take x.
    """
    if getattr(type(norm), "forward", None) not in _FORWARDS or watched(norm):
        return None
    if x is not None and not norm.takes(x):
        return None
    act: Activation
    act, modules = norm.fusion()
    for part in (*modules, *after):
        if isinstance(part, nn.Module):
            if watched(part):
                return None
            if idle(part):
                continue
        following = act_of(part) if isinstance(part, nn.Module) else part
        if act != "none" or following is None:
            return None
        act = following
    return act


def fusible_conv(module: nn.Module) -> tuple[nn.Module, Conv] | None:
    """The convolution that a module is and nothing but; None if it cannot be fused."""
    if watched(module):
        return None
    if type(module).forward is nn.Sequential.forward:
        parts = list(module.children())
        return fusible_conv(parts[0]) if len(parts) == 1 else None
    if isinstance(module, WSConv2d):
        conv = module.fusion()
    elif _torch.plain_conv(module):
        conv = conv_fusion(module)
    else:
        return None
    return None if conv is None else (module, conv)


def _parameters(conv: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution of x, as its forward hands them to PyTorch's function."""
    if isinstance(conv, WSConv2d):
        weight = conv.standardize(x)
        return weight, None if conv.bias is None else conv.bias.to(weight.dtype)
    weight, bias = conv.weight, conv.bias
    if autocast_dtype(x) == x.dtype:
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    return weight, bias


def apply_after(after: Sequence[After], y: Tensor) -> Tensor:
    """What comes after a norm, one by one."""
    for part in after:
        y = part(y) if isinstance(part, nn.Module) else ACTIVATIONS[part](y)
    return y


def norm_act(norm: Any, after: Sequence[After], x: Tensor) -> Tensor:
    """A norm, and the activation among what comes after it, in one kernel where it can."""
    act = fused_act(norm, after, x)
    if act is None:
        return apply_after(after, norm(x))
    return group_norm_act(x, norm.num_groups, norm.weight, norm.bias, norm.eps, act)


def norm_add_relu(
    norm: Any,
    after: Sequence[After],
    relu: After,
    x: Tensor,
    residual: Tensor,
    in_place: bool,
) -> Tensor:
    """``relu(norm(x) + residual)`` in one kernel where it can; else the sum ``in_place`` or not."""
    activation = act_of(relu) if isinstance(relu, nn.Module) and not watched(relu) else relu
    alike = residual.shape == x.shape and residual.dtype == x.dtype
    if activation == "relu" and alike and fused_act(norm, after, x) == "none":
        affine = norm.num_groups, norm.weight, norm.bias, norm.eps
        return group_norm_add_relu(x, residual, *affine)
    y = apply_after(after, norm(x))
    return apply_after([relu], y.add_(residual) if in_place else y + residual)


def norm_act_conv(
    norm: Any,
    convs: Sequence[nn.Module],
    x: Tensor,
    residual: Tensor | None = None,
    recompute: bool = True,
    after: Sequence[After] = (),
) -> tuple[Tensor, list[Tensor]]:
    """``s = x (+ residual)`` and ``[conv(norm(s)) for conv in convs]``, fused; returns (s, list).

    What a pre-activation block is made of. For backward it keeps s and computes ``norm(s)`` once
    more (``bitkern.ops.group_norm_act_conv``); with ``recompute=False`` it keeps both.
    Modules with hooks are called as modules, so that the hooks see what they always see.

    Args:
        norm: a ``GroupNormAct``; any other module is called.
        convs: modules applied to ``norm(s)``; fused where they are bare ``WSConv2d`` or
            convolutions of PyTorch.
        x, residual: (N, C, *); residual may be None.
        after: what stands between norm and convolutions: an activation, idle modules.
    """
    act = fused_act(norm, after, x)
    if act is None:
        s = x if residual is None else x + residual
        activation = apply_after(after, norm(s))
        return s, [conv(activation) for conv in convs]
    affine = norm.num_groups, norm.weight, norm.bias, norm.eps, act
    fused = [found for found in map(fusible_conv, convs) if found]
    if recompute and len(fused) == len(convs):
        parameters = [_parameters(conv, x) for conv, _ in fused]
        given = [p for pair in parameters for p in pair if p is not None]
        as_it_is = autocast_dtype(x) in (None, x.dtype) and all(p.dtype == x.dtype for p in given)
        if as_it_is and all(w.ndim == x.ndim for w, _ in parameters):
            weights, biases = zip(*parameters, strict=True)
            specs = [conv for _, conv in fused]
            return ops.group_norm_act_conv(x, residual, *affine, weights, biases, specs)
    if residual is None:
        s, activation = x, group_norm_act(x, *affine)
    else:
        s, activation = ops.add_group_norm_act(x, residual, *affine)
    return s, [conv(activation) for conv in convs]


def add_norm_act_convs(
    norm: Any,
    after: Sequence[After],
    convs: Sequence[nn.Module],
    x: Tensor,
    residual: Tensor,
    in_place: bool,
) -> tuple[Tensor, list[Tensor]]:
    """``norm_act_conv`` of a sum that is wanted; ``in_place`` or not where it is no such."""
    if residual.shape == x.shape and residual.dtype == x.dtype:
        return norm_act_conv(norm, convs, x, residual, after=after)
    return norm_act_conv(norm, convs, x.add_(residual) if in_place else x + residual, after=after)


def norm_act_convs(
    norm: Any, after: Sequence[After], convs: Sequence[nn.Module], x: Tensor
) -> list[Tensor]:
    """``norm_act_conv``, of which nobody wants the sum."""
    return norm_act_conv(norm, convs, x, after=after)[1]
