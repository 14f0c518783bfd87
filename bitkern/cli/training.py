"""What the commands that train have in common."""

import argparse
import contextlib
import dataclasses
import hashlib
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    NoSplitError,
    check_apart,
    check_same_classes,
    hold_out,
    load_split,
)
from bitkern.transfer.data.decoders import DECODERS
from bitkern.transfer.loop import train
from bitkern.transfer.recipes import Recipe
from bitkern.transfer.run import (
    CHECKPOINT,
    REPORT,
    OnRecord,
    Record,
    check_out,
    read_checkpoint,
)
from bitkern.transfer.selection import KEEP, METRICS, Selection
from bitkern.transfer.training import TrainResult
from bitkern.transfer.watching import duration, in_words


def add_options(parser: options.Parser) -> None:
    """Add the options of a training, its recipe's and its weights' apart."""
    data, model, _, memory, output = map(parser.group, GROUPS)
    options.add_data(
        parser, "DIR/train/CLASS/*.jpg and DIR/test/…, or columns image, label or labels, and split"
    )
    data(
        "--holdout",
        type=float,
        metavar="FRACTION",
        help="evaluate on this part of train; with --keep best or --patience choose by it",
    )
    add_selection(parser)
    data("--seed", type=options.not_negative, default=0, help="of all that is random (default: 0)")
    data("--no-flip", action="store_true", help="no mirroring, for digits and letters")
    data(
        "--balance",
        choices=BALANCE,
        default="none",
        help="for unbalanced classes: sample draws all equally often, loss weighs rare ones more "
        "(default: none)",
    )
    data(
        "--check",
        action=argparse.BooleanOptionalAction,
        help="read all images before training (default: for sets of up to 100 000)",
    )
    data(
        "--decoder",
        choices=DECODERS,
        default="pillow",
        help="image decoder; results differ slightly (default: pillow)",
    )
    model("--model", required=True, metavar="NAME", help="such as BiT-M-R50x1; see bitkern weights")
    memory(
        "--batch-split",
        type=options.batch_split,
        default="auto",
        metavar="auto|N",
        help="micro-batches per step, to save memory (default: auto, the fewest that fit, on a CPU "
        "of up to 16 images each)",
    )
    options.add_running(parser)
    options.add_cache(
        parser,
        "where resized images are kept, so that each is decoded once (default: auto, where there "
        "is room)",
    )
    memory(
        "--cuda-graph",
        choices=CUDA_GRAPH,
        default="auto",
        help="replay steps as CUDA graphs, on one GPU (default: auto, off until it is measured)",
    )
    output("--out", required=True, metavar="DIR", help="folder of the results")
    output("--resume", action="store_true", help="continue the run in --out; needs no other option")
    for what in ("eval", "checkpoint"):
        help = f"steps between {what}{'uation' * (what == 'eval')}s (default: a tenth of the run)"
        output(f"--{what}-every", type=options.positive, metavar="STEPS", help=help)
    output("--tensorboard", action="store_true", help="write the curves for TensorBoard to DIR")


def add_selection(parser: options.Parser) -> None:
    """Add the options of which model is kept."""
    add = parser.group("data")
    help = "model to keep: the last, as published, or the best on images held out or in DIR/val"
    add("--keep", choices=KEEP, default="last", help=f"{help} (default: last)")
    add("--metric", choices=METRICS, default="top1", help="what the best is by (default: top1)")
    help = "end after so many evaluations without a better one (default: never)"
    add("--patience", type=options.positive, metavar="N", help=help)


SCHEDULE = "schedule: override the values of the recipe"
GROUPS = ("data", "model and weights", SCHEDULE, "speed and memory", "output")


def resumed(argv: Sequence[str]) -> Sequence[str]:
    """The arguments of a command; with --resume after those that the run began with.

    Raises ``RunError`` where there is nothing to resume, ValueError for one of another command.
    """
    if "--resume" not in argv or argv[0] not in ("finetune", "pretrain"):
        return argv
    parser = options.Parser(add_help=False)
    parser.add_argument("--out", type=Path)
    out = parser.parse_known_args(argv)[0].out
    if out is None:
        return argv
    check_out(out, resume=True)
    began = shlex.split(read_checkpoint(out)["about"].get("command", f"bitkern {argv[0]}"))
    if began[1] != argv[0]:
        raise ValueError(f"{out}: was begun by bitkern {began[1]}; resume it with that")
    return [*began[1:], *argv[1:]]


def how_to_go_on(args: argparse.Namespace) -> str:
    """Say how an interrupted run goes on, if it does."""
    if not (Path(args.out) / CHECKPOINT).exists():
        return " before a step was saved: nothing is left to resume"
    command = shlex.join(["bitkern", args.command, "--resume", "--out", args.out])
    return f"; to continue: {command}"


