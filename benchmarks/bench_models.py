"""Training steps and inference of whole models, ours against timm's BiT and its BatchNorm twin.

The floor is the arithmetic of the convolutions at the device's measured matrix rate. On a GPU each
contender has the memory to itself and its peak is recorded. ``pytest benchmarks/bench_models.py``.
"""

from itertools import product

import pytest

from benchmarks import measure, networks
from benchmarks.measure import DEVICE
from benchmarks.networks import Case

KINDS = "train_step", "infer"
if DEVICE == "cuda":
    CASES = [
        Case("train_step", "R50x1", 224, 128),
        Case("train_step", "R50x1", 448, 32),
        Case("infer", "R50x1", 224, 128),
        Case("infer", "R50x1", 224, 1),
    ]
    # Again with the peers that compile, which takes minutes.
    CASES += [Case(kind, "R50x1", 224, 128, modes=("default", "max-autotune")) for kind in KINDS]
    FULL = [
        Case("train_step", "R152x4", 480, 8),
        Case("train_step", "R50x3", 480, 16),
        Case("train_step", "R101x1", 224, 128),
        Case("infer", "R152x4", 480, 8),
    ]
else:
    # As large as a processor with no instructions for bf16 does in the time.
    CASES = [
        Case("train_step", "R50x1", 128, 4, "fp32"),
        Case("train_step", "R50x1", 64, 2, "bf16"),
        Case("infer", "R50x1", 64, 2, "bf16"),
        Case("infer", "R50x1", 128, 4, "fp32", ("default",)),
    ]
    FULL = [
        Case(kind, "R50x1", 224, 4, dtype, ("default",))
        for kind, dtype in product(KINDS, ("fp32", "bf16"))
    ]
TINY = [Case("train_step", "R26x0.5", 32, 2), Case("infer", "R26x0.5", 32, 1, "fp32")]
pytestmark = pytest.mark.benchmark(timer=measure.clock(DEVICE))


def test_model(case, bench):
    train = case.kind == "train_step"

    def floor(timings):
        work = networks.flops(case.model, case.pixels, train) * case.batch
        return work / measure.matrix_rate(DEVICE, case.dtype)

    bench(
        case,
        gate=lambda: networks.gate(case.model, case.kind, case.dtype, DEVICE),
        contenders=networks.prepared(case, DEVICE),
        floor=floor,
        together=DEVICE == "cpu",
        # Per contender where each runs alone, for all of them where they take turns.
        seconds=1.5 if DEVICE == "cuda" else 12,
    )
