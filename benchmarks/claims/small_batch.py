"""Small batches: what the norms do when a device holds few images."""

from benchmarks.claims.claim import Claim, Comparison
from benchmarks.claims.training import BATCH, render, top1, unseen_letters, upstream

NETWORKS = "BatchNorm", "GroupNorm", "WS + GroupNorm"
IMAGES = 1, 2, 4, 16, 64


def run(seed, network, images, letters, steps):
    data = render(letters, seed)
    net = upstream(network, data, steps, seed, images)
    return {"top1": top1(net, unseen_letters(seed))}


def _less(row, images, other, others):
    return (1, (row, str(images))), (-1, (other, str(others)))


CLAIM = Claim(
    name="small_batch",
    title="Small batches",
    hypothesis="With 2 images a device WS + GroupNorm learns better than BatchNorm.",
    setting=(
        f"37 letters, batches of {BATCH} in micro-batches of as many images as a device holds: the "
        "optimizer, the learning rate, the steps and the examples stay the same. The running "
        "statistics of BatchNorm come from the micro-batches. The last stage has a single pixel an "
        "image. The learning rate is each network's best of 0.03, 0.1 and 0.3 at 64 images on seed "
        "100: 0.1 for BatchNorm, 0.03 for the others. At 2 images BatchNorm had 0.04 there, at 0.1 "
        "and at 0.03. Guessing gives 0.03."
    ),
    metric="top-1, letters in unseen fonts",
    across="images a device",
    seeds=8,
    seconds=170,
    run=run,
    amounts={"letters": 5920, "steps": 80},
    quick={"letters": 148, "steps": 2},
    conditions={
        f"{network}, {n}": {"network": network, "images": n} for network in NETWORKS for n in IMAGES
    },
    cells={(network, str(n)): (f"{network}, {n}", "top1") for network in NETWORKS for n in IMAGES},
    comparisons=(
        Comparison(
            "WS + GroupNorm minus BatchNorm, 2 images a device",
            _less("WS + GroupNorm", 2, "BatchNorm", 2),
            0.05,
        ),
        Comparison(
            "WS + GroupNorm minus BatchNorm, 64 images a device",
            _less("WS + GroupNorm", 64, "BatchNorm", 64),
            0.05,
            no_loss=True,
        ),
        Comparison(
            "BatchNorm, 64 minus 2 images a device", _less("BatchNorm", 64, "BatchNorm", 2), 0.05
        ),
        Comparison(
            "WS + GroupNorm, 2 minus 64 images a device",
            _less("WS + GroupNorm", 2, "WS + GroupNorm", 64),
            0.05,
            no_loss=True,
        ),
        Comparison(
            "WS + GroupNorm minus GroupNorm, 64 images a device",
            _less("WS + GroupNorm", 64, "GroupNorm", 64),
            0.02,
        ),
    ),
)
