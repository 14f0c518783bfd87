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
        Case("infer", "R50x1", 128, 4, "fp32", ("default", "freezing")),
    ]
    PUBLISHED = [
        Case(kind, "R50x1", 224, 4, dtype, ("default", *["freezing"] * (kind == "infer")))
        for kind, dtype in product(KINDS, ("bf16", "fp32"))
    ]
    CASES, FULL = CASES + PUBLISHED[:1], PUBLISHED[1:]
TINY = [Case("train_step", "R26x0.5", 32, 2), Case("infer", "R26x0.5", 32, 1, "fp32")]
LONGEST = 2.0  # seconds of a training step at 224, for which the selection has time
pytestmark = pytest.mark.benchmark(timer=measure.clock(DEVICE))


def test_model(case, bench, request):
    train = case.kind == "train_step"
    if DEVICE == "cpu" and case.pixels == 224 and not request.config.getoption("full"):
        seconds = networks.seconds_of_ours(case, DEVICE)
        if seconds > LONGEST:
            pytest.skip(f"a step takes {seconds:.1f} s here, more than {LONGEST:.0f} s: see --full")

    def floor(timings):
        work = networks.flops(case.model, case.pixels, train) * case.batch
        return work / measure.matrix_rate(DEVICE, case.dtype)

    bench(
        case,
        gate=lambda: networks.gate(
            case.model, case.kind, case.dtype, DEVICE, "freezing" in case.modes
        ),
        contenders=networks.prepared(case, DEVICE),
        floor=floor,
        together=DEVICE == "cpu",
        # Per contender where each runs alone, for all of them where they take turns.
        seconds=1.5 if DEVICE == "cuda" else 12,
    )
