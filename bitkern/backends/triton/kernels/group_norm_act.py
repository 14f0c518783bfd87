"""GroupNorm + activation in Triton, with and without a residual sum; forward and backward.

A tile is [pixels, channels] in both memory formats (held as [DEPTH, ROWS, LANES], where a thread
has all of DEPTH and sums over it without talking to others); only its strides tell the formats
apart. A program owns a block of whole groups of one sample. A small map is one tile, which stays
in registers between the two passes (stage "on_chip"). The pixels of a larger one are cut into
splits, whose partial results are combined in a fixed order: in one launch, where a program does
all splits and then its second pass ("whole"), or in two with a program per split ("reduce", then
"apply"). Both do the same arithmetic and give the same bits. Of given statistics the second pass
alone is stage "recompute".

Tensors: x, residual, total, y, dy, dtotal, dx [N, P, C] or [N, C, P]; weight, bias [C]; mean,
rstd [N, G]; partial (fp32) [N, splits, G or C, 2]; channel_weight, channel_bias [N, C], the sums
over pixels whose sums over N are dweight and dbias.
"""

import triton
import triton.language as tl

_kernel = triton.jit(
    do_not_specialize=["channels", "pixels", "size", "block", "tiles", "splits", "first_sample"]
)


@triton.jit
def _locate(
    channels, pixels, block, splits, first_sample, CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    WIDE: tl.constexpr, ALL_SPLITS: tl.constexpr,
):  # fmt: skip
    """Where the program works.

    pixels; sample (int64), its first split, how many splits; channel [LANES] and which of them
    are in the block; offset of the block's first pixel (int64), stride of a pixel, offsets in
    the first layer of a tile and in a tile; the tile's pixels [DEPTH, ROWS].
    """
    # Tells the compiler what divides the contiguous dimension: how wide its accesses may be.
    if CHANNELS_LAST:
        channels, block = channels // UNIT * UNIT, block // UNIT * UNIT
    else:
        pixels = pixels // UNIT * UNIT
    blocks = tl.cdiv(channels, block)
    first_channel = tl.program_id(0) % blocks * block
    sample = tl.program_id(0) // blocks
    split = sample * 0
    if not ALL_SPLITS:
        split = sample % splits
        sample = sample // splits
        splits = 1
    sample = first_sample + sample.to(tl.int64)
    layer, row, lane = tl.arange(0, DEPTH), tl.arange(0, ROWS), tl.arange(0, LANES)
    channel = first_channel + lane
    in_block = (lane < block) & (channel < channels)
    tile_row = layer[:, None] * ROWS + row[None, :]
    start = sample * channels * pixels
    if WIDE:
        layer, row, lane = layer.to(tl.int64), row.to(tl.int64), lane.to(tl.int64)
    if CHANNELS_LAST:
        start += first_channel
        stride = channels
        offsets = row[:, None] * channels + lane[None, :]
    else:
        start += first_channel.to(tl.int64) * pixels
        stride = 1
        offsets = row[:, None] + lane[None, :] * pixels
    tile = offsets[None, :, :] + (layer * ROWS * stride)[:, None, None]
    return pixels, sample, split, splits, channel, in_block, start, stride, offsets, tile, tile_row


@triton.jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_total(x, residual, total, at, offsets, mask):
    """x, or x + residual rounded to the tensors' dtype, which is also stored."""
    value = _load(x + at + offsets, mask)
    if residual is not None:
        rounded = (value + _load(residual + at + offsets, mask)).to(total.dtype.element_ty)
        tl.store(total + at + offsets, rounded, mask=mask)
        value = rounded.to(tl.float32)
    return value


@triton.jit
def _affine(weight, bias, channel, in_block, LANES: tl.constexpr):
    w = tl.full([LANES], 1.0, tl.float32)
    b = tl.zeros([LANES], tl.float32)
    if weight is not None:
        w = _load(weight + channel, in_block)
    if bias is not None:
        b = _load(bias + channel, in_block)
    return w, b


@triton.jit
def _over_groups(v, channel, size, ONE_GROUP: tl.constexpr, LANES: tl.constexpr):
    """v [LANES] summed over each channel's group, for every channel; [1] if it is one group."""
    if ONE_GROUP:
        return tl.zeros([1], tl.float32) + tl.sum(v, 0)
    else:
        group = channel // size
        # Not a product with the mask: a NaN stays in its group.
        return tl.sum(tl.where(group[:, None] == group[None, :], v[None, :], 0.0), 1)


