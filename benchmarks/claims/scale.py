"""Scale: the size of the network against that of the upstream set."""

from benchmarks.claims.claim import Claim, Comparison
from benchmarks.claims.training import (
    BATCH,
    digits,
    downstream,
    render,
    top1,
    unseen_letters,
    upstream,
)
from bitkern.transfer import few_shot

NETWORK = "WS + GroupNorm"
STEPS, SHOTS = 100, 10
SIZES = SMALL, LARGE = 500, BATCH * STEPS  # of the largest every image is seen once
WIDTHS = 0.5, 1
MEASURED = {
    "letters": "letters in unseen fonts",
    "few": f"{SHOTS} digits of each class",
    "all": "all digits",
}


def run(seed, letters, width, steps, few_steps, all_steps):
    data = render(letters, seed)
    body = upstream(NETWORK, data, steps, seed, width=width)
    every = digits("train")
    few = few_shot(every, SHOTS, seed)
    return {
        "letters": top1(body, unseen_letters(seed)),
        "few": downstream(NETWORK, body, few, few_steps, seed, width=width),
        "all": downstream(NETWORK, body, every, all_steps, seed, width=width),
    }


def _wider(measured, letters, sign=1):
    """What the wider network gains over the other."""
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
        f"{SHOTS} digits of each class, and to all 899."
    ),
    metric="top-1",
    across="distinct letters upstream",
    seeds=3,
    seconds=270,
    run=run,
    amounts={"steps": STEPS, "few_steps": 30, "all_steps": 40},
    quick={"steps": 2, "few_steps": 1, "all_steps": 1},
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
        for name in (MEASURED["few"], MEASURED["all"], MEASURED["letters"])
        for what, terms, smallest in (
            (
                f"x1 less x0.5, at {LARGE} less at {SMALL}: {{}}",
                _wider(name, LARGE) + _wider(name, SMALL, -1),
                0.02,
            ),
            (f"x1 less x0.5, at {LARGE}: {{}}", _wider(name, LARGE), 0.02),
            (f"x0.5 less x1, at {SMALL}: {{}}", _wider(name, SMALL, -1), 0.02),
        )
    )
    + tuple(
        Comparison(
            f"{LARGE} less {SMALL} letters, x{width}: {MEASURED['few']}",
            tuple(
                (f, (f"x{width}, {MEASURED['few']}", str(n))) for f, n in ((1, LARGE), (-1, SMALL))
            ),
            0.02,
        )
        for width in WIDTHS
    ),
)
