"""Launchers of GroupNorm + activation."""

import torch

from bitkern.backends.triton import config
from bitkern.backends.triton.kernels import group_norm_act_backward as backward
from bitkern.backends.triton.kernels import group_norm_act_forward as forward
from bitkern.backends.triton.launch import launch


def _problem(x, num_groups, tensors):
    """The plan for x, programs for each split, the kernels' sizes and first constexpr arguments;
    whether a program has one group."""
    samples, channels = x.shape[:2]
    pixels = x.numel() // (samples * channels)
    channels_last = pixels == 1 or not x.is_contiguous()
    plan = config.group_norm_plan(
        channels, pixels, num_groups, x.element_size(), channels_last, tensors
    )
    size = channels // num_groups
    sizes = (channels, pixels, size, plan.block, plan.tiles, plan.splits)
    reach = plan.depth * plan.rows * channels if channels_last else plan.lanes * pixels
    wide = max(reach, pixels) >= 2**31
    options = (channels_last, plan.unit, plan.depth, plan.rows, plan.lanes, wide)
    return plan, samples * -(-channels // plan.block), sizes, options, plan.block == size


def _per_sample(weight, bias):
    """Whether they are (N, C), the one that is there or both."""
    parameter = bias if weight is None else weight
    return parameter is not None and parameter.ndim == 2


def group_norm_act_forward(x, residual, num_groups, weight, bias, eps, act, addend=None):
    """``(total or None, y, mean, rstd)``; total = x + residual if there is a residual.

    x (N, C, *spatial), dense, NCHW or channels_last; residual and addend, which the activation sees
    added to what is normalized, alike; weight and bias both (C,) or both (N, C), or None; mean,
    rstd (N, G) fp32.
    """
    out = None if residual is None else torch.empty_like(x)
    y = torch.empty_like(x)
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return out, y, mean.zero_(), rstd.zero_()
    total = x if out is None else out
    tensors, eps = 1 if residual is None else 2, float(eps)
    plan, programs, sizes, options, one_group = _problem(x, num_groups, tensors)
    pointers = (x, residual, addend, total, y, weight, bias, mean, rstd)
    affine = _per_sample(weight, bias), act
    if plan.splits == 1:
        kernel = forward.group_norm_act_forward_whole
        if plan.on_chip:
            kernel = forward.group_norm_act_forward_on_chip
        numbers, constants = (*sizes[:4], eps), (*options, one_group, *affine)
        launch(kernel, programs, pointers, numbers, constants, plan.warps)
        return out, y, mean, rstd
    partial = mean.new_empty((x.shape[0], plan.splits, num_groups, 2))
    programs *= plan.splits
    pointers, constants = (x, residual, total, partial), (*options, one_group)
    kernel = forward.group_norm_act_forward_reduce
    launch(kernel, programs, pointers, sizes, constants, plan.warps)
    pointers = (total, addend, y, weight, bias, mean, rstd, partial)
    constants = (*options, *affine, config.max_splits(plan.lanes))
    kernel = forward.group_norm_act_forward_apply
    launch(kernel, programs, pointers, (*sizes, eps), constants, plan.warps)
    return out, y, mean, rstd


def group_norm_act_recompute(total, num_groups, weight, bias, mean, rstd, act):
    """y, from what the forward returned besides it, in one pass."""
    y = torch.empty_like(total)
    if total.numel() == 0:
        return y
    plan, programs, sizes, options, one_group = _problem(total, num_groups, 1)
    pointers = (total, y, weight, bias, mean, rstd)
    constants = (*options, one_group, _per_sample(weight, bias), act)
    kernel = forward.group_norm_act_recompute
    launch(kernel, programs * plan.splits, pointers, sizes, constants, plan.warps)
    return y


def group_norm_act_backward(
    dy, dtotal, total, num_groups, weight, bias, mean, rstd, act, need_dx, need_dparams,
    y=None, daddend=None,
):  # fmt: skip
    """``(dx or None, dweight or None, dbias or None)``; dtotal, if any, is added to dx.

    dy, dtotal in the format of total. The parameters' gradients have their dtypes. After a forward
    with an addend, whose act was ReLU, y is what it returned; daddend, if any, is written to.
    """
    dx = torch.empty_like(total) if need_dx else None
    dweight = torch.empty_like(weight) if need_dparams and weight is not None else None
    dbias = torch.empty_like(bias) if need_dparams and bias is not None else None
    if total.numel() == 0:
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient.zero_()
        return dx, dweight, dbias
    samples, channels = total.shape[:2]
    parts, summed = [dweight, dbias], samples > 1 and not _per_sample(weight, bias)
    if summed:
        parts = [None if p is None else mean.new_empty((samples, channels)) for p in parts]
    maps = dy, dtotal, total, y, dx, daddend
    _backward(maps, num_groups, weight, bias, mean, rstd, parts, act)
    if summed and (dweight is not None or dbias is not None):
        launch(
            backward.group_norm_act_sum_samples, -(-channels // 32), (*parts, dweight, dbias),
            (samples, channels), (64, 32), 4,
        )  # fmt: skip
    return dx, dweight, dbias


def _backward(maps, num_groups, weight, bias, mean, rstd, parts, act):
    dy, _, total, y, *_ = maps
    plan, programs, sizes, options, one_group = _problem(total, num_groups, 2)  # y gives way to g
    constants = (*options, one_group, _per_sample(weight, bias), act)
    pointers = (*maps, weight, bias, mean, rstd, *parts)
    if plan.splits == 1:
        kernel = backward.group_norm_act_backward_whole
        if plan.on_chip:
            kernel = backward.group_norm_act_backward_on_chip
        launch(kernel, programs, pointers, sizes[:4], constants, plan.warps)
        return
    programs *= plan.splits
    partial = mean.new_empty((total.shape[0], plan.splits, total.shape[1], 2))
    needed = (dy, total, y, weight, bias, mean, rstd, partial)
    kernel = backward.group_norm_act_backward_reduce
    launch(kernel, programs, needed, sizes, constants, plan.warps)
    kernel = backward.group_norm_act_backward_apply
    constants = (*constants, config.max_splits(plan.lanes))
    launch(kernel, programs, (*pointers, partial), sizes, constants, plan.warps)
