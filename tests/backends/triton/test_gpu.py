"""Tests that need a GPU: real sizes, streams, CUDA graphs, memory, the sanitizers."""

import shutil
import sys

import pytest
import torch

from bitkern.backends.triton import group_norm_act, launch
from tests import process
from tests.backends.triton import shipped
from tests.backends.triton.test_group_norm_act import DTYPES, EPS, FORMATS, problem
from tests.backends.triton.test_weight_standardize import Problem as Weights

pytestmark = pytest.mark.gpu

# (batch, channels, height): R50x1 at 224 and 480, R152x4 at 224.
MAPS = [
    (64, 64, 56), (64, 256, 56), (64, 512, 28), (64, 1024, 14), (64, 2048, 7),
    (4, 64, 120), (4, 256, 120), (16, 512, 60), (16, 1024, 30), (16, 2048, 15),
    (8, 1024, 56), (8, 2048, 28), (8, 4096, 14), (8, 8192, 7), (8, 192, 56), (8, 6144, 7),
]  # fmt: skip


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", MAPS, ids=str)
def test_maps(case, dtype, format, residual):
    batch, channels, size = case
    # SiLU is smooth: of ReLU a rounding of z near zero decides over a whole dy.
    shape = (batch, channels, size, size)
    problem("cuda", shape, 32, dtype, format, "silu", residual).check()
    assert all(kernel.n_spills == 0 for kernel in launch._compiled.values())


@pytest.mark.parametrize("width", [1, 4])
def test_weights(width):
    shapes = shipped.weights(width)
    for format in ("oihw", "channels_last"):
        Weights(
            "cuda", shapes, out_dtype=torch.bfloat16, format=format, out_format="channels_last"
        ).check()
    for shape in shapes:
        Weights("cuda", [shape], out_dtype=torch.float16, eps=1e-5, gain=True, scale=0.3).check()


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if x is not None)


def runs(batch=64):
    """Return callables that return tensors, for every way through the kernels."""
    for _, channels, size in MAPS:
        for format in FORMATS:
            shape = (batch if size < 100 else 4, channels, size, size)
            if channels * size * size * shape[0] < 1 << 27:
                case = problem("cuda", shape, 32, torch.bfloat16, format, "relu", True)
                yield lambda case=case: list(case.ours().values())
    for shapes in (shipped.weights(1), [(256, 256, 3, 3)]):
        case = Weights("cuda", shapes, out_dtype=torch.bfloat16, gain=True)
        yield lambda case=case: [t for layer in case.ours() for t in layer]


def test_repeats_are_equal():
    for run in runs():
        first = run()
        for _ in range(50):
            assert equal(run(), first)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", MAPS, ids=str)
def test_a_sample_alone(case, format):
    """Batch 1 uses other launches than a batch that fills the device."""
    _, channels, size = case
    x, dy = torch.randn(2, 40, channels, size, size, device="cuda").bfloat16() + 0.5
    x, dy = (t.contiguous(memory_format=FORMATS[format]) for t in (x, dy))
    weight, bias = torch.randn(2, channels, device="cuda")

    def results(n):
        forward = group_norm_act.group_norm_act_forward(x[n], None, 32, weight, bias, EPS, "relu")
        backward = group_norm_act.group_norm_act_backward(
            dy[n], None, x[n], 32, weight, bias, *forward[2:], "relu", True, True
        )
        return forward[1], *forward[2:], backward[0]

    together = results(slice(None))
    for n in (0, 17, 39):
        assert equal(results(slice(n, n + 1)), [t[n : n + 1] for t in together])


def test_cuda_graph():
    for run in runs(batch=8):
        expected = run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        for _ in range(2):
            for output in outputs:
                if output is not None:
                    output.fill_(float("nan"))
            graph.replay()
            assert equal(outputs, expected)


def test_nothing_synchronizes():
    everything = list(runs(batch=8))
    for run in everything:
        run()  # compiles, and makes the tables
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for run in everything:
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams():
    """Kernels run on the current stream, after earlier work."""
    x = torch.randn(64, 256, 56, 56, device="cuda")
    expected = group_norm_act.group_norm_act_forward(x, None, 32, None, None, EPS, "relu")[1]
    stream, late = torch.cuda.Stream(), torch.zeros_like(x)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        y = group_norm_act.group_norm_act_forward(late, None, 32, None, None, EPS, "relu")[1]
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device():
    """Kernels run on the device of the tensors, whatever the current device."""
    for make in (
        lambda device: problem(device, (8, 64, 28, 28), 32, torch.bfloat16, "channels_last"),
        lambda device: Weights(device, [(64, 64, 3, 3), (256, 64, 1, 1)]),
    ):
        with torch.cuda.device(0):
            make("cuda:1").check()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1400, 512, 56, 56), (1, 64, 6000, 6000)], ids=str)
def test_more_than_2_to_31_elements(shape, format):
    """Compares with the same on a part: the last sample, or the last group of channels."""
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=FORMATS[format])
    assert x.numel() > 2**31
    x.normal_(mean=1.0)
    weight, bias = torch.randn(2, shape[1], device="cuda")
    stats = group_norm_act.group_norm_act_forward(x, None, 32, weight, bias, EPS, "relu")[1:]
    groups, channels = (32, shape[1]) if shape[0] > 1 else (1, shape[1] // 32)
    part = x[-1:, -channels:].contiguous(memory_format=FORMATS[format])
    weight_, bias_ = weight[-channels:].contiguous(), bias[-channels:].contiguous()
    expected = group_norm_act.group_norm_act_forward(
        part, None, groups, weight_, bias_, EPS, "relu"
    )[1:]
    torch.testing.assert_close(stats[0][-1:, -channels:], expected[0])
    for got, want in zip(stats[1:], expected[1:], strict=True):
        torch.testing.assert_close(got[-1:, -groups:], want, rtol=1e-5, atol=1e-5)
    dx = group_norm_act.group_norm_act_backward(
        x, None, x, 32, weight, bias, *stats[1:], "relu", True, False
    )[0]
    expected = group_norm_act.group_norm_act_backward(
        part, None, part, groups, weight_, bias_, *expected[1:], "relu", True, False
    )[0]
    torch.testing.assert_close(dx[-1:, -channels:], expected)


@pytest.mark.parametrize("size", [7, 56, 120])
def test_memory(size):
    """Statistics and partial sums take at most a hundredth of the tensor beside the outputs."""
    case = problem("cuda", (32, 256, size, size), 32, torch.bfloat16, "channels_last")
    case.ours()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.ours()
    big = case.x.numel() * case.x.element_size()
    extra = torch.cuda.max_memory_allocated() - before - 3 * big  # y, the same recomputed, and dx
    assert extra <= max(0.1 * big, 1 << 20)


SANITIZED = """
import torch
from tests.backends.triton.test_group_norm_act import Problem, problem
from tests.backends.triton.test_weight_standardize import Problem as Weights
for format in ("nchw", "channels_last"):
    for shape in ((2, 64, 7, 7), (1, 64, 57, 57), (1, 24, 130, 130)):
        problem("cuda", shape, 8, torch.bfloat16, format, "relu", True).ours()
    Weights("cuda", [(8, 16, 3, 3), (3, 3, 7, 7), (2, 1024, 3, 3)], gain=True).ours()
    Weights("cuda", [(8, 16, 3, 3)]).ours()
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    options = "--tool", tool, "--error-exitcode", "1"
    process.run("compute-sanitizer", *options, sys.executable, "-c", SANITIZED)
