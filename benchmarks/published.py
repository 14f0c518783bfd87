"""The published transfers of BiT-M to CIFAR, from its released weights: ours beside theirs.

``python -m benchmarks.published --out DIR`` downloads the weights and CIFAR, and wants a GPU. Each
transfer is a run in DIR, which a later call continues or takes as it is. With ``--stand-in`` all of
it is done in a minute and without a network: digits for CIFAR, a tiny network of random weights for
BiT, five steps. What comes out of that means nothing.
"""

import argparse
import dataclasses
import json
from itertools import product, starmap
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from bitkern import create_model, transfer
from bitkern.models import save_npz
from bitkern.transfer.data import image_size

# Top-1 of google-research/big_transfer (bit_pytorch), medians, in per cent: 1 and 5 images a class,
# and all of them.
SHOTS = 1, 5, None
PUBLISHED = {
    ("R50x1", "CIFAR10"): (57.9, 82.3, 97.4),
    ("R50x1", "CIFAR100"): (35.2, 65.5, 86.6),
    ("R101x3", "CIFAR10"): (56.7, 85.8, 98.6),
    ("R101x3", "CIFAR100"): (33.8, 71.6, 91.2),
    ("R152x2", "CIFAR10"): (55.5, 85.8, 98.5),
    ("R152x2", "CIFAR100"): (36.8, 72.0, 91.3),
}


class Transfer(NamedTuple):
    """One run."""

    model: str
    data: str
    shots: int | None
    seed: int

    def __str__(self):
        return f"{self.model}-{self.data}-{self.shots or 'all'}-{self.seed}"


class Real:
    """Released weights, and CIFAR as torchvision has it."""

    def __init__(self, folder):
        self.folder = folder

    def data(self, name):
        from torchvision import datasets

        for train in (True, False):
            found = getattr(datasets, name)(self.folder / "data", train=train, download=True)
            labels = torch.tensor(found.targets).numpy()
            yield transfer.ImageSet(list(found.data), labels, tuple(found.classes))

    def model(self, name, num_classes):
        return create_model(f"BiT-M-{name}", num_classes, pretrained=True)

    def rule(self, data):
        return transfer.hyperrule(len(data.images), image_size(data))


class StandIn(Real):
    """A dry run of everything."""

    def data(self, name):
        yield from (transfer.digits("train"), transfer.digits("test"))

    def model(self, name, num_classes):
        path = self.folder / "R26x0.5.npz"
        if not path.exists():
            torch.manual_seed(0)
            save_npz(create_model("R26x0.5", 21_843), path)
        return create_model("R26x0.5", num_classes, weights=path)

    def rule(self, data):
        rule = super().rule(data).with_steps(5)
        return dataclasses.replace(rule, resize=36, crop=32, batch_size=16)


def run(wanted, source, folder, **options):
    """The top-1 of a transfer, which is trained unless it is there."""
    out = folder / str(wanted)
    summary = out / "summary.json"
    if not summary.exists():
        train_set, test_set = source.data(wanted.data)
        if wanted.shots:
            train_set = transfer.few_shot(train_set, wanted.shots, wanted.seed)
        transfer.train(
            source.model(wanted.model, len(train_set.classes)),
            train_set,
            source.rule(train_set),
            eval_set=test_set,
            out=out,
            resume=(out / "last.pt").exists(),
            seed=wanted.seed,
            eval_every=10**9,
            about=wanted._asdict(),
            **options,
        )
    return json.loads(summary.read_text())["top1"]


def table(found):
    """A line for each network and data set: our median and theirs, for each number of shots."""
    yield f"{'top-1, ours / published':24}" + "".join(f"{shots or 'all':>16}" for shots in SHOTS)
    for (model, data), theirs in PUBLISHED.items():
        ours = [found.get((model, data, shots), []) for shots in SHOTS]
        if any(ours):
            pairs = zip(ours, theirs, strict=True)
            cells = (
                f"{100 * median(top1):.1f} / {other}" if top1 else "-" for top1, other in pairs
            )
            yield f"{model + ' ' + data:24}" + "".join(f"{cell:>16}" for cell in cells)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmarks.published", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    models, data = (sorted(set(names)) for names in zip(*PUBLISHED, strict=True))
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--data", nargs="+", choices=data, default=data)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--stand-in", action="store_true")
    args = parser.parse_args(argv)
    out = args.out / "stand-in" if args.stand_in else args.out
    out.mkdir(parents=True, exist_ok=True)
    source = (StandIn if args.stand_in else Real)(out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    split, workers = ("auto", 8) if device == "cuda" else (1, 1)
    options = {"device": device, "precision": "auto", "batch_split": split, "workers": workers}
    found = {}
    wanted = starmap(Transfer, product(args.models, args.data, SHOTS, range(args.seeds)))
    # The long ones last.
    for each in sorted(wanted, key=lambda each: (each.shots is None, each.seed)):
        top1 = run(each, source, out, **options)
        found.setdefault(each[:3], []).append(top1)
        print(f"{each}: {100 * top1:.2f}", flush=True)
    lines = [*table(found), *["a stand-in: these figures mean nothing"] * args.stand_in]
    (out / "published.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