class Running(NamedTuple):
    """The device, the precision, and why it is that one."""

    device: str
    precision: str
    why: str


def begin(args: argparse.Namespace) -> Running:
    """What can be found out, or be wrong, before anything is read."""
    require("PIL", "matplotlib", "sklearn", "tqdm", *["tensorboard"] * args.tensorboard)
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


class Data(NamedTuple):
    """The sets of a training; ``split`` is what that to evaluate is, ``val_set`` to choose by."""

    train_set: ImageSet
    eval_set: ImageSet
    split: str
    val_set: ImageSet | None = None


def load_data(args: argparse.Namespace) -> Data:
    """The sets that the options name. Raises ``DataError``."""
    train_set = load_split(args.data, "train", flat=args.holdout is not None)
    chooses = args.keep == "best" or args.patience is not None
    held_out = val_set = None
    if args.holdout is not None:
        train_set, held_out = hold_out(train_set, args.holdout, args.seed)
        if not chooses:
            return Data(train_set, held_out, "holdout")
    if chooses:
        val_set = held_out or _load(args, "validation", train_set)
    try:
        test_set = _load(args, "test", train_set)
    except NoSplitError:
        if held_out is None:
            raise
        test_set = held_out
    if val_set is not None and [*map(str, test_set.images)] == [*map(str, val_set.images)]:
        return Data(train_set, val_set, "holdout" if held_out else "validation", val_set)
    return Data(train_set, test_set, "test", val_set)


def _load(args: argparse.Namespace, split: str, train_set: ImageSet) -> ImageSet:
    found = load_split(args.data, split, train_set.classes)
    check_same_classes(
        found.classes, train_set.classes, f"{args.data}/{split}", f"{args.data}/train"
    )
    check_apart(train_set, found, args.data)
    return found


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
    data: Data,
    running: Running,
    about: Mapping[str, Any],
) -> None:
    """Train, and say so."""
    train_set, eval_set, split, val_set = data
    several = ", several an image" if train_set.multi_label else ""
    print(
        f"{args.model} from {weights or 'random weights'}: {len(train_set.images)} training "
        f"images, {len(eval_set.images)} {split} images, {len(train_set.classes)} classes{several}"
    )
    values = (f"{k.replace('_', ' ')} {v}" for k, v in dataclasses.asdict(rule).items())
    print(f"{type(rule).__name__}: {', '.join(values)}")
    print(f"{running.precision} on {running.device} ({running.why})")
    said = {"model": args.model, "weights": weights, "data": args.data, "evaluated_on": split}
    said |= {"command": args.typed}
    selection = None
    if val_set is not None:
        selection = Selection(val_set, args.keep, args.metric, args.patience)
        optimistic = ", which the test is on too: so it is optimistic" * (val_set is eval_set)
        print(f"{args.keep} model by {args.metric} on {len(val_set.images)} images{optimistic}")
    with _tensorboard(args) as on_record:
        result = train(
            model,
            train_set,
            rule,
            eval_set=eval_set,
            out=Path(args.out),
            resume=args.resume,
            seed=args.seed,
            batch_split=args.batch_split,
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
            on_record=on_record,
            selection=selection,
            about=said | dict(about),
        )
    options.report_skipped(result.skipped)
    print(_in_the_end(result, eval_set, split))
    print(f"open {Path(args.out) / REPORT}")


def _in_the_end(result: TrainResult, eval_set: ImageSet, split: str) -> str:
    """What came of a training, beside what needs none."""
    assert result.metrics is not None
    counts = np.bincount(eval_set.labels) if not eval_set.multi_label else eval_set.labels.sum(0)
    largest, occurring = int(counts.argmax()), np.count_nonzero(counts)
    baseline = f"always naming {eval_set.classes[largest]}: "
    baseline += f"{100 * counts.max() / len(eval_set.images):.1f} %"
    if occurring and not eval_set.multi_label:
        baseline += f", balanced {100 / occurring:.1f} %"
    evaluated = [record for record in result.history if "top1" in record]
    best = max(evaluated, key=lambda record: record["top1"])
    return (
        f"{in_words(result.metrics)} on {len(eval_set.images)} {split} images ({baseline})\n"
        f"{duration(result.seconds)}; best top-1 {100 * best['top1']:.1f} % at step {best['step']}"
    )


@contextlib.contextmanager
def _tensorboard(args: argparse.Namespace) -> Iterator[OnRecord | None]:
    """Give what writes records for TensorBoard, into the folder of the run, if asked for."""
    if not args.tensorboard or ranks.rank():
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []  # made when there is something to write

    def write(record: Record) -> None:
        if not writers:
            writers.append(SummaryWriter(args.out))
        for name, value in record.items():
            if name != "step":
                writers[0].add_scalar(name, value, record["step"])

    try:
        yield write
    finally:
        for writer in writers:
            writer.close()
