"""Tiles of the GroupNorm + activation kernels, and which part of the tensors a program takes.

A tile is [PIXELS, LANES] of pixels and channels in both memory formats; only its strides tell them
apart. A program owns a block of whole groups of one sample. The pixels of a large map are cut into
splits of ``tiles`` tiles each.

A tile's pixels are summed in two steps: DEPTH of them by each thread (those of one access where
pixels are contiguous, of several where channels are), then, once at the end, the ROWS that are left
across threads. The tile is loaded in two dimensions and reshaped to three before the first step.
Loaded in three, some versions of Triton spread DEPTH over threads.

Shapes: [N, P, C] of N samples, P pixels and C channels stands for [N, C, P] as well, by
CHANNELS_LAST; G groups of ``group_size`` = C / G channels; a program's ``block`` of channels is a
multiple of group_size. UNIT divides the contiguous dimension and its part of the block.
"""

import triton
import triton.language as tl

# Of the loops over tiles: two are under way, by asynchronous copies into shared memory where the
# GPU has them, while a third is worked on. Not of tiles of one pixel, which are as wide as a group:
# three of them may be more than there is shared memory.
STAGES = tl.constexpr(3)

kernel = triton.jit(
    do_not_specialize=["channels", "pixels", "group_size", "block", "tiles", "splits"]
)


@triton.jit
def divisible(channels, pixels, block, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr):
    """Tell the compiler how wide accesses may be; returns the same numbers."""
    if CHANNELS_LAST:
        return channels // UNIT * UNIT, pixels, block // UNIT * UNIT
    return channels, pixels // UNIT * UNIT, block


@triton.jit
def locate(
    channels, pixels, block, splits, CHANNELS_LAST: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The part of this program, one of ``splits`` for each block.

    Returns sample (int64); split; channel [LANES] and whether the block has it; the offset of the
    block's first pixel (int64).
    """
    index = tl.program_id(0)
    blocks = tl.cdiv(channels, block)
    first_channel = index % blocks * block
    index = index // blocks
    sample = (index // splits).to(tl.int64)
    lane = tl.arange(0, LANES)
    channel = first_channel + lane
    in_block = (lane < block) & (channel < channels)
    start = sample * channels * pixels
    if CHANNELS_LAST:
        start += first_channel
    else:
        start += first_channel.to(tl.int64) * pixels
    return sample, index % splits, channel, in_block, start


@triton.jit
def pixel_stride(channels, CHANNELS_LAST: tl.constexpr):
    """Elements between neighbouring pixels, int64."""
    if CHANNELS_LAST:
        return channels.to(tl.int64)
    return tl.full([], 1, tl.int64)


@triton.jit
def tile_offsets(
    pixel, channels, pixels, CHANNELS_LAST: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Offsets [pixel, LANES] from a tile's first element."""
    pixel, lane = pixel[:, None], tl.arange(0, LANES)[None, :]
    if WIDE:
        pixel, lane = pixel.to(tl.int64), lane.to(tl.int64)
    if CHANNELS_LAST:
        return pixel * channels + lane
    return pixel + lane * pixels


@triton.jit
def load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def split_depth(
    tile, CHANNELS_LAST: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """[PIXELS, LANES] -> [DEPTH, ROWS, LANES] in channels_last, else [ROWS, DEPTH, LANES]."""
    if CHANNELS_LAST:
        return tl.reshape(tile, [DEPTH, ROWS, LANES])
    else:
        return tl.reshape(tile, [ROWS, DEPTH, LANES])


@triton.jit
def sum_depth(
    tile, CHANNELS_LAST: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Sum [PIXELS, LANES] to [ROWS, LANES] within each thread."""
    return tl.sum(split_depth(tile, CHANNELS_LAST, DEPTH, ROWS, LANES), 0 if CHANNELS_LAST else 1)


@triton.jit
def over_groups(v, channel, group_size, ONE_GROUP: tl.constexpr):
    """v [LANES] summed over each channel's group, for every channel; [1] if it is one group."""
    if ONE_GROUP:
        return tl.zeros([1], tl.float32) + tl.sum(v, 0)
    else:
        group = channel // group_size
        # Not a product with the mask: a NaN stays in its group.
        return tl.sum(tl.where(group[:, None] == group[None, :], v[None, :], 0.0), 1)


@triton.jit
def statistics(
    mean,  # [N, G]
    rstd,  # [N, G]
    sample, channels, channel, group_size, in_block, ONE_GROUP: tl.constexpr,
):  # fmt: skip
    """Load mean and rstd of each channel's group; [1] for one group, to save registers."""
    groups = channels // group_size
    if ONE_GROUP:
        at = sample * groups + tl.program_id(0) % groups + tl.zeros([1], tl.int64)
        return tl.load(mean + at), tl.load(rstd + at)
    else:
        at = sample * groups + channel // group_size
        return load(mean + at, in_block), load(rstd + at, in_block)


@triton.jit
def affine(
    weight,  # [C], [N, C] if PER_SAMPLE, or None
    bias,  # [C], [N, C] if PER_SAMPLE, or None
    sample, channels, channel, in_block, LANES: tl.constexpr, PER_SAMPLE: tl.constexpr,
):  # fmt: skip
    """Load weight and bias [LANES]: 1 and 0 where there is none."""
    w = tl.full([LANES], 1.0, tl.float32)
    b = tl.zeros([LANES], tl.float32)
    at = channel
    if PER_SAMPLE:
        at = sample * channels + channel
    if weight is not None:
        w = load(weight + at, in_block)
    if bias is not None:
        b = load(bias + at, in_block)
    return w, b
