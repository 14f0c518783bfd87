"""Launch configurations and the launch itself, which need no GPU."""

import math

import pytest
import torch

from bitkern.backends.triton import config, launch

SIZES = [7, 8, 14, 15, 28, 30, 56, 60, 112, 120]
CHANNELS = [64, 128, 192, 256, 768, 1024, 2048, 6144, 8192]


def plans():
    for channels in CHANNELS:
        for size in SIZES:
            for itemsize in (2, 4):
                for channels_last in (True, False):
                    for tensors in (1, 2):
                        problem = channels, size * size, 32, itemsize, channels_last, tensors
                        yield *problem, config.group_norm_plan(*problem)


def test_plans_cover_every_element_once():
    for channels, pixels, groups, _, _, _, plan in plans():
        assert plan.block % (channels // groups) == 0 and plan.block <= plan.lanes
        tile = plan.depth * plan.rows
        assert (plan.splits - 1) * plan.tiles * tile < pixels <= plan.splits * plan.tiles * tile
        assert plan.splits <= config.max_splits(plan.lanes)
        for power in (plan.lanes, plan.depth, plan.rows, plan.warps):
            assert power == config.power_of_two(power)


def test_accesses_are_wide():
    """16 bytes and rows of 32 bytes at least, wherever the sizes allow it."""
    for channels, pixels, groups, itemsize, channels_last, _, plan in plans():
        if channels_last:
            assert plan.unit * itemsize >= 16
            assert plan.block * itemsize >= min(32, channels * itemsize)
        else:
            assert plan.unit == math.gcd(pixels, 8)
        contiguous = channels if channels_last else pixels
        assert contiguous % plan.unit == 0
        assert not channels_last or plan.block % plan.unit == 0
        assert plan.block * itemsize <= 128 or plan.block == channels // groups or not channels_last


def test_tiles_fit_in_registers():
    for *_, itemsize, _, tensors, plan in plans():
        elements = plan.depth * plan.rows * plan.lanes
        assert elements * itemsize * tensors <= max(config.TILE_BYTES, plan.lanes * itemsize * 2)
        assert elements * tensors // (32 * plan.warps) <= 32


@pytest.mark.parametrize("multiprocessors", [108, 132, 148])
def test_fills_the_device(multiprocessors):
    """At batch 1 too where there is enough to do: 32 kB for each multiprocessor."""
    for channels, pixels, _, itemsize, channels_last, _, plan in plans():
        blocks = math.ceil(channels / plan.block)
        for samples in (1, 256):
            whole = config.in_one_launch(plan, samples * blocks, multiprocessors)
            programs = samples * blocks * (1 if whole else plan.splits)
            enough = samples * channels * pixels * itemsize >= multiprocessors * 32768
            # Where a program's work is short, a second launch would take longer.
            short = plan.tiles * plan.splits <= 4
            if enough and not short and channels_last:
                assert programs >= 0.8 * multiprocessors, (channels, pixels, samples, plan)


def test_plans_do_not_know_the_batch():
    """A sample's result may depend on its size only: the plan has no other argument."""
    names = config.group_norm_plan.__wrapped__.__annotations__
    assert set(names) == {
        "channels", "pixels", "groups", "itemsize", "channels_last", "tensors", "return",
    }  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 24, 63, 100, 256, 1000, 4096])
def test_any_group_size(size):
    for groups in (1, 2, 32):
        for channels_last in (True, False):
            for pixels in (1, 49, 5041):
                problem = size * groups, pixels, groups, 2, channels_last, 1
                plan = config.group_norm_plan(*problem)
                assert plan.block % size == 0
                assert plan.lanes >= plan.block > plan.lanes // 2
                assert plan.block == size or plan.lanes <= 64  # sums over pairs of channels


def test_chunks():
    l2 = 50 << 20
    assert config.samples_per_chunk(8, 1 << 20, l2) == 8  # all of it fits
    assert config.samples_per_chunk(256, 1 << 20, l2) == 16  # a third of it
    assert config.samples_per_chunk(256, 100 << 20, l2) == 1
    assert config.samples_per_chunk(1, 100 << 20, l2) == 1


class Kernel:
    """Stands in for a Triton kernel: remembers calls, returns what a compiled one looks like."""

    def __init__(self):
        self.compilations, self.calls = 0, []

    def __getitem__(self, grid):
        def run(*args, **options):
            if options:
                self.compilations += 1
            self.calls.append((tuple(grid), args))
            return self

        return run


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    return Kernel()


def test_first_launch_is_kept(kernel):
    x = torch.empty(8)
    for programs in (3, 5):
        launch.launch(kernel, programs, (x, None), (7, 1.5), (True, "relu"), 4)
    assert kernel.compilations == 1
    args = (x, None, 7, 1.5, True, "relu")
    assert [grid for grid, _ in kernel.calls] == [(3,), (5, 1, 1)]
    assert all(given[:1] == (x,) and given[1:] == args[1:] for _, given in kernel.calls)


def test_what_a_compilation_depends_on(kernel):
    x = torch.empty(8)
    base = dict(pointers=(x, x), numbers=(7,), constants=(True,), warps=4)
    changes = [
        {},
        {"pointers": (x, None)},
        {"pointers": (x, x.bfloat16())},
        {"constants": (False,)},
        {"warps": 8},
    ]
    for _ in range(2):
        for change in changes:
            launch.launch(kernel, 1, **base | change)
    assert kernel.compilations == len(changes)


def test_unaligned_tensors_go_through_triton(kernel):
    """A kernel compiled for aligned addresses must not get others."""
    x = torch.empty(9)
    launch.launch(kernel, 1, (x,), (), (), 4)
    for _ in range(2):
        launch.launch(kernel, 1, (x[1:],), (), (), 4)
    assert kernel.compilations == 3
