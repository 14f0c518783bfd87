"""Launch configurations of the Triton kernels: pure functions of the problem and the device."""

import functools
import math
from typing import NamedTuple

TILE_BYTES = 16 * 1024  # of all tensors together: what a program keeps in registers
RESIDENT_BYTES = 88 * 1024  # a program's share of all tensors that its second pass finds in L2
TILES_PER_SPLIT = 4  # at least: the first loads of a program wait, those of its other tiles do not
MAX_SPLITS = 32  # of a sample's pixels
COMBINED = 2048  # splits times lanes: partial results that one program combines


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def max_splits(lanes: int) -> int:
    return max(min(MAX_SPLITS, COMBINED // lanes), 1)


class GroupNormPlan(NamedTuple):
    """The division of one sample into work. A tile is [depth * rows pixels, lanes channels]."""

    block: int  # channels of a program: whole groups
    lanes: int  # the next power of two
    depth: int  # pixels of a tile that one thread sums
    rows: int
    tiles: int  # per split
    splits: int  # partial results per sample and group, combined in a fixed order
    unit: int  # divides the contiguous dimension and the block's part of it: width of an access
    warps: int

    @property
    def on_chip(self) -> bool:
        """One tile is all: a program keeps it in registers and reads it once."""
        return self.tiles == self.splits == 1


@functools.lru_cache(maxsize=1024)
def group_norm_plan(
    channels: int, pixels: int, groups: int, itemsize: int, channels_last: bool, tensors: int
) -> GroupNormPlan:
    """The plan for every sample, whatever the batch: a sample's result must not depend on it.

    ``tensors`` is the number of big tensors of which a program holds a tile at a time.
    """
    group_size = channels // groups
    if channels_last:
        # Channels are contiguous: rows of 128 bytes where they fit, of 32 bytes at least.
        widest, narrowest, vector = min(128 // itemsize, 64), 32 // itemsize, 16 // itemsize
        step = math.lcm(group_size, vector)
        if channels % vector or step > widest:
            step = group_size
        unit = math.gcd(channels, step, 8)
    else:
        # Pixels are contiguous: groups are packed only to fill the tile of a small map.
        widest, narrowest, step = 64, 1, group_size
        unit = math.gcd(pixels, 8)
    # Narrow accesses take more registers, for addresses.
    narrow = 4 if unit * itemsize < 16 else 1
    tile = TILE_BYTES // itemsize // tensors // narrow
    blocks = [step]
    while 2 * blocks[-1] <= min(widest, channels):
        blocks.append(2 * blocks[-1])
    blocks = [block for block in blocks if block >= narrowest] or blocks[-1:]

    on_chip = [b for b in blocks if power_of_two(pixels) * power_of_two(b) <= tile]
    resident = [b for b in blocks if pixels * b * itemsize * tensors <= RESIDENT_BYTES]
    if on_chip:
        block, pixels_of_tile, tiles, splits = on_chip[-1], power_of_two(pixels), 1, 1
    else:
        # Wide rows; where rows are of pixels, narrow blocks are many programs.
        block = (resident or blocks)[-1 if channels_last else 0]
        if resident and block != group_size:
            tile //= tensors  # the sums over groups take registers
        pixels_of_tile = max(tile // power_of_two(block), 1)
        tiles = math.ceil(pixels / pixels_of_tile)
        splits = 1
        if not resident:
            splits = min(max_splits(power_of_two(block)), max(tiles // TILES_PER_SPLIT, 1))
            tiles = math.ceil(tiles / splits)
            splits = math.ceil(pixels / (pixels_of_tile * tiles))
    lanes = power_of_two(block)
    elements = pixels_of_tile * lanes
    # Sums over several groups compare the lanes in pairs: 32 pairs per thread at most.
    least = 1 if block == group_size else max(lanes * lanes // 1024, 1)
    warps = min(max(elements * itemsize * tensors * narrow // 1024, least), 8)
    depth = min(max(elements * itemsize // (16 * 32 * warps), 1), pixels_of_tile)
    if not channels_last:  # those of one access
        depth = min(unit, 16 // itemsize, pixels_of_tile)
    rows = pixels_of_tile // depth
    return GroupNormPlan(block, lanes, depth, rows, tiles, splits, unit, warps)


class FilterTile(NamedTuple):
    """A program's tile in weight standardization."""

    filters: int
    block: int  # elements of a filter at a time
    whole: bool  # a filter fits
    aligned: bool  # 8 divides the length of a filter: accesses of 16 bytes


# The tiles of a launch for many layers; the last two for long and for unaligned filters.
FILTER_TILES = (
    FilterTile(32, 256, True, True),
    FilterTile(8, 1024, True, True),
    FilterTile(4, 2048, True, True),
    FilterTile(2, 4096, True, True),
    FilterTile(1, 8192, True, True),
    FilterTile(1, 4096, False, True),
    FilterTile(1, 1024, False, False),
)
# With a step of SGD, which has a third tensor in registers.
SGD_TILES = (
    FilterTile(16, 256, True, True),
    FilterTile(4, 1024, True, True),
    FilterTile(2, 2048, True, True),
    FilterTile(1, 4096, True, True),
    FilterTile(1, 2048, False, True),
    FilterTile(1, 1024, False, False),
)
FILTER_WARPS = 8


def filter_kind(length: int, aligned: bool, tiles: tuple[FilterTile, ...] = FILTER_TILES) -> int:
    """The index in ``tiles`` for filters of this many elements."""
    if not aligned:
        return len(tiles) - 1
    fitting = (i for i, tile in enumerate(tiles) if tile.whole and length <= tile.block)
    return next(fitting, len(tiles) - 2)


@functools.lru_cache(maxsize=1024)
def filter_tile(filters: int, length: int, aligned: bool) -> tuple[FilterTile, int]:
    """Tile and warps for one layer alone: filters are split until they fill the device."""
    tile = FILTER_TILES[filter_kind(length, aligned)]
    if tile.whole:
        block = max(power_of_two(length), 32)
        each = min(tile.filters * tile.block // block, power_of_two(filters // 128))
        tile = tile._replace(filters=each, block=block)
    each = 512 if aligned else 256  # elements of a warp: narrow accesses take more registers
    return tile, min(max(tile.filters * tile.block // each, 1), FILTER_WARPS)