@triton.jit
def _act(z, ACT: tl.constexpr):
    if ACT == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def _act_backward(dy, z, ACT: tl.constexpr):
    if ACT == "relu":
        dy = tl.where(z <= 0.0, 0.0, dy)  # where z is NaN dy passes, as in PyTorch
    elif ACT == "silu":
        s = tl.sigmoid(z)
        dy = dy * s * (1.0 + z * (1.0 - s))
    return dy


@triton.jit
def _statistics(
    mean, rstd, sample, channels, channel, size, in_block, ONE_GROUP: tl.constexpr
):  # fmt: skip
    """Of each channel's group; [1] for one group, which takes fewer registers."""
    groups = channels // size
    if ONE_GROUP:
        at = sample * groups + tl.program_id(0) % groups + tl.zeros([1], tl.int64)
        return tl.load(mean + at), tl.load(rstd + at)
    else:
        at = sample * groups + channel // size
        return _load(mean + at, in_block), _load(rstd + at, in_block)


@triton.jit
def _of_groups(
    mean, deviations, squares, n, channel, size, ONE_GROUP: tl.constexpr, LANES: tl.constexpr
):
    """Mean and sum of squared deviations of groups of n elements, in every channel of the group.

    mean: an estimate. deviations, squares [LANES]: per channel, the sums of the deviations from
    it and of their squares. They take the estimate's rounding back, which may be large against
    the standard deviation.
    """
    correction = _over_groups(deviations, channel, size, ONE_GROUP, LANES) / n
    squares = _over_groups(squares, channel, size, ONE_GROUP, LANES)
    return mean + correction, squares - correction * correction * n


