"""Transfer: what becomes of BatchNorm's statistics where there are few examples."""

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
    few = few_shot(digits("train"), shots, seed)
    numbers = {"letters": top1(body, unseen_letters(seed))}
    for way, (name, images) in WAYS[network].items():
        numbers[way] = downstream(name, body, few, steps, seed, images)
    return numbers


_OURS = 1, ("WS + GroupNorm", f"digits, {BATCH} images")

CLAIM = Claim(
    name="transfer",
    title="Transfer of the norms",
    hypothesis=(
        "From few examples WS + GroupNorm transfers better than BatchNorm with frozen statistics."
    ),
    setting=(
        f"Letters upstream, batches of {BATCH}; then 5 digits of each class, batches of {BATCH} in "
        "micro-batches of as many images as a device holds. BatchNorm's statistics are frozen, or "
        "come from the micro-batches. Neither frozen statistics nor GroupNorm depend on them."
    ),
    metric="top-1",
    across="what is measured; statistics downstream",
    seeds=5,
    seconds=100,
    run=run,
    amounts={"letters": 5920, "upstream_steps": 120, "shots": 5, "steps": 60},
    quick={"letters": 148, "upstream_steps": 2, "shots": 1, "steps": 2},
    conditions={network: {"network": network} for network in WAYS},
    cells={(network, "letters"): (network, "letters") for network in WAYS}
    | {
        (network, f"digits, {way}"): (network, way)
        for network, ways in WAYS.items()
        for way in ways
    },
    comparisons=tuple(
        Comparison(
            f"WS + GroupNorm less BatchNorm, {way}",
            (_OURS, (-1, ("BatchNorm", f"digits, {way}"))),
            0.02,
        )
        for way in WAYS["BatchNorm"]
    ),
)
