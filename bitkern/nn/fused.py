"""A norm, its activation and the convolutions behind it as one node of the autograd graph."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitkern import _torch, ops
from bitkern.backends import requested
from bitkern.nn.layers import GroupNormAct, WSConv2d, conv_fusion
from bitkern.ops import Conv, group_norm_act
from bitkern.reference import Activation

torch.fx.wrap("group_norm_act")  # recorded as it is


def watched(module: nn.Module) -> bool:
    """Whether somebody sees a module being called: a hook, or a forward put over its own."""
    return _torch.hooked(module) or "forward" in vars(module)


def fused_act(norm: nn.Module) -> Activation | None:
    """The activation of a norm that a kernel computes with it; None if it is no such module."""
    # By the function, not the class: classes that bitkern.convert puts in have it, and a subclass
    # with a forward of its own has not.
    if getattr(type(norm), "forward", None) is not GroupNormAct.forward or watched(norm):
        return None
    act, modules = norm.fusion()  # type: ignore[operator]
    return None if modules else act


def _fused_conv(module: nn.Module) -> tuple[nn.Conv2d, Conv] | None:
    """The convolution that a module is and nothing but; None if it cannot be fused."""
    if watched(module):
        return None
    if type(module) is nn.Sequential and len(module) == 1:
        return _fused_conv(module[0])
    if isinstance(module, WSConv2d):
        conv = module.fusion()
    elif isinstance(module, nn.Conv2d) and _torch.plain_conv(module):
        conv = conv_fusion(module)
    else:
        return None
    return None if conv is None else (module, conv)


def norm_act_conv(
    norm: nn.Module,
    convs: Sequence[nn.Module],
    x: Tensor,
    residual: Tensor | None = None,
    recompute: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """``s = x (+ residual)`` and ``[conv(norm(s)) for conv in convs]``, fused; returns (s, list).

    What a pre-activation block is made of. For backward it keeps s and computes ``norm(s)`` once
    more (:func:`bitkern.ops.group_norm_act_conv2d`); with ``recompute=False`` it keeps both.
    Modules with hooks are called as modules, so that the hooks see what they always see.

    Args:
        norm: a :class:`GroupNormAct`; any other module is called.
        convs: modules applied to ``norm(s)``; fused where they are bare :class:`WSConv2d` or
            ``nn.Conv2d``.
        x, residual: (N, C, H, W); residual may be None.
    """
    act = fused_act(norm)
    if act is None:
        s = x if residual is None else x + residual
        activation = norm(s)
        return s, [conv(activation) for conv in convs]
    assert isinstance(norm, nn.GroupNorm)
    affine = norm.num_groups, norm.weight, norm.bias, norm.eps, act
    fused = [found for found in map(_fused_conv, convs) if found]
    # The node is eager and differentiated once. Whoever asks for plain PyTorch gets it.
    plain = torch.compiler.is_compiling() or requested() == "reference" or _torch.transformed()
    if recompute and len(fused) == len(convs) and not plain:
        weights = [c.standardize(x) if isinstance(c, WSConv2d) else c.weight for c, _ in fused]
        if all(w.dtype == x.dtype for w in weights):
            specs = [conv for _, conv in fused]
            return ops.group_norm_act_conv2d(x, residual, *affine, weights, specs)
    if residual is None:
        s, activation = x, group_norm_act(x, *affine)
    else:
        s, activation = ops.add_group_norm_act(x, residual, *affine)
    return s, [conv(activation) for conv in convs]