@_kernel
def group_norm_act_forward(
    x, residual, total, y, weight, bias, mean_out, rstd_out, partial,
    channels, pixels, size, block, tiles, splits, first_sample, eps,
    CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, WIDE: tl.constexpr, ONE_GROUP: tl.constexpr, SPLITS: tl.constexpr,
    ACT: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    """Without residual, total is x. SPLITS: the most there can be."""
    pixels, sample, own, owned, channel, in_block, start, stride, layer, offsets, row = _locate(
        channels, pixels, block, splits, first_sample, CHANNELS_LAST, UNIT, DEPTH, ROWS, LANES,
        WIDE, STAGE == "whole" or STAGE == "on_chip",
    )  # fmt: skip
    TILE: tl.constexpr = DEPTH * ROWS
    group = channel // size
    groups = channels // size
    opens_group = in_block & (channel % size == 0)
    elements = size * 1.0 * pixels

    if STAGE == "recompute":
        mean, rstd = _statistics(
            mean_out, rstd_out, sample, channels, channel, size, in_block, ONE_GROUP
        )
    if STAGE == "on_chip":
        mask = (row < pixels)[:, :, None] & in_block[None, None, :]
        value = _load_total(x, residual, total, start, offsets, mask)
        mean = tl.sum(tl.sum(value, 0), 0)
        mean = _over_groups(mean, channel, size, ONE_GROUP, LANES) / elements
        delta = tl.where(mask, value - mean[None, None, :], 0.0)
        mean, m2 = _of_groups(
            mean, tl.sum(tl.sum(delta, 0), 0), tl.sum(tl.sum(delta * delta, 0), 0), elements,
            channel, size, ONE_GROUP, LANES,
        )  # fmt: skip
    if STAGE == "whole" or STAGE == "reduce":
        for split in range(own, own + owned):
            pixel = split * tiles * TILE
            at = start + pixel.to(tl.int64) * stride
            left = pixels - pixel
            # Sums of d = value - one of the values summed: what cancels is bounded by the length.
            mask = (tl.arange(0, ROWS) < left)[:, None] & in_block[None, :]
            origin = _load(x + at + layer, mask)
            if residual is not None:
                origin += _load(residual + at + layer, mask)
            sum_d = tl.zeros([ROWS, LANES], tl.float32)
            sum_dd = tl.zeros([ROWS, LANES], tl.float32)
            for i in range(tl.minimum(tiles, tl.cdiv(left, TILE))):
                seen = (row < left - i * TILE)[:, :, None] & in_block[None, None, :]
                value = _load_total(x, residual, total, at, offsets, seen)
                d = tl.where(seen, value - origin[None, :, :], 0.0)
                sum_d += tl.sum(d, 0)
                sum_dd += tl.sum(d * d, 0)
                at += stride * TILE
            # Chan's combination of what the positions of the tile have seen, count pixels each.
            left = tl.minimum(tiles * TILE, left)
            count = tl.sum(tl.cdiv(tl.maximum(left - row, 0), TILE), 0).to(tl.float32)[:, None]
            mean_d = sum_d / tl.maximum(count, 1.0)
            n = size * 1.0 * left
            mean_g = tl.sum((origin + mean_d) * count, 0)
            mean_g = _over_groups(mean_g, channel, size, ONE_GROUP, LANES) / n
            delta = tl.where(in_block[None, :], origin + mean_d - mean_g[None, :], 0.0)
            sum_dd += delta * (delta * count) - sum_d * mean_d
            mean_g, m2_g = _of_groups(
                mean_g, tl.sum(delta * count, 0), tl.sum(sum_dd, 0), n, channel, size, ONE_GROUP,
                LANES,
            )  # fmt: skip
            to = partial + (sample * splits + split) * groups * 2 + group * 2
            tl.store(to, mean_g, mask=opens_group)
            tl.store(to + 1, m2_g, mask=opens_group)
    if STAGE == "whole":
        tl.debug_barrier()  # what other threads stored above is read below
    if STAGE == "whole" or STAGE == "apply":
        split = tl.arange(0, SPLITS)
        all_splits = (split < splits)[:, None] & in_block[None, :]
        of = partial + sample * splits * groups * 2
        of += (split[:, None] * groups + group[None, :]) * 2
        count = tl.minimum(tiles * TILE, pixels - split * tiles * TILE) * 1.0 * size
        count = tl.where(split < splits, count, 0.0)[:, None]
        means = _load(of, all_splits)
        mean = tl.sum(means * count, 0) / elements
        delta = tl.where(all_splits, means - mean[None, :], 0.0)
        correction = tl.sum(delta * count, 0) / elements
        m2 = tl.sum(_load(of + 1, all_splits) + delta * (delta * count), 0)
        mean += correction
        m2 -= correction * correction * elements

    if STAGE != "reduce" and STAGE != "recompute":
        m2 = tl.maximum(m2, 0.0, propagate_nan=tl.PropagateNan.ALL)
        rstd = tl.rsqrt(m2 / elements + eps)
        if own == 0:
            tl.store(mean_out + sample * groups + group, mean, mask=opens_group)
            tl.store(rstd_out + sample * groups + group, rstd, mask=opens_group)
    if STAGE != "reduce":
        scale, shift = _affine(weight, bias, channel, in_block, LANES)
        scale *= rstd
    if STAGE == "on_chip":
        z = (value - mean[None, None, :]) * scale[None, None, :] + shift[None, None, :]
        tl.store(y + start + offsets, _act(z, ACT), mask=mask)
    if STAGE == "whole" or STAGE == "apply" or STAGE == "recompute":
        pixel = own * tiles * TILE
        at = start + pixel.to(tl.int64) * stride
        left = pixels - pixel
        for i in range(tl.minimum(owned * tiles, tl.cdiv(left, TILE))):
            mask = (row < left - i * TILE)[:, :, None] & in_block[None, None, :]
            z = (_load(total + at + offsets, mask) - mean[None, None, :]) * scale[None, None, :]
            tl.store(y + at + offsets, _act(z + shift[None, None, :], ACT), mask=mask)
            at += stride * TILE


@triton.jit
def _gradients(dy, total, at, offsets, mask, mean, scale, shift, ACT: tl.constexpr):
    """g = dy through the activation, and total - mean."""
    centered = _load(total + at + offsets, mask) - mean[None, None, :]
    z = centered * scale[None, None, :] + shift[None, None, :]
    return _act_backward(_load(dy + at + offsets, mask), z, ACT), centered


@triton.jit
def _store_dx(dx, dtotal, at, offsets, mask, g, centered, scale, constant, slope):
    value = g * scale[None, None, :] - constant[None, None, :] - centered * slope[None, None, :]
    if dtotal is not None:
        value += _load(dtotal + at + offsets, mask)
    tl.store(dx + at + offsets, value, mask=mask)


@_kernel
def group_norm_act_backward(
    dy, dtotal, total, dx, weight, bias, mean_in, rstd_in, channel_weight, channel_bias, partial,
    channels, pixels, size, block, tiles, splits, first_sample,
    CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, WIDE: tl.constexpr, ONE_GROUP: tl.constexpr, SPLITS: tl.constexpr,
    ACT: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    """dx, channel_weight and channel_bias may each be None. SPLITS: the most there can be."""
    pixels, sample, own, owned, channel, in_block, start, stride, layer, offsets, row = _locate(
        channels, pixels, block, splits, first_sample, CHANNELS_LAST, UNIT, DEPTH, ROWS, LANES,
        WIDE, STAGE == "whole" or STAGE == "on_chip",
    )  # fmt: skip
    TILE: tl.constexpr = DEPTH * ROWS
    mean, rstd = _statistics(mean_in, rstd_in, sample, channels, channel, size, in_block, ONE_GROUP)
    w, shift = _affine(weight, bias, channel, in_block, LANES)
    scale = w * rstd

    if STAGE == "on_chip":
        mask = (row < pixels)[:, :, None] & in_block[None, None, :]
        g, centered = _gradients(dy, total, start, offsets, mask, mean, scale, shift, ACT)
        sum_g = tl.sum(tl.sum(g, 0), 0)
        sum_gn = tl.sum(tl.sum(g * centered, 0), 0) * rstd
    if STAGE == "whole" or STAGE == "reduce":
        for split in range(own, own + owned):
            pixel = split * tiles * TILE
            at = start + pixel.to(tl.int64) * stride
            left = pixels - pixel
            rows_g = tl.zeros([ROWS, LANES], tl.float32)
            rows_gc = tl.zeros([ROWS, LANES], tl.float32)
            for i in range(tl.minimum(tiles, tl.cdiv(left, TILE))):
                mask = (row < left - i * TILE)[:, :, None] & in_block[None, None, :]
                g, centered = _gradients(dy, total, at, offsets, mask, mean, scale, shift, ACT)
                rows_g += tl.sum(g, 0)
                rows_gc += tl.sum(g * centered, 0)
                at += stride * TILE
            to = partial + (sample * splits + split) * channels * 2 + channel * 2
            tl.store(to, tl.sum(rows_g, 0), mask=in_block)
            tl.store(to + 1, tl.sum(rows_gc, 0) * rstd, mask=in_block)
    if STAGE == "whole":
        tl.debug_barrier()  # what other threads stored above is read below
    if STAGE == "whole" or STAGE == "apply":
        split = tl.arange(0, SPLITS)
        all_splits = (split < splits)[:, None] & in_block[None, :]
        of = partial + sample * splits * channels * 2
        of += (split[:, None] * channels + channel[None, :]) * 2
        sum_g = tl.sum(_load(of, all_splits), 0)
        sum_gn = tl.sum(_load(of + 1, all_splits), 0)

    if STAGE != "reduce":
        # dx = g * scale - constant - centered * slope
        constant = _over_groups(w * sum_g, channel, size, ONE_GROUP, LANES)
        slope = _over_groups(w * sum_gn, channel, size, ONE_GROUP, LANES)
        factor = rstd / (size * 1.0 * pixels)
        constant *= factor
        slope *= factor * rstd
        if own == 0:
            if channel_weight is not None:
                tl.store(channel_weight + sample * channels + channel, sum_gn, mask=in_block)
            if channel_bias is not None:
                tl.store(channel_bias + sample * channels + channel, sum_g, mask=in_block)
    if STAGE == "on_chip" and dx is not None:
        _store_dx(dx, dtotal, start, offsets, mask, g, centered, scale, constant, slope)
    if (STAGE == "whole" or STAGE == "apply") and dx is not None:
        pixel = own * tiles * TILE
        at = start + pixel.to(tl.int64) * stride
        left = pixels - pixel
        for i in range(tl.minimum(owned * tiles, tl.cdiv(left, TILE))):
            mask = (row < left - i * TILE)[:, :, None] & in_block[None, None, :]
            g, centered = _gradients(dy, total, at, offsets, mask, mean, scale, shift, ACT)
            _store_dx(dx, dtotal, at, offsets, mask, g, centered, scale, constant, slope)
            at += stride * TILE


@triton.jit(do_not_specialize=["samples", "channels"])
def group_norm_act_sum_samples(
    channel_weight, channel_bias, dweight, dbias, samples, channels,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dweight and dbias [C], each may be None, from their parts [N, C]."""
    rows = tl.arange(0, ROWS)
    channel = tl.program_id(0) * LANES + tl.arange(0, LANES)
    sum_w = tl.zeros([ROWS, LANES], tl.float32)
    sum_b = tl.zeros([ROWS, LANES], tl.float32)
    for first in range(0, samples, ROWS):
        at = (first + rows)[:, None] * channels + channel[None, :]
        mask = (first + rows < samples)[:, None] & (channel < channels)[None, :]
        if dweight is not None:
            sum_w += _load(channel_weight + at, mask)
        if dbias is not None:
            sum_b += _load(channel_bias + at, mask)
    if dweight is not None:
        tl.store(dweight + channel, tl.sum(sum_w, 0), mask=channel < channels)
    if dbias is not None:
        tl.store(dbias + channel, tl.sum(sum_b, 0), mask=channel < channels)
