"""The operators against eager PyTorch, AMP and torch.compile, and against a copy.

``pytest benchmarks/bench_ops.py`` prints the table, ``--full`` takes the rest of the cases as well,
``--out FILE`` writes the rows as JSON. On a GPU the floor is the time in which a copy reads and
writes as many bytes as the operator must, each big tensor once; on the CPU such a copy takes turns
with the contenders.
"""

from itertools import product

import pytest

from benchmarks import measure
from benchmarks.measure import DEVICE
from benchmarks.operators import Case, Problem

SECONDS = {"cuda": 0.5, "cpu": 4}

R50X1 = [(128, 256, 56, 56), (128, 512, 28, 28), (128, 1024, 14, 14), (128, 2048, 7, 7)]
R50X1 += [(128, 64, 56, 56), (128, 128, 28, 28), (128, 256, 14, 14), (128, 512, 7, 7)]
R152X4 = [(8, 1024, 120, 120), (8, 2048, 60, 60), (8, 4096, 30, 30), (8, 8192, 15, 15)]
SINGLE = [(1, 256, 56, 56), (1, 2048, 7, 7), (1, 1024, 120, 120)]
# Eager peers first, which is quick.
GPU = [Case("group_norm_act", shape) for shape in R50X1 + R152X4 + SINGLE]
GPU += [Case("group_norm_act", shape, backward=False) for shape in (R50X1[0], R152X4[0])]
GPU += [Case("group_norm_act", R50X1[0], "fp32"), Case("group_norm_act", R50X1[0], "bf16", "nchw")]
GPU += [Case("add_group_norm_act", shape) for shape in R50X1[:4] + R152X4[:2] + SINGLE[:1]]
GPU += [Case("group_norm_add_relu", shape) for shape in R50X1[:4]]
GPU += [
    Case("weight_standardize", model, backward=backward)
    for model in ("R50x1", "R152x4")
    for backward in (False, True)
]
GPU_COMPILED = [
    Case("group_norm_act", R50X1[0]),
    Case("add_group_norm_act", R50X1[0]),
    Case("group_norm_act", R152X4[0]),
    Case("group_norm_act", SINGLE[0]),
    *(Case("group_norm_act", shape) for shape in R50X1[1:4] + R152X4[1:]),
    *(Case("add_group_norm_act", shape) for shape in R50X1[1:4] + R152X4[:2]),
    Case("weight_standardize", "R50x1"),
]
GPU_MODES = ("default", "max-autotune-no-cudagraphs")

# Stages 1 and 3 of R50x1 at 224 pixels, stage 3 of R152x4 at 480.
SHAPES = [(8, 256, 56, 56), (8, 512, 14, 14), (1, 1024, 30, 30)]
# Norms of a diffusion model's U-Net, modulated by the time step.
MODULATED = [(4, 256, 32, 32), (2, 512, 64, 64)]
CPU = [
    Case("group_norm_act", SHAPES[0], "fp32", "channels_last", modes=("default",)),
    Case("group_norm_act", SHAPES[0], "bf16", "channels_last", modes=("default",)),
    Case("group_norm_act", SHAPES[0], "bf16", "nchw"),
    Case("group_norm_act", SHAPES[0], "fp32", "nchw", backward=False),
    Case("group_norm_act", SHAPES[1], "fp32", "channels_last"),
    Case("group_norm_act", SHAPES[2], "bf16", "channels_last", backward=False),
    Case("add_group_norm_act", SHAPES[0], "fp32", "channels_last", modes=("default",)),
    Case("add_group_norm_act", SHAPES[0], "bf16", "nchw"),
    Case("group_norm_add_relu", SHAPES[0], "fp32"),
    Case("group_norm_add_relu", SHAPES[0], "bf16"),
    Case("weight_standardize", "R50x1", "bf16", backward=False, modes=("default",)),
    Case("weight_standardize", "R50x1", "fp32"),
]
CPU += [
    Case("modulated_group_norm_act", shape, dtype)
    for shape, dtype in product(MODULATED, ("fp32", "bf16"))
]
CPU_ALL = [
    Case("group_norm_act", shape, dtype, layout, backward)
    for shape, layout, dtype, backward in product(
        SHAPES, ("channels_last", "nchw"), ("fp32", "bf16"), (False, True)
    )
]
CPU_ALL += [
    Case(operator, SHAPES[0], dtype, layout)
    for operator in ("add_group_norm_act", "group_norm_add_relu")
    for layout, dtype in product(("channels_last", "nchw"), ("fp32", "bf16"))
]
CPU_ALL += [
    Case("weight_standardize", "R50x1", dtype, backward=backward)
    for dtype, backward in product(("fp32", "bf16"), (False, True))
]

if DEVICE == "cuda":
    compiled = [case._replace(modes=GPU_MODES) for case in GPU_COMPILED]
    CASES, FULL = GPU + compiled[:2], compiled[2:]
else:
    compiled = [case._replace(modes=("default",)) for case in CPU_ALL]
    CASES, FULL = CPU, [case for case in compiled if case not in CPU]
TINY = [
    Case("group_norm_act", (2, 32, 5, 5), "bf16", "channels_last", False, ("default",)),
    Case("group_norm_act", (3, 64, 3, 5), "fp32", "nchw"),
    Case("add_group_norm_act", (2, 96, 5, 3), "bf16"),
    Case("group_norm_add_relu", (2, 96, 5, 3), "bf16"),
    Case("modulated_group_norm_act", (2, 32, 5, 3), "bf16"),
    Case("weight_standardize", "R26x0.5", "bf16"),
]
pytestmark = pytest.mark.benchmark(timer=measure.clock(DEVICE))


def test_operator(case, bench):
    problem = Problem(case, DEVICE)
    contenders = problem.contenders
    if DEVICE == "cpu":
        contenders["copy"] = problem.copy

    def floor(timings):
        # Also on the CPU where the time was used up before the copy's turn.
        alone = problem.floor_bytes / measure.copy_bandwidth(DEVICE)
        return timings.seconds.pop("copy", alone)

    bench(
        case,
        gate=problem.gate,
        contenders=contenders,
        floor=floor,
        together=True,
        seconds=SECONDS[DEVICE],
        calls=problem.calls,
    )
