"""The operators on a GPU against eager PyTorch, AMP and torch.compile, and against a copy.

The floor is the time that a copy takes to read and write as many bytes as the operator must: each
big tensor once. ``pytest benchmarks/bench_ops.py --out FILE``.
"""

import pytest
import torch

from benchmarks import measure
from benchmarks.operators import Case, Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILE = ("default", "max-autotune-no-cudagraphs")
R50X1 = [(128, 256, 56, 56), (128, 512, 28, 28), (128, 1024, 14, 14), (128, 2048, 7, 7)]
R50X1 += [(128, 64, 56, 56), (128, 128, 28, 28), (128, 256, 14, 14), (128, 512, 7, 7)]
R152X4 = [(8, 1024, 120, 120), (8, 2048, 60, 60), (8, 4096, 30, 30), (8, 8192, 15, 15)]
SINGLE = [(1, 256, 56, 56), (1, 2048, 7, 7), (1, 1024, 120, 120)]

# Eager peers first, which is quick; then, while the time lasts, with those that compile.
EAGER = [Case("group_norm_act", shape) for shape in R50X1 + R152X4 + SINGLE]
EAGER += [Case("group_norm_act", shape, backward=False) for shape in (R50X1[0], R152X4[0])]
EAGER += [
    Case("group_norm_act", R50X1[0], "fp32"),
    Case("group_norm_act", R50X1[0], "bf16", "nchw"),
]
EAGER += [Case("add_group_norm_act", shape) for shape in R50X1[:4] + R152X4[:2] + SINGLE[:1]]
EAGER += [
    Case("weight_standardize", model, backward=backward)
    for model in ("R50x1", "R152x4")
    for backward in (False, True)
]
COMPILED = [
    Case("group_norm_act", R50X1[0]),
    Case("add_group_norm_act", R50X1[0]),
    Case("group_norm_act", R152X4[0]),
    Case("group_norm_act", SINGLE[0]),
    *(Case("group_norm_act", shape) for shape in R50X1[1:4] + R152X4[1:]),
    *(Case("add_group_norm_act", shape) for shape in R50X1[1:4] + R152X4[:2]),
    Case("weight_standardize", "R50x1"),
]
CASES = EAGER + [case._replace(modes=COMPILE) for case in COMPILED]
TINY = [
    Case("group_norm_act", (2, 64, 5, 3)),
    Case("add_group_norm_act", (1, 32, 4, 4), "fp32"),
    Case("weight_standardize", "R26x0.5"),
]
pytestmark = pytest.mark.benchmark(timer=measure.clock(DEVICE))


def test_operator(case, bench, request):
    if DEVICE == "cpu" and not request.config.option.tiny:
        pytest.skip("needs a GPU; bench_ops_cpu.py is for the CPU, --tiny a dry run")
    problem = Problem(case, DEVICE)
    bench(
        "op",
        case,
        DEVICE,
        gate=problem.gate,
        contenders=problem.contenders,
        floor=lambda timings: problem.floor_bytes / measure.copy_bandwidth(DEVICE),
        together=True,
        seconds=0.5,
        calls=problem.calls,
    )
