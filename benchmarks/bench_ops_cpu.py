"""The operators on the CPU against eager PyTorch and torch.compile: ratios, fraction of a copy.

``pytest benchmarks/bench_ops_cpu.py`` prints the table; ``--out FILE`` writes it as JSON.
"""

from itertools import product

from benchmarks.operators import Case, Problem

DEVICE = "cpu"
COMPILE = ("default",)
# Stages 1 and 3 of R50x1 at 224 pixels, stage 3 of R152x4 at 480.
SHAPES = [(8, 256, 56, 56), (8, 512, 14, 14), (1, 1024, 30, 30)]
NORMS = [
    Case("group_norm_act", shape, dtype, layout, backward, COMPILE)
    for shape, layout, dtype, backward in product(
        SHAPES, ("channels_last", "nchw"), ("fp32", "bf16"), (False, True)
    )
]
SUMS = [
    Case("add_group_norm_act", SHAPES[0], dtype, layout, True, COMPILE)
    for layout, dtype in product(("channels_last", "nchw"), ("fp32", "bf16"))
]
WEIGHTS = [
    Case("weight_standardize", "R50x1", dtype, "channels_last", backward, COMPILE)
    for dtype, backward in product(("fp32", "bf16"), (False, True))
]
CASES = NORMS + SUMS + WEIGHTS
TINY = [
    Case("group_norm_act", (2, 32, 5, 5), "bf16", "channels_last", False, COMPILE),
    Case("group_norm_act", (3, 64, 3, 5), "fp32", "nchw"),
    Case("add_group_norm_act", (2, 96, 5, 3), "bf16"),
    Case("weight_standardize", "R26x0.5", "bf16"),
]


def test_operator(case, bench):
    problem = Problem(case, DEVICE)
    bench(
        "op",
        case,
        DEVICE,
        gate=problem.gate,
        # The floor is a copy of as many bytes as the operator has to move, in turn with it.
        contenders=problem.contenders | {"copy": problem.copy},
        floor=lambda timings: timings.seconds.pop("copy"),
        together=True,
        seconds=5,
    )
