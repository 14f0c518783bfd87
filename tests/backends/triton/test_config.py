"""Launch configurations and the launch itself, which need no GPU."""

import math
from types import SimpleNamespace

import pytest
import torch

from bitkern.backends.triton import config, launch, weight_standardize

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
    """Accesses take 16 bytes, in rows of at least 32, wherever the sizes allow it."""
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


class Kernel:
    """Stands in for a Triton kernel: remembers calls, returns what a compiled one looks like."""

    __name__ = "kernel"
    function = packed_metadata = None

    def __init__(self):
        self.compilations, self.calls = 0, []

    def __getitem__(self, grid):
        def first(*args, **options):
            self.compilations += 1
            self.calls.append((grid[0], args))
            return self

        return first

    def run(self, programs, y, z, stream, *rest):
        assert (y, z, stream, *rest[:5]) == (1, 1, "stream", None, None, None, None, None)
        self.calls.append((programs, rest[5:]))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    driver = SimpleNamespace(get_current_stream=lambda device: "stream")
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=driver))
    return Kernel()


def test_first_launch_is_kept(kernel):
    x = torch.empty(8)
    for programs in (3, 5):
        launch.launch(kernel, programs, (x, None), (7, 1.5), (True, "relu"), 4)
    assert kernel.compilations == 1
    numbers = (None, 7, 1.5, True, "relu")
    assert kernel.calls == [(3, (x, *numbers)), (5, (x.data_ptr(), *numbers))]


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


def test_alignment_of_each_tensor_counts(kernel):
    """A kernel compiled for aligned addresses must not get others; each is kept."""
    x = torch.empty(9)
    for _ in range(2):
        for pointers in ((x, x), (x[1:], x), (x, x[1:]), (x[1:], x[1:])):
            launch.launch(kernel, 1, pointers, (), (), 4)
    assert kernel.compilations == 4


def test_large_storages_are_other_kernels_on_amd(kernel, monkeypatch):
    """Triton gives what lies within 2 GB addresses of 32 bits there."""
    monkeypatch.setattr(launch, "AMD", True)
    small = torch.empty(8)
    large = torch.empty((1 << 29) + 8)[:8]  # of fp32, never touched
    for _ in range(2):
        for x in (small, large):
            launch.launch(kernel, 1, (x,), (), (), 4)
    assert kernel.compilations == 2


def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def test_first_launch_in_a_capture_is_refused(kernel, monkeypatch):
    x = torch.empty(8)
    launch.launch(kernel, 1, (x,), (), (), 4)
    capturing(monkeypatch)
    launch.launch(kernel, 1, (x,), (), (), 4)
    message = "^kernel: the first call cannot be captured in a CUDA graph: run the step once before"
    with pytest.raises(RuntimeError, match=message):
        launch.launch(kernel, 1, (x,), (), (), 8)


def test_tables_of_new_layers_in_a_capture_are_refused(monkeypatch):
    layers = (weight_standardize._Layer(8, 27, 27, False, 1.0),) * 2
    weight_standardize._layer_tables(layers, torch.device("cpu"))
    capturing(monkeypatch)
    weight_standardize._layer_tables(layers, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="^weight_standardize: the first call"):
        weight_standardize._layer_tables(layers[:1], torch.device("cpu"))


def test_tables_are_never_dropped():
    """A captured graph goes on reading them."""
    kept = [
        weight_standardize._layer_tables(
            (weight_standardize._Layer(8, length, length, False, 1.0),), torch.device("cpu")
        )
        for length in range(1, 200)
    ]
    again = weight_standardize._layer_tables(
        (weight_standardize._Layer(8, 1, 1, False, 1.0),), torch.device("cpu")
    )
    assert again is kept[0]
