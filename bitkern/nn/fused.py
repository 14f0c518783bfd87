"""A norm, its activation and the convolutions behind it as one node of the autograd graph."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from bitkern import _torch, ops
from bitkern.nn.layers import GroupNormAct, WSConv2d, conv_fusion
from bitkern.nn.norms import InstanceNorm
from bitkern.ops import Conv
from bitkern.ops.convolution import convolution_parameters
from bitkern.ops.group_norm_act import sum_group_norm_act
from bitkern.reference import Activation


def has_hooks(module: nn.Module) -> bool:
    """Return True if a module has hooks, or a forward of its instance."""
    return _torch.hooked(module) or "forward" in vars(module)


# Compared by function, not by class: the classes of bitkern.convert share it, and a subclass that
# overrides forward does not have it.
_FORWARDS = GroupNormAct.forward, InstanceNorm.forward


def fused_act(norm: Any, x: Tensor) -> Activation | None:
    """The activation that a kernel computes together with a norm of x; None if it cannot."""
    if (
        getattr(type(norm), "forward", None) not in _FORWARDS
        or has_hooks(norm)
        or not norm.takes(x)
    ):
        return None
    act: Activation
    act, modules = norm.fusion()
    return None if modules else act


def fusible_conv(module: nn.Module) -> tuple[nn.Module, Conv] | None:
    """The single convolution that a module computes; None if it cannot be fused."""
    if has_hooks(module):
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
    return conv.weight, conv.bias


def norm_act_conv(
    norm: Any,
    convs: Sequence[nn.Module],
    x: Tensor,
    residual: Tensor | None = None,
    recompute: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """``summed = x (+ residual)`` and a list of ``conv(norm(summed))``, fused; returns both.

    For backward it keeps the sum and computes ``norm(summed)`` once more
    (``bitkern.ops.group_norm_act_conv``); with ``recompute=False`` it keeps both.
    Modules with hooks are called as modules, so that the hooks see what they always see.

    Args:
        norm: a ``GroupNormAct``; any other module is called.
        convs: modules applied to ``norm(summed)``; fused where they are bare ``WSConv2d`` or
            convolutions of PyTorch.
        x, residual: (N, C, *); residual may be None.
    """
    act = fused_act(norm, x)
    if act is None:
        summed = x if residual is None else x + residual
        activation = norm(summed)
        return summed, [conv(activation) for conv in convs]
    affine = norm.num_groups, norm.weight, norm.bias, norm.eps, act
    fused = [found for found in map(fusible_conv, convs) if found]
    if recompute and len(fused) == len(convs):
        pairs = [_parameters(conv, x) for conv, _ in fused]
        parameters = convolution_parameters(x, [w for w, _ in pairs], [b for _, b in pairs])
        if parameters is not None and all(w.ndim == x.ndim for w, _ in pairs):
            specs = [conv for _, conv in fused]
            return ops.group_norm_act_conv(x, residual, *affine, *parameters, specs)
    summed, activation = sum_group_norm_act(x, residual, *affine)
    return summed, [conv(activation) for conv in convs]
