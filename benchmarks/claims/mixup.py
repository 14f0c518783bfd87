"""MixUp: by the number of examples."""

from benchmarks.claims.claim import Claim, Comparison
from benchmarks.claims.training import BATCH, render, top1, unseen_letters, upstream

STEPS = 120
SIZES = SMALL, LARGE = 500, BATCH * STEPS
ALPHAS = {"without": 0.0, "MixUp": 0.1}


def run(seed, letters, alpha, steps):
    data = render(letters, seed)
    net = upstream("WS + GroupNorm", data, steps, seed, mixup_alpha=alpha)
    return {"top1": top1(net, unseen_letters(seed))}


def _gain(letters, sign=1):
    return (sign, ("MixUp", str(letters))), (-sign, ("without", str(letters)))


CLAIM = Claim(
    name="mixup",
    title="MixUp",
    hypothesis="MixUp gains more with many examples than with few.",
    setting=(
        f"WS + GroupNorm, letters from random weights, {STEPS} steps of {BATCH}: as many examples "
        f"out of {SMALL} distinct letters or of {LARGE}, with the HyperRule's alpha of 0.1 or "
        "without."
    ),
    metric="top-1, letters in unseen fonts",
    across="distinct letters",
    seeds=28,
    seconds=40,
    run=run,
    amounts={"steps": STEPS},
    quick={"steps": 2},
    conditions={
        f"{name}, {letters}": {"alpha": alpha, "letters": letters}
        for letters in SIZES
        for name, alpha in ALPHAS.items()
    },
    cells={
        (name, str(letters)): (f"{name}, {letters}", "top1") for name in ALPHAS for letters in SIZES
    },
    comparisons=(
        Comparison(
            f"gain by MixUp, at {LARGE} less at {SMALL}", _gain(LARGE) + _gain(SMALL, -1), 0.02
        ),
        Comparison(f"gain by MixUp, at {LARGE}", _gain(LARGE), 0.02),
        Comparison(f"gain by MixUp, at {SMALL}", _gain(SMALL), 0.02),
    ),
)
