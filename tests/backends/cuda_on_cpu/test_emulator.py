"""What a kernel may do runs as on a GPU; what it may not do is found. The kernels: kernels.cu."""

import ctypes
import functools
import re
import subprocess
import sys

import pytest
import torch

from tests import ROOT
from tests.backends.cuda_on_cpu import build


@functools.cache
def library():
    kernels = build.compiled(build.HERE / "kernels.cu", build.BUILD)
    return ctypes.CDLL(build.library([kernels], build.BUILD / "kernels.so"))


def launch(kernel, blocks=1, x=64, y=1, data=None):
    """(out, error) of a kernel whose thread i makes out[i] of in: 0, 1, 2, ..., or ``data``."""
    function = library()[f"launch_{kernel}"]
    function.restype = ctypes.c_char_p
    data = torch.arange(blocks * x * y).float() if data is None else data
    out = torch.full((blocks * x * y,), float("nan"))
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in (data, out)]
    return out, function(blocks, x, y, *addresses).decode()


def test_shared_memory():
    out, error = launch("flip", blocks=3)
    assert error == "no error"
    assert torch.equal(out, torch.arange(3 * 64).view(3, 64).flip(1).float().flatten())


def test_blocks_of_two_dimensions_and_partial_warps():
    out, error = launch("row", blocks=2, x=5, y=7)
    assert error == "no error"
    assert torch.equal(out.view(2, 7, 5), torch.arange(7.0).view(7, 1).expand(2, 7, 5))


@pytest.mark.parametrize(
    ("kernel", "source"),
    [
        ("shuffle_xor", lambda i: i ^ 5),
        ("shuffle_xor_of_8", lambda i: i ^ 8 if i & 8 else i),  # earlier lanes, but not later ones
        ("shuffle_down", lambda i: i + 3 if i % 32 + 3 < 32 else i),
        ("shuffle_down_of_4", lambda i: i + 1 if i % 4 < 3 else i),
        ("shuffle", lambda i: i // 32 * 32 + 7),
        ("shuffle_of_16", lambda i: i // 16 * 16 + (i + 1) % 16),
        ("shuffle_halves", lambda i: i ^ 1 if i % 32 < 16 else i ^ 2),
    ],
)
def test_shuffles(kernel, source):
    out, error = launch(kernel)
    assert error == "no error"
    assert out.tolist() == [source(i) for i in range(64)]


@pytest.mark.parametrize("where", ["with_other_warps", "with_first", "with_last", "in_warp"])
def test_a_missing_barrier_reads_what_nobody_wrote(where):
    """Whichever thread is to write it, in one of two blocks."""
    out, error = launch(f"race_{where}", blocks=2)
    assert error == "no error"
    assert out.isnan().any()


def test_a_missing_barrier_reads_what_was_written_too_early():
    out, error = launch("race_after_read")
    assert error == "no error"
    assert (out == -1).any()


@pytest.mark.parametrize(
    ("kernel", "found"),
    [
        ("barrier_without_one", "thread 0 waits for its block .*, thread 40 has returned"),
        ("two_barriers", "thread 0 waits for its block .*, thread 40 waits for its block"),
        ("warp_without_one", "thread 0 waits for its warp"),
        ("two_shuffles", "thread 0 waits for its warp"),
        ("barrier_and_warp", "thread 0 waits for its block .*, thread 1 waits for its warp"),
        ("lane_outside_mask", "thread 0 waits for its warp"),
        ("mask_without_caller", "thread 0 waits for its warp"),
    ],
)
def test_waiting_in_vain_is_an_error(kernel, found):
    for _ in range(2):  # what the first leaves behind does no harm
        _, error = launch(kernel)
        assert re.search(f"^block 0: {found}", error), error
    test_shared_memory()


@pytest.mark.parametrize("blocks, x, y", [(0, 64, 1), (1, 0, 1), (1, 1024, 2)])
def test_impossible_launches(blocks, x, y):
    _, error = launch("flip", blocks, x, y)
    assert error.startswith(f"cannot run {blocks} blocks of {x * y} threads")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_round_as_pytorch(dtype):
    """Every value of 16 bits, those halfway between two, their neighbours, and overflow."""
    kernel, step = ("to_half", 1 << 12) if dtype == torch.float16 else ("to_bfloat16", 1 << 15)
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    halfway = values.view(torch.int32) + step
    near = [(halfway + offset).view(torch.float32) for offset in (-1, 0, 1)]
    data = torch.cat([values, *near])
    out, error = launch(kernel, blocks=len(data) // 1024, x=1024, data=data)
    assert error == "no error"
    torch.testing.assert_close(out, data.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif("address" not in build.SANITIZERS, reason="needs BITKERN_SANITIZE=address,...")
@pytest.mark.parametrize(
    ("kernel", "found"),
    [
        ("past_tensor", "heap-buffer-overflow"),
        ("past_shared", "global-buffer-overflow"),
        ("past_stack", "stack-buffer-overflow"),
        ("negative_shift", "shift exponent -1"),
    ],
)
def test_sanitizers_see_kernels(kernel, found):
    code = f"from tests.backends.cuda_on_cpu import test_emulator; test_emulator.launch({kernel!r})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and found in done.stderr, done.stderr
