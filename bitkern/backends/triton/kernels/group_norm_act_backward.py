"""GroupNorm + activation, backward, with and without a residual before it or a shortcut after it.

The same ways as forward: ``_on_chip``; ``_whole``; ``_reduce``, then ``_apply``. ``tiles.py`` has
the shapes and the names of the sizes.
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
    statistics,
    sum_depth,
    tile_offsets,
)


@triton.jit
def _act_backward(dy, z, ACT: tl.constexpr):
    if ACT == "relu":
        dy = tl.where(z <= 0.0, 0.0, dy)  # where z is NaN dy passes, as in PyTorch
    elif ACT == "silu":
        s = tl.sigmoid(z)
        dy = dy * s * (1.0 + z * (1.0 - s))
    elif ACT == "leaky_relu":
        dy = tl.where(z > 0.0, dy, 0.01 * dy)
    elif ACT == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        dy = dy * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476) + z * density)
    elif ACT == "mish":
        z = tl.minimum(z, 20.0, propagate_nan=tl.PropagateNan.ALL)  # no overflow of n
        e = tl.exp(z)
        n = e * (e + 2.0)
        r = 1.0 / (n + 2.0)
        dy = dy * (r * (n + 4.0 * z * (e * (e + 1.0) * r)))
    elif ACT == "hardswish":
        slope = tl.where(z >= 3.0, 1.0, z * (1.0 / 3.0) + 0.5)
        dy = tl.where(z <= -3.0, 0.0, dy * slope)
    return dy


@triton.jit
def _gradients(dy, summed, y, at, mask, mean, scale, shift, ACT: tl.constexpr):
    """g = dy through the activation, and summed - mean. A given y tells where ReLU was 0."""
    centered = load(summed + at, mask) - mean[None, :]
    if y is not None:
        z = load(y + at, mask)
    else:
        z = centered * scale[None, :] + shift[None, :]
    return _act_backward(load(dy + at, mask), z, ACT), centered


@triton.jit
def _store_dx(dx, dsummed, dshortcut, at, mask, g, centered, scale, constant, slope):
    """Store dx, and dshortcut, which is g."""
    if dshortcut is not None:
        tl.store(dshortcut + at, g, mask=mask)
    if dx is not None:
        value = g * scale[None, :] - constant[None, :] - centered * slope[None, :]
        if dsummed is not None:
            value += load(dsummed + at, mask)
        tl.store(dx + at, value, mask=mask)


@triton.jit
def _sums(
    dy, summed, y, mean, rstd, scale, shift, first, left, in_block, start, channels, pixels,
    CHANNELS_LAST: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    WIDE: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g * normalized input, per channel, of ``left`` pixels from ``first`` on."""
    TILE: tl.constexpr = DEPTH * ROWS
    stride = pixel_stride(channels, CHANNELS_LAST)
    at = start + first * stride
    pixel = tl.arange(0, TILE)
    offsets = tile_offsets(pixel, channels, pixels, CHANNELS_LAST, LANES, WIDE)
    sum_g = tl.zeros([ROWS, LANES], tl.float32)
    sum_gc = tl.zeros([ROWS, LANES], tl.float32)
    for i in tl.range(tl.cdiv(left, TILE), num_stages=STAGES if TILE > 1 else 1):
        mask = (pixel < left - i * TILE)[:, None] & in_block[None, :]
        g, centered = _gradients(dy, summed, y, at + offsets, mask, mean, scale, shift, ACT)
        sum_g += sum_depth(g, CHANNELS_LAST, DEPTH, ROWS, LANES)
        sum_gc += sum_depth(g * centered, CHANNELS_LAST, DEPTH, ROWS, LANES)
        at += TILE * stride
    return tl.sum(sum_g, 0), tl.sum(sum_gc, 0) * rstd


@triton.jit
def _combine(partial, sample, channel, in_block, channels, splits, SPLITS: tl.constexpr):
    """The sums over all splits [LANES]."""
    split = tl.arange(0, SPLITS)
    mask = (split < splits)[:, None] & in_block[None, :]
    ptr = partial + sample * splits * channels * 2
    ptr += (split[:, None] * channels + channel[None, :]) * 2
    return tl.sum(load(ptr, mask), 0), tl.sum(load(ptr + 1, mask), 0)


@triton.jit
def _store_sums(
    channel_weight, channel_bias, sum_g, sum_gn, sample, split, channel, in_block, channels
):  # fmt: skip
    """Store the sums, by the program of the first split."""
    if split == 0:
        to = sample * channels + channel
        if channel_weight is not None:
            tl.store(channel_weight + to, sum_gn, mask=in_block)
        if channel_bias is not None:
            tl.store(channel_bias + to, sum_g, mask=in_block)


