"""Every Triton kernel alone: ``python -m benchmarks.kernels OUT.jsonl``, line by line.

A launch is repeated in a CUDA graph, on the same tensors: L2 holds the small ones. Given are
microseconds, GB/s, the fractions of the floor (each tensor touched once at copy rate) and of the
prediction of ``cost.py``, registers and spills. ``--tiny`` walks through it without a GPU.
``--stages``, ``--maxnreg``, ``--tile`` and ``--resident`` try other constants than those shipped.
"""

import argparse
import json
import os
import statistics
import time
from itertools import zip_longest

import torch

from benchmarks import cost

SHAPES = [  # samples, channels, height
    (128, 64, 56), (128, 256, 56), (128, 128, 28), (128, 512, 28), (128, 256, 14), (128, 1024, 14),
    (128, 2048, 7), (32, 256, 112), (16, 256, 120), (16, 1024, 120), (32, 512, 60), (1, 256, 56),
    (1, 512, 28), (1, 2048, 7),
]  # fmt: skip
FEW = [(128, 256, 56), (128, 512, 28), (128, 1024, 14), (16, 1024, 120)]  # for other constants
SHIPPED = {"stages": 3, "maxnreg": 128, "tile": 16, "resident": 88}
REPEATS = 20


def options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out")
    parser.add_argument("--tiny", action="store_true")
    for name, default in SHIPPED.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def configured(asked):
    """Our modules, with the constants asked for, which they read when they are imported."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl

    from bitkern.backends.triton import config
    from bitkern.backends.triton.kernels import tiles

    tiles.STAGES = tl.constexpr(asked.stages)
    config.TILE_BYTES, config.RESIDENT_BYTES = asked.tile << 10, asked.resident << 10
    from bitkern.backends.triton import group_norm_act, launch, weight_standardize

    shipped = launch.options
    launch.options = lambda warps: shipped(warps) | {"maxnreg": asked.maxnreg or None}
    return group_norm_act, weight_standardize, launch


def seconds(run, device):
    """Seconds of one call: the median of ten graphs of REPEATS calls."""
    if device == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    run()
    graph, times = torch.cuda.CUDAGraph(), []
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(11):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / REPEATS)
    return statistics.median(times[1:])


def copy_rate(device, tiny):
    x = torch.empty(1 << (16 if tiny else 29), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds(lambda: y.copy_(x), device)


def record(module, call):
    """The launches of a call, each with all of its arguments; and what it returned, which the
    launches go on writing to."""
    launched, real = [], module.launch
    module.launch = lambda *arguments: (launched.append(arguments), real(*arguments))
    returned = call()
    module.launch = real
    return launched, returned


def check(ours, exact, z=None):
    """The correctness gate, before a time is taken.

    z: what ReLU was given, where it decides over a gradient. Near 0 its sign is up to rounding.
    """
    error = (ours.float() - exact).abs()
    if z is not None:
        error = torch.where(z.abs() < 1e-3, 0.0, error)
    error = error.max().item()
    assert error <= 0.02 * exact.abs().max().item() + 1e-3, f"wrong by {error}"


def group_norms(module, shape, device):
    """(call, launches) of each operator, checked."""
    samples, channels, height = shape
    x = torch.randn(samples, channels, height, height, device=device) * 2 + 1
    x = x.bfloat16().contiguous(memory_format=torch.channels_last)
    residual, dy = torch.randn_like(x), torch.randn_like(x)
    weight, bias = torch.randn(2, channels, device=device)
    args = 32, weight, bias
    _, y, mean, rstd = module.group_norm_act_forward(x, None, *args, 1e-5, "relu")
    leaf = x.float().requires_grad_()
    z = torch.group_norm(leaf, 32, weight, bias, 1e-5)
    z.relu().backward(dy.float())
    back = (*args, mean, rstd, "relu", True, True)
    dx = module.group_norm_act_backward(dy, None, x, *back)[0]
    check(y, z.detach().relu())
    check(dx, leaf.grad, z.detach())
    calls = {
        "forward": lambda: module.group_norm_act_forward(x, None, *args, 1e-5, "relu"),
        "forward, residual": lambda: module.group_norm_act_forward(
            x, residual, *args, 1e-5, "relu"
        ),
        "recompute": lambda: module.group_norm_act_recompute(x, *args, mean, rstd, "relu"),
        "backward": lambda: module.group_norm_act_backward(dy, None, x, *back),
        "backward, residual": lambda: module.group_norm_act_backward(dy, dy, x, *back),
    }
    for name, call in calls.items():
        yield name, record(module, call)


def standardizations(module, tiny, device):
    from bitkern.variant import Variant

    sizes = [(8, 64, 3), (32, 64, 1)] if tiny else [(512, 512, 3), (2048, 1024, 1)] * 8
    weights = [torch.randn(o, i, k, k, device=device) for o, i, k in sizes]
    args = None, [1.0] * len(weights)
    variant = Variant(1e-10, False, False)
    outs, stats = module.weight_standardize_forward(weights, *args, variant, torch.bfloat16, True)
    moved = sum(w.nbytes + out.nbytes for w, out in zip(weights, outs, strict=True))
    std, mean = torch.std_mean(weights[0].flatten(1), 1, correction=0)
    check(outs[0], (weights[0] - mean[:, None, None, None]) / std[:, None, None, None])
    yield "forward", moved, record(module, lambda: module.weight_standardize_forward(
        weights, *args, variant, torch.bfloat16, True))  # fmt: skip
    moved += sum(w.nbytes for w in weights)
    yield "backward", moved, record(module, lambda: module.weight_standardize_backward(
        outs, weights, *args, stats, variant))  # fmt: skip


def predictions(shape, name, rate):
    """Seconds of the first launches of an operator, in order: without sums over samples."""
    if name not in ("forward", "backward") or not torch.cuda.is_available():
        return []
    samples, channels, height = shape
    properties = torch.cuda.get_device_properties()
    device = cost.Device(properties.multi_processor_count, rate, properties.L2_cache_size)
    launches = cost.group_norm_act(
        samples, channels, height**2, device, backward=name == "backward"
    )
    return [cost.seconds(launch, cost.SHIPPED, device) for launch in launches]


def main():
    asked = options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    group_norm_act, weight_standardize, launch = configured(asked)
    rate = copy_rate(device, asked.tiny)
    with open(asked.out, "a") as file:

        def write(**fields):
            file.write(json.dumps(fields) + "\n")
            file.flush()
            print(fields, flush=True)

        def measure(launches, moved=None, predicted=(), **fields):
            for (kernel, programs, pointers, *rest), prediction in zip_longest(launches, predicted):
                tensors = {t.data_ptr(): t.nbytes for t in pointers if t is not None}
                touched = moved or sum(tensors.values())
                took = seconds(
                    lambda k=kernel, p=programs, t=pointers, r=rest: launch.launch(k, p, t, *r),
                    device,
                )
                compiled = [
                    c for key, c in launch._compiled.items() if key[1:3] == (kernel, rest[1])
                ]
                registers = [[c.n_regs, c.n_spills] for c in compiled]
                fields |= {"kernel": kernel.__name__, "programs": programs, "us": took * 1e6}
                fields |= {"GB/s": touched / took / 1e9, "floor": touched / rate / took}
                fields |= {"prediction": prediction and prediction / took}
                write(**fields, launches=len(launches), regs=registers)

        write(copy_TBps=rate / 1e12, torch=torch.__version__, **vars(asked))
        shapes = SHAPES if vars(asked).items() >= SHIPPED.items() else FEW
        for shape in [(2, 64, 7)] if asked.tiny else shapes:
            for name, (launches, _) in group_norms(group_norm_act, shape, device):
                measure(launches, None, predictions(shape, name, rate), shape=shape, call=name)
        for name, moved, recorded in standardizations(weight_standardize, asked.tiny, device):
            measure(recorded[0][-1:], moved, shape="weights", call=name)


if __name__ == "__main__":
    main()
