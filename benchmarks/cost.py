"""Predicted GPU time of GroupNorm + activation, from plans and machine code.

A program copies its tiles, and works on them; what limits a launch is the bytes that are under way
(Little's law), the copy rate of the device's memory, or the instructions of the loop. No constant
is fitted to a measurement of our kernels; ``tests/backends/triton/test_cost.py`` holds the model
against what is known of others.
"""

import math
from typing import NamedTuple

from bitkern.backends.triton import config

LATENCY = 700e-9  # of a load from an idle memory, in seconds; twice that at full rate
L2_LATENCY = 300e-9
LAUNCH = 2e-6  # from the end of one kernel to the next one's first load, in a CUDA graph
CLOCK = 1.7e9  # of 4 instructions per multiprocessor


class Device(NamedTuple):
    multiprocessors: int
    copy_rate: float  # bytes per second, read and written together
    l2_bytes: int


DEVICES = {
    "A100": Device(108, 1.7e12, 40 << 20),
    "H100": Device(132, 3.0e12, 50 << 20),
    "H200": Device(132, 4.3e12, 60 << 20),
}


class Code(NamedTuple):
    """A compiled kernel: what ``tests/backends/triton/shipped.py`` reads from machine code."""

    programs: int = 2  # on a multiprocessor
    tiles: float = 2.0  # of a program's tiles under way
    instructions: int = 300  # of all warps, for each 2 KB of a tile that a warp has
    overlaps: bool = True  # the loads of the next tile do not wait for the work on this one


SHIPPED = Code()


class Pass(NamedTuple):
    """A pass of a launch over its tensors, all programs together."""

    programs: int
    tile_bytes: int  # read, of all tensors
    tiles: int  # of a program
    dependent: int  # loads that its first tile waits for, one after the other
    read: float  # bytes of all programs
    written: float
    in_l2: bool = False  # what is read


def pass_seconds(a_pass: Pass, code: Code, device: Device) -> float:
    slots = device.multiprocessors * code.programs
    full, rest = divmod(a_pass.programs, slots)
    share = a_pass.read / a_pass.programs, a_pass.written / a_pass.programs
    return sum(
        _wave(programs, count, share, a_pass, code, device)
        for programs, count in ((slots, full), (rest, 1 if rest else 0))
        if count
    )


def _wave(programs, count, share, a_pass, code, device):
    """``count`` times as many programs at a time."""
    read, written = (count * programs * part for part in share)
    under_way = programs * a_pass.tile_bytes * min(code.tiles, a_pass.tiles)
    work = a_pass.tile_bytes / 2048 * code.instructions / 4 / CLOCK  # of a tile, if alone
    there = math.ceil(programs / device.multiprocessors)
    latency = L2_LATENCY if a_pass.in_l2 else LATENCY
    if not code.overlaps:
        latency += work * there
    limit = 2 * device.copy_rate if a_pass.in_l2 else device.copy_rate
    # Rate times latency is what is under way; the latency doubles as the rate nears the limit.
    wanted = under_way / latency
    rate = min(limit, limit / 2 * (math.sqrt(1 + 4 * wanted / limit) - 1))
    time = read / rate
    time += count * a_pass.dependent * latency / code.programs  # others load meanwhile
    moved = (written if a_pass.in_l2 else read + written) / device.copy_rate
    busy = min(programs, device.multiprocessors)
    worked = read / a_pass.tile_bytes * work / busy
    return max(time, moved, worked)


def seconds(launch: list[Pass], code: Code, device: Device) -> float:
    """Seconds of one launch in a row of them."""
    return LAUNCH + sum(pass_seconds(a_pass, code, device) for a_pass in launch)


def group_norm_act(
    samples: int, channels: int, pixels: int, device: Device, *, backward: bool = False,
    itemsize: int = 2, groups: int = 32, code: Code = SHIPPED,
    plan: config.GroupNormPlan | None = None,
) -> list[list[Pass]]:  # fmt: skip
    """The launches of the operator in channels_last, its sums over samples left out."""
    tensors = 1 + backward
    plan = plan or config.group_norm_plan(channels, pixels, groups, itemsize, True, tensors)
    size = samples * channels * pixels * itemsize
    blocks = samples * math.ceil(channels / plan.block)
    tile = plan.depth * plan.rows * plan.block * itemsize * tensors
    if plan.on_chip:
        return [[Pass(blocks, tile, 1, 1, tensors * size, size)]]
    first = Pass(blocks * plan.splits, tile, plan.tiles, 1, tensors * size, 0)
    if plan.splits == 1:
        resident = device.multiprocessors * code.programs * tile * plan.tiles <= device.l2_bytes
        return [[first, first._replace(written=size, in_l2=resident)]]
    fits = (tensors + 1) * size <= device.l2_bytes
    return [[first], [first._replace(dependent=2, written=size, in_l2=fits)]]


def two_pass_floor(samples, channels, pixels, device, *, backward=False, itemsize=2):
    """Seconds for three tensor passes forward, five backward, at copy rate."""
    size = samples * channels * pixels * itemsize
    return (5 if backward else 3) * size / device.copy_rate


def bytes_under_way(a_pass: Pass, code: Code, device: Device) -> float:
    """On a multiprocessor."""
    there = min(code.programs, a_pass.programs / device.multiprocessors)
    return there * a_pass.tile_bytes * min(code.tiles, a_pass.tiles)
