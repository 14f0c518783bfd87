"""Launchers of GroupNorm + activation."""

import torch

from bitkern.backends.triton import config
from bitkern.backends.triton.kernels import group_norm_act as kernels
from bitkern.backends.triton.launch import device_of, launch


def _problem(x, num_groups, act, tensors):
    """The plan for x, the kernels' sizes and their constexpr arguments but the stage."""
    samples, channels = x.shape[:2]
    pixels = x.numel() // (samples * channels)
    channels_last = pixels == 1 or not x.is_contiguous()
    plan = config.group_norm_plan(
        channels, pixels, num_groups, x.element_size(), channels_last, tensors
    )
    size = channels // num_groups
    sizes = (channels, pixels, size, plan.block, plan.tiles, plan.splits)
    reach = plan.depth * plan.rows * channels if channels_last else plan.lanes * pixels
    options = (
        channels_last, plan.unit, plan.depth, plan.rows, plan.lanes, max(reach, pixels) >= 2**31,
        plan.block == size, config.max_splits(plan.lanes), act,
    )  # fmt: skip
    return plan, sizes, options


def _launch(kernel, x, plan, pointers, sizes, more_numbers, options, tensors):
    """One launch, or two for each chunk of samples."""
    samples, blocks = x.shape[0], -(-sizes[0] // plan.block)
    device = device_of(x.get_device())
    if config.in_one_launch(plan, samples * blocks, device.multiprocessors):
        options = (*options, "on_chip" if plan.on_chip else "whole")
        launch(kernel, samples * blocks, pointers, (*sizes, 0, *more_numbers), options, plan.warps)
        return
    sample_bytes = tensors * x.element_size() * x.numel() // samples
    chunk = config.samples_per_chunk(samples, sample_bytes, device.l2_bytes)
    for first in range(0, samples, chunk):
        grid = min(chunk, samples - first) * blocks * plan.splits
        numbers = (*sizes, first, *more_numbers)
        launch(kernel, grid, pointers, numbers, (*options, "reduce"), plan.warps)
        launch(kernel, grid, pointers, numbers, (*options, "apply"), plan.warps)


def group_norm_act_forward(x, residual, num_groups, weight, bias, eps, act):
    """``(total or None, y, mean, rstd)``; total = x + residual if there is a residual.

    x (N, C, *spatial), dense, NCHW or channels_last; residual alike; mean, rstd (N, G) fp32.
    """
    total = None if residual is None else torch.empty_like(x)
    y = torch.empty_like(x)
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return total, y, mean.zero_(), rstd.zero_()
    tensors = 1 if residual is None else 2
    plan, sizes, options = _problem(x, num_groups, act, tensors)
    partial = None
    if not plan.on_chip:
        partial = mean.new_empty((x.shape[0], plan.splits, num_groups, 2))
    pointers = (
        x, residual, x if total is None else total, y, weight, bias, mean, rstd, partial
    )  # fmt: skip
    with torch.cuda.device_of(x):
        _launch(kernels.group_norm_act_forward, x, plan, pointers, sizes, (eps,), options, 1)
    return total, y, mean, rstd


def group_norm_act_recompute(total, num_groups, weight, bias, mean, rstd, act):
    """y, from what the forward returned besides it, in one pass."""
    y = torch.empty_like(total)
    if total.numel() == 0:
        return y
    plan, sizes, options = _problem(total, num_groups, act, 1)
    pointers = total, None, total, y, weight, bias, mean, rstd, None
    programs = total.shape[0] * -(-sizes[0] // plan.block) * plan.splits
    with torch.cuda.device_of(total):
        numbers, options = (*sizes, 0, 0.0), (*options, "recompute")
        launch(kernels.group_norm_act_forward, programs, pointers, numbers, options, plan.warps)
    return y


def group_norm_act_backward(
    dy, dtotal, total, num_groups, weight, bias, mean, rstd, act, need_dx, need_dparams
):
    """``(dx or None, dweight or None, dbias or None)``; dtotal, if any, is added to dx.

    dy, dtotal in the format of total. The parameters' gradients have their dtypes.
    """
    dx = torch.empty_like(total) if need_dx else None
    dweight = torch.empty_like(weight) if need_dparams and weight is not None else None
    dbias = torch.empty_like(bias) if need_dparams and bias is not None else None
    if total.numel() == 0:
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient.zero_()
        return dx, dweight, dbias
    plan, sizes, options = _problem(total, num_groups, act, 2)
    samples, channels = total.shape[:2]
    partial = None
    if not plan.on_chip:
        partial = mean.new_empty((samples, plan.splits, channels, 2))
    parts = [dweight, dbias]
    if samples > 1:
        parts = [None if p is None else mean.new_empty((samples, channels)) for p in parts]
    pointers = (dy, dtotal, total, dx, weight, bias, mean, rstd, *parts, partial)
    with torch.cuda.device_of(total):
        _launch(kernels.group_norm_act_backward, total, plan, pointers, sizes, (), options, 2)
        if samples > 1 and (dweight is not None or dbias is not None):
            launch(
                kernels.group_norm_act_sum_samples, -(-channels // 32), (*parts, dweight, dbias),
                (samples, channels), (64, 32), 4,
            )  # fmt: skip
    return dx, dweight, dbias
