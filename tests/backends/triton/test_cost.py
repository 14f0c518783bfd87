"""Predictions for GroupNorm + activation, and what they say of the plans. None is a measurement."""

import itertools

import pytest

from benchmarks import cost
from benchmarks.cost import DEVICES, SHIPPED, Code, Pass
from bitkern.backends.triton import config
from tests.backends.triton import shipped

MB = 1 << 20
IMAGES = 128, 224, 448, 480
SHAPES = sorted({shape for w in (1, 2, 3, 4) for i in IMAGES for shape in shipped.maps(w, i)})
# KB that must be under way on a multiprocessor: twice Little's law.
UNDER_WAY = {"A100": 25, "H100": 32, "H200": 45}
# 48 channels fill 3/4 of their lanes, and 640 programs leave a last wave of 112.
SLOWER = {("H200", 384, 56, 16, False): 0.80}


def cases():
    for name, (channels, size), batch, backward in itertools.product(
        DEVICES, SHAPES, (1, 16, 128), (False, True)
    ):
        problem = batch, channels, size * size
        plan = config.group_norm_plan(channels, size * size, 32, 2, True, 1 + backward)
        yield (name, channels, size, batch, backward), problem, plan


def fraction(problem, device, **options):
    """Return the predicted speed as a fraction of the two-pass floor."""
    code, backward = options.get("code", SHIPPED), options.get("backward", False)
    launches = cost.group_norm_act(*problem, device, **options)
    seconds = sum(cost.seconds(launch, code, device) for launch in launches)
    return cost.two_pass_floor(*problem, device, backward=backward) / seconds


def test_large_maps_reach_the_two_pass_floor():
    for case, problem, _ in cases():
        name, channels, size, batch, backward = case
        if batch * channels * size * size * 2 >= 32 * MB:
            least = SLOWER.get(case, 0.85)
            assert fraction(problem, DEVICES[name], backward=backward) >= least, case


def test_enough_is_under_way():
    """Large maps that are read twice have enough bytes in flight.

    For maps that stay on chip only the predicted time counts.
    """
    for case, problem, plan in cases():
        name, channels, size, batch, backward = case
        launches = cost.group_norm_act(*problem, DEVICES[name], backward=backward)
        if batch * channels * size * size * 2 < 32 * MB or plan.on_chip:
            continue
        wanted = UNDER_WAY[name]
        if plan.splits == 1 and backward and plan.block != channels // 32:
            wanted = 32  # sums over several groups leave registers for half a tile
        wanted *= plan.block / plan.lanes
        for a_pass in itertools.chain(*launches):
            there = cost.bytes_under_way(a_pass, SHIPPED, DEVICES[name])
            assert there >= wanted * 1024, (case, plan)


def test_small_maps_fill_the_device_or_are_short():
    """All multiprocessors work, all bytes are in flight, or it takes no longer than a launch."""
    for case, problem, _ in cases():
        name, channels, size, batch, backward = case
        if batch * channels * size * size * 2 < 32 * MB:
            device = DEVICES[name]
            launches = cost.group_norm_act(*problem, device, backward=backward)
            for a_pass in itertools.chain(*launches):
                busy = a_pass.programs >= device.multiprocessors or a_pass.tiles <= SHIPPED.tiles
                assert busy or cost.pass_seconds(a_pass, SHIPPED, device) < 3 * cost.LAUNCH, case


def test_degraded_plans_fail():
    device, problem = DEVICES["H100"], (16, 256, 112 * 112)
    good = config.group_norm_plan(256, 112 * 112, 32, 2, True, 1)
    assert fraction(problem, device, plan=good) >= 0.85
    for change in (
        {"splits": 1, "tiles": good.tiles * good.splits},  # too few programs
        {"rows": good.rows // 8, "tiles": good.tiles * 8},  # too little under way
    ):
        assert fraction(problem, device, plan=good._replace(**change)) < 0.85
    for code in (Code(programs=1, tiles=1), Code(tiles=0.5), Code(instructions=3000)):
        assert fraction(problem, device, plan=good, code=code) < 0.85


# What commit 559d16e compiled to for sm_90 under Triton 3.6: loads under way of 4 per tile,
# instructions of the loop, pixels and channels of a tile, tiles of a program.
BEFORE = {
    "forward whole 256x56": ((128, 256, 56), False, 0.25, 493, 512, 16, 7, True, 1),
    "forward reduce 1024x120": ((16, 1024, 120), False, 0.75, 495, 128, 64, 4, False, 2),
    "backward whole 256x56": ((128, 256, 56), True, 1.0, 252, 256, 16, 13, False, 1),
}


@pytest.mark.parametrize("name", BEFORE)
def test_what_was_slow_is_predicted_slow(name):
    """The model predicts 0.2 to 0.4 of the single-read floor, as another estimate did."""
    (samples, channels, height), backward, under_way, instructions, *tile = BEFORE[name]
    pixels, block, tiles, in_l2, launches = tile
    device, tensors = DEVICES["H100"], 1 + backward
    size = samples * channels * height * height * 2
    programs = samples * channels // block * (1 if launches == 1 else height**2 // pixels // tiles)
    tile_bytes = pixels * block * 2 * tensors
    reduce = Pass(programs, tile_bytes, tiles, 1, tensors * size, 0)
    apply = reduce._replace(written=size, in_l2=in_l2)
    seconds = launches * cost.LAUNCH
    seconds += cost.pass_seconds(reduce, Code(1, under_way, instructions, False), device)
    seconds += cost.pass_seconds(apply, Code(1, 1.0, 252, False), device)
    floor = (tensors + 1) * size / device.copy_rate
    assert 0.2 <= floor / seconds <= 0.4


def test_norms_of_others_are_predicted():
    """RMSNorm of cuDNN in bf16 has 3.7 to 3.8 TB/s on an H200: a program per row of 16 KB."""
    size = 64 * MB
    launch = [Pass(size >> 14, 1 << 14, 1, 1, size, size)]
    seconds = cost.seconds(launch, Code(8, 1.0, 200, False), DEVICES["H200"])
    assert 3.4e12 <= 2 * size / seconds <= 4.1e12
