"""What the commands that train have in common."""

import argparse
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitkern.cli import options
from bitkern.models import ResNetV2
from bitkern.transfer import ranks
from bitkern.transfer.balance import BALANCE
from bitkern.transfer.compute import CUDA_GRAPH, default_precision, require
from bitkern.transfer.data import (
    DataError,
    ImageSet,
    check_apart,
    check_same_classes,
    hold_out,
    load_split,
)
from bitkern.transfer.data.decoders import DECODERS
from bitkern.transfer.loop import train
from bitkern.transfer.recipes import Recipe
from bitkern.transfer.run import REPORT, check_out, read_checkpoint


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a training, its recipe's and its weights' apart."""
    add = parser.add_argument
    options.add_data(
        parser, "DIR/train/CLASS/*.jpg and DIR/test/…, or columns image, label or labels, and split"
    )
    add("--out", required=True, metavar="DIR", help="where the results go")
    add("--resume", action="store_true", help="continue the unfinished run in --out")
    add("--seed", type=options.not_negative, default=0)
    add("--holdout", type=float, metavar="FRACTION", help="evaluate on part of train, not on test")
    add("--no-flip", action="store_true", help="no mirroring, for digits and letters")
    add(
        "--batch-split",
        type=options.batch_split,
        metavar="auto|N",
        help="micro-batches per step, to save memory; auto: the fewest that fit (default: auto on "
        "a GPU, else 1)",
    )
    add(
        "--balance",
        choices=BALANCE,
        default="none",
        help="for unbalanced classes: draw all equally often, or weigh them by their rarity",
    )
    add("--eval-every", type=options.positive, metavar="STEPS", help="default: a tenth of the run")
    add(
        "--checkpoint-every",
        type=options.positive,
        metavar="STEPS",
        help="default: a tenth of the run",
    )
    options.add_running(parser)
    options.add_cache(
        parser,
        "where resized images are kept, so that each is decoded once; auto: where there is room",
    )
    add(
        "--decoder",
        choices=DECODERS,
        default="pillow",
        help="pixels differ, so results do (default: pillow)",
    )
    add(
        "--check",
        action=argparse.BooleanOptionalAction,
        help="read all images before training (default: of sets of up to 100 000)",
    )
    add(
        "--cuda-graph",
        choices=CUDA_GRAPH,
        default="auto",
        help="replay steps as CUDA graphs, on one GPU; auto: off until it has been measured",
    )


class Running(NamedTuple):
    """The device, the precision, and why it is that one."""

    device: str
    precision: str
    why: str


def begin(args: argparse.Namespace) -> Running:
    """What can be found out, or be wrong, before anything is read."""
    require("PIL", "matplotlib", "sklearn", "tqdm")
    ranks.from_first(check_out, Path(args.out), args.resume)
    with ranks.together():
        device = options.usable_device(args.device)
        return Running(device, *_precision(args, device))


def _precision(args: argparse.Namespace, device: str) -> tuple[str, str]:
    """The precision, and why."""
    began = read_checkpoint(Path(args.out))["settings"]["precision"] if args.resume else None
    if args.precision == "auto":
        return (began, "as the run began") if began else default_precision(device)
    other = began not in (None, args.precision)
    return args.precision, f"asked for; the run began in {began}" if other else "asked for"


def load_data(args: argparse.Namespace) -> tuple[ImageSet, ImageSet, str]:
    """(training set, evaluation set, what the latter is)."""
    train_set = load_split(args.data, "train")
    if args.holdout is not None:
        return *hold_out(train_set, args.holdout, args.seed), "holdout"
    test_set = load_split(args.data, "test", train_set.classes)
    names = f"{args.data}/test", f"{args.data}/train"
    check_same_classes(test_set.classes, train_set.classes, *names)
    check_apart(train_set, test_set, args.data)
    return train_set, test_set, "test"


def check_same_everywhere(source: str, *sets: ImageSet) -> None:
    """Raise DataError if the machines that train together have other data."""
    mine = [(data.classes, _digest(data)) for data in sets]
    if any(other != mine for other in ranks.everyones(mine)):
        raise DataError(f"{source}: expected the same images on all machines, found others")


def _digest(data: ImageSet) -> str:
    """What tells labels from others."""
    labels = data.labels
    parts = (labels,) if isinstance(labels, np.ndarray) else (labels.indptr, labels.indices)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes())
    return digest.hexdigest()


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The options of these names that a user gave, lists as tuples."""
    values = {name: getattr(args, name) for name in names}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if value is not None
    }


def run(
    args: argparse.Namespace,
    model: ResNetV2,
    weights: str | None,
    rule: Recipe,
    data: tuple[ImageSet, ImageSet, str],
    running: Running,
    about: Mapping[str, Any],
) -> None:
    """Train, and say so."""
    train_set, eval_set, split = data
    several = ", several an image" if train_set.multi_label else ""
    print(
        f"{args.model} from {weights or 'random weights'}: {len(train_set.images)} training "
        f"images, {len(eval_set.images)} {split} images, {len(train_set.classes)} classes{several}"
    )
    print(f"{rule}, {running.precision} on {running.device} ({running.why})")
    said = {"model": args.model, "weights": weights, "data": args.data, "evaluated_on": split}
    result = train(
        model,
        train_set,
        rule,
        eval_set=eval_set,
        out=Path(args.out),
        resume=args.resume,
        seed=args.seed,
        batch_split=args.batch_split or ("auto" if running.device.startswith("cuda") else 1),
        balance=args.balance,
        flip=not args.no_flip,
        eval_every=args.eval_every,
        checkpoint_every=args.checkpoint_every,
        workers=args.workers,
        device=running.device,
        precision=running.precision,
        cuda_graph=args.cuda_graph,
        cache=args.cache,
        decoder=args.decoder,
        skip_corrupt=args.skip_corrupt,
        check=args.check,
        about=said | dict(about),
    )
    options.report_skipped(result.skipped)
    assert result.metrics is not None
    metrics = f"top-1 {result.metrics['top1']:.4f}"
    if "mean_average_precision" in result.metrics:
        metrics += f", mean average precision {result.metrics['mean_average_precision']:.4f}"
    print(f"{metrics} on {split}; results in {args.out}, look at {REPORT}")