@triton.jit
def _coefficients(sum_g, sum_gn, w, rstd, channel, pixels, group_size, ONE_GROUP: tl.constexpr):
    """(constant, slope) of dx = g * w * rstd - constant - centered * slope."""
    factor = rstd / (group_size * 1.0 * pixels)
    constant = over_groups(w * sum_g, channel, group_size, ONE_GROUP) * factor
    slope = over_groups(w * sum_gn, channel, group_size, ONE_GROUP) * (factor * rstd)
    return constant, slope


@triton.jit
def _apply_tiles(
    dy, dsummed, summed, y, dx, dshortcut, mean, scale, shift, constant, slope, first, left,
    in_block, start, channels, pixels, CHANNELS_LAST: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr, WIDE: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Store dx and dshortcut of ``left`` pixels from pixel ``first`` on."""
    pixel = tl.arange(0, TILE)
    offsets = tile_offsets(pixel, channels, pixels, CHANNELS_LAST, LANES, WIDE)
    stride = pixel_stride(channels, CHANNELS_LAST)
    at = start + first * stride
    for i in tl.range(tl.cdiv(left, TILE), num_stages=STAGES if TILE > 1 else 1):
        mask = (pixel < left - i * TILE)[:, None] & in_block[None, :]
        g, centered = _gradients(dy, summed, y, at + offsets, mask, mean, scale, shift, ACT)
        _store_dx(dx, dsummed, dshortcut, at + offsets, mask, g, centered, scale, constant, slope)
        at += TILE * stride


@kernel
def group_norm_act_backward_on_chip(
    dy,  # [N, P, C]
    dsummed,  # [N, P, C] or None
    summed,  # [N, P, C]
    y,  # [N, P, C] or None
    dx,  # [N, P, C] or None
    dshortcut,  # [N, P, C] or None
    weight,  # [C], [N, C] if PER_SAMPLE, or None
    bias,  # [C], [N, C] if PER_SAMPLE, or None
    mean,  # [N, G]
    rstd,  # [N, G]
    channel_weight,  # [N, C] or None, whose sum over N is dweight
    channel_bias,  # [N, C] or None, whose sum over N is dbias
    channels, pixels, group_size, block,
    CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, WIDE: tl.constexpr, ONE_GROUP: tl.constexpr, PER_SAMPLE: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    channels, pixels, block = divisible(channels, pixels, block, CHANNELS_LAST, UNIT)
    sample, split, channel, in_block, start = locate(
        channels, pixels, block, 1, CHANNELS_LAST, LANES
    )
    mean, rstd = statistics(mean, rstd, sample, channels, channel, group_size, in_block, ONE_GROUP)
    w, shift = affine(weight, bias, sample, channels, channel, in_block, LANES, PER_SAMPLE)
    scale = w * rstd
    pixel = tl.arange(0, DEPTH * ROWS)
    at = start + tile_offsets(pixel, channels, pixels, CHANNELS_LAST, LANES, WIDE)
    mask = (pixel < pixels)[:, None] & in_block[None, :]
    g, centered = _gradients(dy, summed, y, at, mask, mean, scale, shift, ACT)
    sum_g = tl.sum(sum_depth(g, CHANNELS_LAST, DEPTH, ROWS, LANES), 0)
    sum_gn = tl.sum(sum_depth(g * centered, CHANNELS_LAST, DEPTH, ROWS, LANES), 0) * rstd
    _store_sums(
        channel_weight, channel_bias, sum_g, sum_gn, sample, split, channel, in_block, channels
    )
    if dx is not None or dshortcut is not None:
        constant, slope = _coefficients(
            sum_g, sum_gn, w, rstd, channel, pixels, group_size, ONE_GROUP
        )
        _store_dx(dx, dsummed, dshortcut, at, mask, g, centered, scale, constant, slope)


@kernel
def group_norm_act_backward_whole(
    dy,  # [N, P, C]
    dsummed,  # [N, P, C] or None
    summed,  # [N, P, C]
    y,  # [N, P, C] or None
    dx,  # [N, P, C] or None
    dshortcut,  # [N, P, C] or None
    weight,  # [C], [N, C] if PER_SAMPLE, or None
    bias,  # [C], [N, C] if PER_SAMPLE, or None
    mean,  # [N, G]
    rstd,  # [N, G]
    channel_weight,  # [N, C] or None
    channel_bias,  # [N, C] or None
    channels, pixels, group_size, block,
    CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, WIDE: tl.constexpr, ONE_GROUP: tl.constexpr, PER_SAMPLE: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    channels, pixels, block = divisible(channels, pixels, block, CHANNELS_LAST, UNIT)
    sample, zero, channel, in_block, start = locate(
        channels, pixels, block, 1, CHANNELS_LAST, LANES
    )
    mean, rstd = statistics(mean, rstd, sample, channels, channel, group_size, in_block, ONE_GROUP)
    w, shift = affine(weight, bias, sample, channels, channel, in_block, LANES, PER_SAMPLE)
    scale = w * rstd
    sum_g, sum_gn = _sums(
        dy, summed, y, mean, rstd, scale, shift, zero, pixels, in_block, start, channels, pixels,
        CHANNELS_LAST, DEPTH, ROWS, LANES, WIDE, ACT,
    )  # fmt: skip
    _store_sums(
        channel_weight, channel_bias, sum_g, sum_gn, sample, zero, channel, in_block, channels
    )
    if dx is not None or dshortcut is not None:
        constant, slope = _coefficients(
            sum_g, sum_gn, w, rstd, channel, pixels, group_size, ONE_GROUP
        )
        _apply_tiles(
            dy, dsummed, summed, y, dx, dshortcut, mean, scale, shift, constant, slope, zero,
            pixels, in_block, start, channels, pixels, CHANNELS_LAST, DEPTH * ROWS, LANES, WIDE,
            ACT,
        )  # fmt: skip


@kernel
def group_norm_act_backward_reduce(
    dy,  # [N, P, C]
    summed,  # [N, P, C]
    y,  # [N, P, C] or None
    weight,  # [C], [N, C] if PER_SAMPLE, or None
    bias,  # [C], [N, C] if PER_SAMPLE, or None
    mean,  # [N, G]
    rstd,  # [N, G]
    partial,  # fp32 [N, splits, C, 2]
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
    w, shift = affine(weight, bias, sample, channels, channel, in_block, LANES, PER_SAMPLE)
    first = split * tiles * (DEPTH * ROWS)
    left = tl.minimum(tiles * (DEPTH * ROWS), pixels - first)
    sum_g, sum_gn = _sums(
        dy, summed, y, mean, rstd, w * rstd, shift, first, left, in_block, start, channels, pixels,
        CHANNELS_LAST, DEPTH, ROWS, LANES, WIDE, ACT,
    )  # fmt: skip
    to = partial + ((sample * splits + split) * channels + channel) * 2
    tl.store(to, sum_g, mask=in_block)
    tl.store(to + 1, sum_gn, mask=in_block)


@kernel
def group_norm_act_backward_apply(
    dy,  # [N, P, C]
    dsummed,  # [N, P, C] or None
    summed,  # [N, P, C]
    y,  # [N, P, C] or None
    dx,  # [N, P, C] or None
    dshortcut,  # [N, P, C] or None
    weight,  # [C], [N, C] if PER_SAMPLE, or None
    bias,  # [C], [N, C] if PER_SAMPLE, or None
    mean,  # [N, G]
    rstd,  # [N, G]
    channel_weight,  # [N, C] or None
    channel_bias,  # [N, C] or None
    partial,  # fp32 [N, splits, C, 2]
    channels, pixels, group_size, block, tiles, splits,
    CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, WIDE: tl.constexpr, ONE_GROUP: tl.constexpr, PER_SAMPLE: tl.constexpr,
    ACT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    channels, pixels, block = divisible(channels, pixels, block, CHANNELS_LAST, UNIT)
    sample, split, channel, in_block, start = locate(
        channels, pixels, block, splits, CHANNELS_LAST, LANES
    )
    sum_g, sum_gn = _combine(partial, sample, channel, in_block, channels, splits, SPLITS)
    _store_sums(
        channel_weight, channel_bias, sum_g, sum_gn, sample, split, channel, in_block, channels
    )
    if dx is not None or dshortcut is not None:
        mean, rstd = statistics(
            mean, rstd, sample, channels, channel, group_size, in_block, ONE_GROUP
        )
        w, shift = affine(weight, bias, sample, channels, channel, in_block, LANES, PER_SAMPLE)
        constant, slope = _coefficients(
            sum_g, sum_gn, w, rstd, channel, pixels, group_size, ONE_GROUP
        )
        TILE: tl.constexpr = DEPTH * ROWS
        first = split * tiles * TILE
        left = tl.minimum(tiles * TILE, pixels - first)
        _apply_tiles(
            dy, dsummed, summed, y, dx, dshortcut, mean, w * rstd, shift, constant, slope, first,
            left, in_block, start, channels, pixels, CHANNELS_LAST, TILE, LANES, WIDE, ACT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["samples", "channels"])
def group_norm_act_sum_samples(
    channel_weight,  # [N, C] or None
    channel_bias,  # [N, C] or None
    dweight,  # [C] or None
    dbias,  # [C] or None
    samples, channels, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    channel = tl.program_id(0) * LANES + tl.arange(0, LANES)
    sum_w = tl.zeros([ROWS, LANES], tl.float32)
    sum_b = tl.zeros([ROWS, LANES], tl.float32)
    for first in range(0, samples, ROWS):
        at = (first + rows)[:, None] * channels + channel[None, :]
        mask = (first + rows < samples)[:, None] & (channel < channels)[None, :]
        if dweight is not None:
            sum_w += load(channel_weight + at, mask)
        if dbias is not None:
            sum_b += load(channel_bias + at, mask)
    if dweight is not None:
        tl.store(dweight + channel, tl.sum(sum_w, 0), mask=channel < channels)
    if dbias is not None:
        tl.store(dbias + channel, tl.sum(sum_b, 0), mask=channel < channels)
