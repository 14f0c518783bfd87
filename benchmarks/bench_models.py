"""Training steps and inference of whole models, ours against timm's BiT and its BatchNorm twin.

The floor is the arithmetic of the convolutions at the device's measured matrix rate. On a GPU each
contender has the memory to itself and its peak is recorded. ``pytest benchmarks/bench_models.py``.
"""

import pytest
import torch

from benchmarks import measure, networks
from benchmarks.networks import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILE = ("default", "max-autotune")
GPU = [
    Case("train_step", "R50x1", 224, 128),
    Case("train_step", "R50x1", 448, 32),
    Case("train_step", "R152x4", 480, 8),
    Case("train_step", "R50x3", 480, 16),
    Case("train_step", "R101x1", 224, 128),
    Case("infer", "R50x1", 224, 128),
    Case("infer", "R50x1", 224, 1),
    Case("infer", "R152x4", 480, 8),
    # Again with the peers that compile, which takes minutes.
    Case("train_step", "R50x1", 224, 128, modes=COMPILE),
    Case("infer", "R50x1", 224, 128, modes=COMPILE),
]
CPU = [
    Case(kind, "R50x1", 224, 4, dtype, ("default",))
    for kind in ("train_step", "infer")
    for dtype in ("fp32", "bf16")
]
CASES = GPU if DEVICE == "cuda" else CPU
TINY = [Case("train_step", "R26x0.5", 32, 2), Case("infer", "R26x0.5", 32, 1, "fp32")]
pytestmark = pytest.mark.benchmark(timer=measure.clock(DEVICE))


def test_model(case, bench):
    train = case.kind == "train_step"

    def floor(timings):
        work = networks.flops(case.model, case.pixels, train) * case.batch
        return work / measure.matrix_rate(DEVICE, case.dtype)

    bench(
        case.kind,
        case,
        DEVICE,
        gate=lambda: networks.gate(case.model, case.kind, case.dtype, DEVICE),
        contenders=networks.prepared(case, DEVICE),
        floor=floor,
        together=DEVICE == "cpu",
        # Per contender where each runs alone, for all of them where they take turns.
        seconds=1.5 if DEVICE == "cuda" else 20,
    )
