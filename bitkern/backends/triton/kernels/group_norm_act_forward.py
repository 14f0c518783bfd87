"""GroupNorm + activation, forward, with and without a residual before it or a shortcut after it.

A small map is one tile, which stays in registers between the two passes (``_on_chip``). Of a larger
one a program reads its part twice, the second time from L2 (``_whole``). The largest take two
launches with a program for each split: its partial results (``_reduce``) are combined in a fixed
order by every program of the second pass (``_apply``). ``group_norm_act_recompute`` is the second
pass of given statistics. ``tiles.py`` has the shapes and the names of the sizes.
"""

import triton
import triton.language as tl

from bitkern.backends.triton.kernels.tiles import (
    STAGES,
    affine,
    divisible,
    kernel,
    load,
    locate,
    over_groups,
    pixel_stride,
    split_depth,
    statistics,
    sum_depth,
    tile_offsets,
)


@triton.jit
def _act(z, ACT: tl.constexpr):
    if ACT == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "silu":
        z = z / (1.0 + tl.exp(-z))  # a rounding less than times the sigmoid
    elif ACT == "leaky_relu":
        z = tl.maximum(z, 0.01 * z, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "gelu":
        z = z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    elif ACT == "mish":
        e = tl.exp(tl.minimum(z, 20.0, propagate_nan=tl.PropagateNan.ALL))  # no overflow of e²
        n = e * (e + 2.0)
        z = z / (n + 2.0) * n  # times tanh(softplus(z)), in fewer registers
    elif ACT == "hardswish":
        gate = tl.maximum(z + 3.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
        z = z * (tl.minimum(gate, 6.0, propagate_nan=tl.PropagateNan.ALL) * (1.0 / 6.0))
    return z


@triton.jit
def _load_summed(x, residual, summed, at, mask):
    """x, or x + residual rounded to the tensors' dtype, which is also stored."""
    value = load(x + at, mask)
    if residual is not None:
        rounded = (value + load(residual + at, mask)).to(summed.dtype.element_ty)
        tl.store(summed + at, rounded, mask=mask)
        value = rounded.to(tl.float32)
    return value


@triton.jit
def _group_moments(mean, deviations, squares, n, channel, group_size, ONE_GROUP: tl.constexpr):
    """Mean and sum of squared deviations of groups of n elements, in every channel of the group.

    mean: an estimate. deviations, squares [LANES]: per channel, the sums of the deviations from
    it and of their squares. They take the estimate's rounding back, which may be large against
    the standard deviation.
    """
    correction = tl.div_rn(over_groups(deviations, channel, group_size, ONE_GROUP), n)
    squares = over_groups(squares, channel, group_size, ONE_GROUP)
    return mean + correction, squares - correction * correction * n


@triton.jit
def _moments(
    x, residual, summed, first, left, channel, in_block, start, channels, pixels, group_size,
    CHANNELS_LAST: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    WIDE: tl.constexpr, ONE_GROUP: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each group over ``left`` pixels from ``first`` on."""
    TILE: tl.constexpr = DEPTH * ROWS
    stride = pixel_stride(channels, CHANNELS_LAST)
    at = start + first * stride
    # Sums of d = value - one of the values summed: what cancels is bounded by the length.
    DEPTH_AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    row = tl.arange(0, ROWS) * (1 if CHANNELS_LAST else DEPTH)  # its first pixel
    row_offsets = at + tile_offsets(row, channels, pixels, CHANNELS_LAST, LANES, WIDE)
    first_tile = (row < left)[:, None] & in_block[None, :]
    origin = load(x + row_offsets, first_tile)
    if residual is not None:
        origin += load(residual + row_offsets, first_tile)
    pixel = tl.arange(0, TILE)
    offsets = tile_offsets(pixel, channels, pixels, CHANNELS_LAST, LANES, WIDE)
    sum_d = tl.zeros([ROWS, LANES], tl.float32)
    sum_dd = tl.zeros([ROWS, LANES], tl.float32)
    for i in tl.range(tl.cdiv(left, TILE), num_stages=STAGES if TILE > 1 else 1):
        mask = (pixel < left - i * TILE)[:, None] & in_block[None, :]
        value = _load_summed(x, residual, summed, at + offsets, mask)
        d = split_depth(value, CHANNELS_LAST, DEPTH, ROWS, LANES)
        d -= tl.expand_dims(origin, DEPTH_AXIS)
        d = tl.where(split_depth(mask, CHANNELS_LAST, DEPTH, ROWS, LANES), d, 0.0)
        sum_d += tl.sum(d, DEPTH_AXIS)
        sum_dd += tl.sum(d * d, DEPTH_AXIS)
        at += TILE * stride
    # Chan's combination of what the rows have seen, count pixels each.
    if CHANNELS_LAST:
        count = tl.cdiv(tl.maximum(left - row, 0), ROWS)
    else:
        rest = tl.minimum(tl.maximum(left % TILE - row, 0), DEPTH)
        count = left // TILE * DEPTH + rest
    count = count.to(tl.float32)[:, None]
    mean_d = tl.div_rn(sum_d, tl.maximum(count, 1.0))
    n = group_size * 1.0 * left
    group_sum = over_groups(tl.sum((origin + mean_d) * count, 0), channel, group_size, ONE_GROUP)
    mean = tl.div_rn(group_sum, n)
    delta = origin - mean[None, :] + mean_d  # this order keeps its digits
    delta = tl.where(in_block[None, :], delta, 0.0)
    sum_dd += delta * (delta * count) - sum_d * mean_d
    return _group_moments(
        mean, tl.sum(delta * count, 0), tl.sum(sum_dd, 0), n, channel, group_size, ONE_GROUP
    )


@triton.jit
def _combine(
    partial, sample, channel, in_block, channels, pixels, group_size, tiles, splits,
    TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations [LANES] of each channel's group."""
    split = tl.arange(0, SPLITS)
    mask = (split < splits)[:, None] & in_block[None, :]
    ptr = partial + sample * splits * (channels // group_size) * 2
    ptr += (split[:, None] * (channels // group_size) + (channel // group_size)[None, :]) * 2
    count = tl.minimum(tiles * TILE, pixels - split * tiles * TILE) * 1.0 * group_size
    count = tl.where(split < splits, count, 0.0)[:, None]
    n = group_size * 1.0 * pixels
    means = load(ptr, mask)
    mean = tl.div_rn(tl.sum(means * count, 0), n)
    delta = tl.where(mask, means - mean[None, :], 0.0)
    correction = tl.div_rn(tl.sum(delta * count, 0), n)
    m2 = tl.sum(load(ptr + 1, mask) + delta * (delta * count), 0)
    return mean + correction, m2 - correction * correction * n


@triton.jit
def _store_statistics(
    mean_out, rstd_out, mean, m2, sample, split, channel, in_block, channels, pixels, group_size,
    eps,
):  # fmt: skip
    """Store the statistics, by the program of the first split; return rstd."""
    m2 = tl.maximum(m2, 0.0, propagate_nan=tl.PropagateNan.ALL)
    rstd = tl.rsqrt(tl.div_rn(m2, group_size * 1.0 * pixels) + eps)
    if split == 0:
        to = sample * (channels // group_size) + channel // group_size
        opens_group = in_block & (channel % group_size == 0)
        tl.store(mean_out + to, mean, mask=opens_group)
        tl.store(rstd_out + to, rstd, mask=opens_group)
    return rstd


@triton.jit
def _apply_tiles(
    summed, shortcut, y, mean, rstd, weight, bias, first, left, sample, channel, in_block, start,
    channels, pixels, CHANNELS_LAST: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
    WIDE: tl.constexpr, PER_SAMPLE: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Store y of ``left`` pixels from pixel ``first`` on."""
    scale, shift = affine(weight, bias, sample, channels, channel, in_block, LANES, PER_SAMPLE)
    scale *= rstd
    pixel = tl.arange(0, TILE)
    offsets = tile_offsets(pixel, channels, pixels, CHANNELS_LAST, LANES, WIDE)
    stride = pixel_stride(channels, CHANNELS_LAST)
    at = start + first * stride
    for i in tl.range(tl.cdiv(left, TILE), num_stages=STAGES if TILE > 1 else 1):
        mask = (pixel < left - i * TILE)[:, None] & in_block[None, :]
        z = (load(summed + at + offsets, mask) - mean[None, :]) * scale[None, :] + shift[None, :]
        if shortcut is not None:
            z += load(shortcut + at + offsets, mask)
        tl.store(y + at + offsets, _act(z, ACT), mask=mask)
        at += TILE * stride


@kernel
def group_norm_act_forward_on_chip(
    x,  # [N, P, C]
    residual,  # [N, P, C] or None
    shortcut,  # [N, P, C] or None
    summed,  # [N, P, C], x where there is no residual
    y,  # [N, P, C]
    weight,  # [C], [N, C] if PER_SAMPLE, or None
    bias,  # [C], [N, C] if PER_SAMPLE, or None
    mean_out,  # [N, G]
    rstd_out,  # [N, G]
    channels, pixels, group_size, block, eps,
    CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, WIDE: tl.constexpr, ONE_GROUP: tl.constexpr, PER_SAMPLE: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    channels, pixels, block = divisible(channels, pixels, block, CHANNELS_LAST, UNIT)
    sample, split, channel, in_block, start = locate(
        channels, pixels, block, 1, CHANNELS_LAST, LANES
    )
    pixel = tl.arange(0, DEPTH * ROWS)
    offsets = tile_offsets(pixel, channels, pixels, CHANNELS_LAST, LANES, WIDE)
    mask = (pixel < pixels)[:, None] & in_block[None, :]
    value = _load_summed(x, residual, summed, start + offsets, mask)
    n = group_size * 1.0 * pixels
    mean = tl.sum(sum_depth(value, CHANNELS_LAST, DEPTH, ROWS, LANES), 0)
    mean = tl.div_rn(over_groups(mean, channel, group_size, ONE_GROUP), n)
    d = tl.where(mask, value - mean[None, :], 0.0)
    sum_d = tl.sum(sum_depth(d, CHANNELS_LAST, DEPTH, ROWS, LANES), 0)
    sum_dd = tl.sum(sum_depth(d * d, CHANNELS_LAST, DEPTH, ROWS, LANES), 0)
    mean, m2 = _group_moments(mean, sum_d, sum_dd, n, channel, group_size, ONE_GROUP)
    rstd = _store_statistics(
        mean_out, rstd_out, mean, m2, sample, split, channel, in_block, channels, pixels,
        group_size, eps,
    )  # fmt: skip
    scale, shift = affine(weight, bias, sample, channels, channel, in_block, LANES, PER_SAMPLE)
    z = (value - mean[None, :]) * (scale * rstd)[None, :] + shift[None, :]
    if shortcut is not None:
        z += load(shortcut + start + offsets, mask)
    tl.store(y + start + offsets, _act(z, ACT), mask=mask)


@kernel
def group_norm_act_forward_whole(
    x,  # [N, P, C]
    residual,  # [N, P, C] or None
    shortcut,  # [N, P, C] or None
    summed,  # [N, P, C], x where there is no residual
    y,  # [N, P, C]
    weight,  # [C], [N, C] if PER_SAMPLE, or None
    bias,  # [C], [N, C] if PER_SAMPLE, or None
    mean_out,  # [N, G]
    rstd_out,  # [N, G]
    channels, pixels, group_size, block, eps,
    CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, WIDE: tl.constexpr, ONE_GROUP: tl.constexpr, PER_SAMPLE: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    channels, pixels, block = divisible(channels, pixels, block, CHANNELS_LAST, UNIT)
    sample, zero, channel, in_block, start = locate(
        channels, pixels, block, 1, CHANNELS_LAST, LANES
    )
    mean, m2 = _moments(
        x, residual, summed, zero, pixels, channel, in_block, start, channels, pixels, group_size,
        CHANNELS_LAST, DEPTH, ROWS, LANES, WIDE, ONE_GROUP,
    )  # fmt: skip
    if residual is not None:
        tl.debug_barrier()  # what other threads stored above is read below
    rstd = _store_statistics(
        mean_out, rstd_out, mean, m2, sample, zero, channel, in_block, channels, pixels, group_size,
        eps,
    )  # fmt: skip
    _apply_tiles(
        summed, shortcut, y, mean, rstd, weight, bias, zero, pixels, sample, channel, in_block,
        start, channels, pixels, CHANNELS_LAST, DEPTH * ROWS, LANES, WIDE, PER_SAMPLE, ACT,
    )  # fmt: skip


@kernel
def group_norm_act_forward_reduce(
    x,  # [N, P, C]
    residual,  # [N, P, C] or None
    summed,  # [N, P, C], x where there is no residual
    partial,  # fp32 [N, splits, G, 2]
    channels, pixels, group_size, block, tiles, splits,
    CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, WIDE: tl.constexpr, ONE_GROUP: tl.constexpr,
):  # fmt: skip
    channels, pixels, block = divisible(channels, pixels, block, CHANNELS_LAST, UNIT)
    sample, split, channel, in_block, start = locate(
        channels, pixels, block, splits, CHANNELS_LAST, LANES
    )
    first = split * tiles * (DEPTH * ROWS)
    left = tl.minimum(tiles * (DEPTH * ROWS), pixels - first)
    mean, m2 = _moments(
        x, residual, summed, first, left, channel, in_block, start, channels, pixels, group_size,
        CHANNELS_LAST, DEPTH, ROWS, LANES, WIDE, ONE_GROUP,
    )  # fmt: skip
    to = (
        partial + ((sample * splits + split) * (channels // group_size) + channel // group_size) * 2
    )
    opens_group = in_block & (channel % group_size == 0)
    tl.store(to, mean, mask=opens_group)
    tl.store(to + 1, m2, mask=opens_group)


@kernel
def group_norm_act_forward_apply(
    summed,  # [N, P, C]
    shortcut,  # [N, P, C] or None
    y,  # [N, P, C]
    weight,  # [C], [N, C] if PER_SAMPLE, or None
    bias,  # [C], [N, C] if PER_SAMPLE, or None
    mean_out,  # [N, G]
    rstd_out,  # [N, G]
    partial,  # fp32 [N, splits, G, 2]
    channels, pixels, group_size, block, tiles, splits, eps,
    CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, WIDE: tl.constexpr, PER_SAMPLE: tl.constexpr, ACT: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """SPLITS: the largest number of splits."""
    channels, pixels, block = divisible(channels, pixels, block, CHANNELS_LAST, UNIT)
    sample, split, channel, in_block, start = locate(
        channels, pixels, block, splits, CHANNELS_LAST, LANES
    )
    TILE: tl.constexpr = DEPTH * ROWS
    mean, m2 = _combine(
        partial, sample, channel, in_block, channels, pixels, group_size, tiles, splits, TILE,
        SPLITS,
    )  # fmt: skip
    rstd = _store_statistics(
        mean_out, rstd_out, mean, m2, sample, split, channel, in_block, channels, pixels,
        group_size, eps,
    )  # fmt: skip
    first = split * tiles * TILE
    left = tl.minimum(tiles * TILE, pixels - first)
    _apply_tiles(
        summed, shortcut, y, mean, rstd, weight, bias, first, left, sample, channel, in_block,
        start, channels, pixels, CHANNELS_LAST, TILE, LANES, WIDE, PER_SAMPLE, ACT,
    )  # fmt: skip


@kernel
def group_norm_act_recompute(
    summed,  # [N, P, C]
    y,  # [N, P, C]
    weight,  # [C], [N, C] if PER_SAMPLE, or None
    bias,  # [C], [N, C] if PER_SAMPLE, or None
    mean,  # [N, G]
    rstd,  # [N, G]
    channels, pixels, group_size, block, tiles, splits,
    CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, WIDE: tl.constexpr, ONE_GROUP: tl.constexpr, PER_SAMPLE: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    channels, pixels, block = divisible(channels, pixels, block, CHANNELS_LAST, UNIT)
    sample, split, channel, in_block, start = locate(
        channels, pixels, block, splits, CHANNELS_LAST, LANES
    )
    mean, rstd = statistics(mean, rstd, sample, channels, channel, group_size, in_block, ONE_GROUP)
    TILE: tl.constexpr = DEPTH * ROWS
    first = split * tiles * TILE
    left = tl.minimum(tiles * TILE, pixels - first)
    _apply_tiles(
        summed, None, y, mean, rstd, weight, bias, first, left, sample, channel, in_block, start,
        channels, pixels, CHANNELS_LAST, TILE, LANES, WIDE, PER_SAMPLE, ACT,
    )  # fmt: skip
