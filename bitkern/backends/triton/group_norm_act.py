"""Launchers of GroupNorm + activation."""

from typing import NamedTuple

import torch

from bitkern.backends.backend import empty_normalized
from bitkern.backends.triton import config
from bitkern.backends.triton.kernels import group_norm_act_backward as backward
from bitkern.backends.triton.kernels import group_norm_act_forward as forward
from bitkern.backends.triton.launch import launch


class _Problem(NamedTuple):
    """Arguments that the launches of the kernels have in common."""

    plan: config.GroupNormPlan
    programs: int  # of each split
    sizes: tuple  # channels, pixels, group_size, block, tiles, splits
    options: tuple  # the first constexpr arguments
    one_group: bool  # a program has one group


def _problem(x, num_groups, tensors):
    samples, channels = x.shape[:2]
    pixels = x.numel() // (samples * channels)
    channels_last = pixels == 1 or not x.is_contiguous()
    plan = config.group_norm_plan(
        channels, pixels, num_groups, x.element_size(), channels_last, tensors
    )
    group_size = channels // num_groups
    sizes = (channels, pixels, group_size, plan.block, plan.tiles, plan.splits)
    reach = plan.depth * plan.rows * channels if channels_last else plan.lanes * pixels
    wide = max(reach, pixels) >= 2**31
    options = (channels_last, plan.unit, plan.depth, plan.rows, plan.lanes, wide)
    programs = samples * -(-channels // plan.block)
    return _Problem(plan, programs, sizes, options, plan.block == group_size)


def _per_sample(weight, bias):
    """Return whether the parameters are (N, C)."""
    parameter = bias if weight is None else weight
    return parameter is not None and parameter.ndim == 2


def group_norm_act_forward(x, residual, num_groups, weight, bias, eps, act, shortcut=None):
    """``(summed or None, y, mean, rstd)``; summed = x + residual if there is a residual.

    x (N, C, *spatial), dense, NCHW or channels_last; residual and shortcut, which is added
    before the activation, alike; weight and bias both (C,) or both (N, C), or None; mean,
    rstd (N, G) fp32.
    """
    out, y, mean, rstd = empty_normalized(x, residual, num_groups)
    if x.numel() == 0:
        return out, y, mean.zero_(), rstd.zero_()
    summed = x if out is None else out
    tensors, eps = 1 if residual is None else 2, float(eps)
    problem = _problem(x, num_groups, tensors)
    plan, programs = problem.plan, problem.programs
    pointers = (x, residual, shortcut, summed, y, weight, bias, mean, rstd)
    affine = _per_sample(weight, bias), act
    if plan.splits == 1:
        kernel = forward.group_norm_act_forward_whole
        if plan.on_chip:
            kernel = forward.group_norm_act_forward_on_chip
        numbers = (*problem.sizes[:4], eps)
        constants = (*problem.options, problem.one_group, *affine)
        launch(kernel, programs, pointers, numbers, constants, plan.warps)
        return out, y, mean, rstd
    partial = mean.new_empty((x.shape[0], plan.splits, num_groups, 2))
    programs *= plan.splits
    pointers, constants = (x, residual, summed, partial), (*problem.options, problem.one_group)
    kernel = forward.group_norm_act_forward_reduce
    launch(kernel, programs, pointers, problem.sizes, constants, plan.warps)
    pointers = (summed, shortcut, y, weight, bias, mean, rstd, partial)
    constants = (*problem.options, *affine, config.max_splits(plan.lanes))
    kernel = forward.group_norm_act_forward_apply
    launch(kernel, programs, pointers, (*problem.sizes, eps), constants, plan.warps)
    return out, y, mean, rstd


def group_norm_act_recompute(summed, num_groups, weight, bias, mean, rstd, act):
    """y, from what the forward returned besides it, in one pass."""
    y = torch.empty_like(summed)
    if summed.numel() == 0:
        return y
    problem = _problem(summed, num_groups, 1)
    plan, programs = problem.plan, problem.programs * problem.plan.splits
    pointers = (summed, y, weight, bias, mean, rstd)
    constants = (*problem.options, problem.one_group, _per_sample(weight, bias), act)
    kernel = forward.group_norm_act_recompute
    launch(kernel, programs, pointers, problem.sizes, constants, plan.warps)
    return y


def group_norm_act_backward(
    dy, dsummed, summed, num_groups, weight, bias, mean, rstd, act, need_dx, need_dparams,
    y=None, dshortcut=None,
):  # fmt: skip
    """``(dx or None, dweight or None, dbias or None)``; dsummed, if any, is added to dx.

    dy, dsummed in the format of summed. The parameters' gradients have their dtypes. After a
    forward with a shortcut, whose act was ReLU, y is its result; dshortcut, if any, is written to.
    """
    dx = torch.empty_like(summed) if need_dx else None
    dweight = torch.empty_like(weight) if need_dparams and weight is not None else None
    dbias = torch.empty_like(bias) if need_dparams and bias is not None else None
    if summed.numel() == 0:
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient.zero_()
        return dx, dweight, dbias
    samples, channels = summed.shape[:2]
    parts, sums_samples = [dweight, dbias], samples > 1 and not _per_sample(weight, bias)
    if sums_samples:
        parts = [None if p is None else mean.new_empty((samples, channels)) for p in parts]
    maps = dy, dsummed, summed, y, dx, dshortcut
    _backward(maps, num_groups, weight, bias, mean, rstd, parts, act)
    if sums_samples and (dweight is not None or dbias is not None):
        launch(
            backward.group_norm_act_sum_samples, -(-channels // 32), (*parts, dweight, dbias),
            (samples, channels), (64, 32), 4,
        )  # fmt: skip
    return dx, dweight, dbias


def _backward(maps, num_groups, weight, bias, mean, rstd, parts, act):
    dy, _, summed, y, *_ = maps
    problem = _problem(summed, num_groups, 2)  # two: g takes the registers of y
    plan, programs, sizes = problem.plan, problem.programs, problem.sizes
    constants = (*problem.options, problem.one_group, _per_sample(weight, bias), act)
    pointers = (*maps, weight, bias, mean, rstd, *parts)
    if plan.splits == 1:
        kernel = backward.group_norm_act_backward_whole
        if plan.on_chip:
            kernel = backward.group_norm_act_backward_on_chip
        launch(kernel, programs, pointers, sizes[:4], constants, plan.warps)
        return
    programs *= plan.splits
    partial = mean.new_empty((summed.shape[0], plan.splits, summed.shape[1], 2))
    needed = (dy, summed, y, weight, bias, mean, rstd, partial)
    kernel = backward.group_norm_act_backward_reduce
    launch(kernel, programs, needed, sizes, constants, plan.warps)
    kernel = backward.group_norm_act_backward_apply
    constants = (*constants, config.max_splits(plan.lanes))
    launch(kernel, programs, (*pointers, partial), sizes, constants, plan.warps)
