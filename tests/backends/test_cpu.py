"""The CPU kernels give the same bits on any number of threads and in any process."""

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import bitkern
from bitkern import backends
from bitkern.backends import cpu
from bitkern.testing import affine, maps
from tests.backends import standardization
from tests.process import python

pytestmark = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason=str(backends.unavailable("cpu"))
)
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Enough work for several threads; 3 and 5 samples do not divide over them.
SHAPES = [(3, 96, 41, 41), (1, 64, 61, 59), (5, 33, 35, 33)]


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def group_norm(shape, format, dtype=torch.float32):
    """Return outputs and gradients."""
    x, residual, dy, dtotal = (
        maps(shape, seed=seed).to(dtype, memory_format=FORMATS[format]) for seed in range(4)
    )
    inputs = [t.requires_grad_() for t in (x, residual, *affine(shape[1]))]
    groups = 3 if shape[1] % 2 else 8
    with bitkern.use_backend("cpu"):
        outs = bitkern.ops.add_group_norm_act(*inputs[:2], groups, *inputs[2:])
    return *outs, *torch.autograd.grad(outs, inputs, (dtotal, dy))


def group_norm_add_relu(shape, format):
    x, residual, dy = (
        maps(shape, torch.bfloat16, seed).to(memory_format=FORMATS[format]) for seed in range(3)
    )
    inputs = [t.requires_grad_() for t in (x, residual, *affine(shape[1]))]
    groups = 3 if shape[1] % 2 else 8
    with bitkern.use_backend("cpu"):
        y = bitkern.ops.group_norm_add_relu(*inputs[:2], groups, *inputs[2:])
    return y, *torch.autograd.grad(y, inputs, dy)


def weight_standardize(channels_last):
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((96, 65, 3, 3), (300, 257, 1, 1), (64, 3, 7, 7))
    ]
    with bitkern.use_backend("cpu"):
        outs = bitkern.ops.weight_standardize_all(weights, channels_last=channels_last)
    return *outs, *torch.autograd.grad(outs, weights, [o.detach() + 1 for o in outs])


def everything():
    norms = [group_norm(shape, format) for shape in SHAPES for format in FORMATS]
    norms.append(group_norm(SHAPES[0], "channels_last", torch.bfloat16))
    norms += [group_norm_add_relu(shape, format) for shape in SHAPES for format in FORMATS]
    weights = [weight_standardize(channels_last) for channels_last in (False, True)]
    return [t.detach() for results in norms + weights for t in results]


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_any_number_of_threads():
    torch.set_num_threads(1)
    expected = everything()
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert_equal(everything(), expected)


@pytest.mark.parametrize("variant", standardization.VARIANTS)
@pytest.mark.parametrize("options", standardization.SGD)
def test_a_step_of_sgd(variant, options):
    """Covers one thread or several, unaligned and single elements, other layouts of gradients."""
    how = standardization.VARIANTS[variant] | {"gain": False}
    shapes = [(70, 65, 3, 3), (3, 520, 3, 3), (5, 3, 7, 7), (40, 64, 1, 1), (4, 1, 1, 1)]
    shapes = shapes[: -1 if variant == "original" else None]
    for format in ("oihw", "channels_last"):
        stepped = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            args = cpu, "cpu", shapes
            case = standardization.Problem(*args, format=format, dout_format="channels_last", **how)
            weights, buffers = case.check_sgd(standardization.SGD[options])
            stepped.append(weights + buffers)
        assert_equal(*stepped)


def test_called_by_several_threads_at_once():
    torch.set_num_threads(2)
    expected = everything()
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: everything(), range(8)):
            assert_equal(got, expected)


def test_after_fork():
    """In a data-loader worker, OpenMP's threads did not survive the fork: do not wait for them.

    Only the kernels run in the child, for PyTorch's own operators do wait there.
    """
    torch.set_num_threads(2)
    x, dy = (maps(SHAPES[0], seed=seed) for seed in range(2))
    weight, bias = affine(x.shape[1])

    def run():
        _, y, mean, rstd = cpu.group_norm_act_forward(x, None, 8, weight, bias, 1e-5, "relu")
        args = 8, weight, bias, mean, rstd, "relu"
        return y, *cpu.group_norm_act_backward(dy, None, x, *args, True, True)

    expected = run()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put([t.numpy().tobytes() for t in run()]))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while queue.empty() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not queue.empty(), "the child did not end"
        assert queue.get() == [t.numpy().tobytes() for t in expected]
    finally:
        process.kill()
        process.join()


SUPPORTED = {
    "baseline": True,
    "avx2": torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"),
    "avx512": torch.backends.cpu.get_cpu_capability() == "AVX512",
    "avx512bf16": "avx512_bf16" in Path("/proc/cpuinfo").read_text(),
}


@pytest.mark.sweep
@pytest.mark.parametrize("isa", SUPPORTED)
def test_every_instruction_set(isa):
    if not SUPPORTED[isa]:
        pytest.skip(f"this processor has no {isa}")
    from bitkern import _C

    code = "from bitkern import _C; print(_C.cpu.isa())"
    assert python("-c", code, BITKERN_CPU_ISA=isa).stdout.strip() == isa
    if isa == _C.cpu.isa():
        return  # the suite itself runs on it
    names = "group_norm_act", "activations", "group_norm_add_relu", "weight_standardize"
    tests = [f"tests/ops/test_{name}.py" for name in names]
    options = ["-q", "-p", "no:cacheprovider", "-k", "cpu and not compile and not opcheck"]
    assert " passed" in python("-m", "pytest", *tests, *options, BITKERN_CPU_ISA=isa).stdout


def test_unknown_instruction_set():
    done = python(
        "-c", "from bitkern import _C; print(_C.cpu.isa())", code=1, BITKERN_CPU_ISA="sse9"
    )
    assert "BITKERN_CPU_ISA: expected one of" in done.stderr and "'sse9'" in done.stderr
