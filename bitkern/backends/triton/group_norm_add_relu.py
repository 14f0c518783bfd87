"""Launchers of GroupNorm + residual + ReLU: those of GroupNorm + activation, with a shortcut."""

import torch

from bitkern.backends.triton import group_norm_act as norm


def group_norm_add_relu_forward(x, residual, num_groups, weight, bias, eps):
    """``(y, mean, rstd)``; residual in the format of x."""
    args = x, None, num_groups, weight, bias, eps, "relu"
    return norm.group_norm_act_forward(*args, shortcut=residual)[1:]


def group_norm_add_relu_backward(
    dy, x, y, num_groups, weight, bias, mean, rstd, need_dx, need_dresidual, need_dparams
):
    """``(dx, dresidual, dweight, dbias)``, None where not wanted; dy, y in the format of x."""
    dresidual = torch.empty_like(x) if need_dresidual else None
    args = num_groups, weight, bias, mean, rstd, "relu", need_dx, need_dparams
    dx, dweight, dbias = norm.group_norm_act_backward(dy, None, x, *args, y=y, dshortcut=dresidual)
    return dx, dresidual, dweight, dbias
