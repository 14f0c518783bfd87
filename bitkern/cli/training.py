"""The options and the run of the commands that train."""

import argparse
import contextlib
import dataclasses
import hashlib
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitkern import transfer
from bitkern.cli import options
from bitkern.models import ResNetV2
from bitkern.models.registry import weights_path
from bitkern.packages import require
from bitkern.text import format_duration, format_metrics
from bitkern.transfer import ranks
from bitkern.transfer.checks import BALANCE, CUDA_GRAPH, KEEP, METRICS
from bitkern.transfer.data import (
    DECODERS,
    NoSplitError,
    check_apart,
    check_same_classes,
    load_split,
)
from bitkern.transfer.run import CHECKPOINT, REPORT, OnRecord, check_out, read_checkpoint

# Options that are arguments of ``train`` of the same name.
TRAIN_ARGUMENTS = (
    "out resume seed batch_split balance eval_every checkpoint_every workers cuda_graph cache "
    "decoder skip_corrupt check"
).split()


def add_options(parser: options.Parser) -> None:
    """Add the options of a training, except those of its recipe and weights."""
    data, model, _, memory, output = map(parser.group, GROUPS)
    options.add_data(
        parser, "DIR/train/CLASS/*.jpg and DIR/test/…, or columns image, label or labels, and split"
    )
    data(
        "--holdout",
        type=float,
        metavar="FRACTION",
        help="hold out this part of the training images for evaluation; --keep best and --patience "
        "choose the model by it",
    )
    help = "model to keep: the last, as published, or the best on images of --holdout or DIR/val"
    data("--keep", choices=KEEP, default="last", help=f"{help} (default: last)")
    help = "metric of the best model (default: top1)"
    data("--metric", choices=METRICS, default="top1", help=help)
    help = "stop after N evaluations without a better one (default: never)"
    data("--patience", type=options.positive, metavar="N", help=help)
    data("--seed", type=options.non_negative, default=0, help="random seed (default: 0)")
    data("--no-flip", action="store_true", help="no horizontal flips, for digits and letters")
    data(
        "--balance",
        choices=BALANCE,
        default="none",
        help="for unbalanced classes: sample draws all equally often, loss weights rare ones more "
        "(default: none)",
    )
    help = "read all images before training (default: for sets of up to 100 000)"
    data("--check", action=argparse.BooleanOptionalAction, help=help)
    help = "image decoder; results differ slightly (default: pillow)"
    data("--decoder", choices=DECODERS, default="pillow", help=help)
    model("--model", required=True, metavar="NAME", help="such as BiT-M-R50x1; see bitkern weights")
    memory(
        "--batch-split",
        type=options.batch_split,
        default="auto",
        metavar="auto|N",
        help="micro-batches per step, to save memory (default: auto, as few as fit in memory; on a "
        "CPU of at most 16 images)",
    )
    options.add_device_options(parser)
    options.add_cache(
        parser,
        "where to cache resized images, so that each is decoded once (default: auto, in memory or "
        "on disk if there is room)",
    )
    help = "replay steps as CUDA graphs, on one GPU (default: auto, off for now)"
    memory("--cuda-graph", choices=CUDA_GRAPH, default="auto", help=help)
    output("--out", required=True, metavar="DIR", help="folder of the results")
    output("--resume", action="store_true", help="continue the run in --out; needs no other option")
    for what in ("eval", "checkpoint"):
        help = f"steps between {what}{'uation' * (what == 'eval')}s (default: a tenth of the run)"
        output(f"--{what}-every", type=options.positive, metavar="STEPS", help=help)
    output("--tensorboard", action="store_true", help="write the curves for TensorBoard to DIR")


SCHEDULE = "schedule: override the values of the recipe"
GROUPS = ("data", "model and weights", SCHEDULE, "speed and memory", "output")


def restore_arguments(argv: Sequence[str]) -> Sequence[str]:
    """Prepend the arguments that the run began with to those of a command with --resume.

    Raises ``RunError`` if there is nothing to resume, ValueError for a run of another command.
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
        raise ValueError(
            f"{out}: was started by bitkern {began[1]}; resume it with bitkern {began[1]}"
        )
    return [*began[1:], *argv[1:]]


def resume_hint(args: argparse.Namespace) -> str:
    """Return the command that continues an interrupted run, if there is a checkpoint."""
    if not (Path(args.out) / CHECKPOINT).exists():
        return " before a step was saved: nothing is left to resume"
    command = shlex.join(["bitkern", args.command, "--resume", "--out", args.out])
    return f"; to continue: {command}"


class DeviceChoice(NamedTuple):
    """The device, the precision, and the reason for the precision."""

    device: str
    precision: str
    reason: str


def prepare(args: argparse.Namespace) -> DeviceChoice:
    """Check packages, output folder and device before any data is read."""
    require("PIL", "matplotlib", "sklearn", "tqdm", *["tensorboard"] * args.tensorboard)
    ranks.run_on_rank0(check_out, Path(args.out), args.resume)
    with ranks.propagate_errors():
        device = options.usable_device(args.device)
        out = Path(args.out)
        began = read_checkpoint(out)["settings"]["precision"] if args.resume else None
        if args.precision == "auto":
            chosen = (began, "as the run began") if began else transfer.default_precision(device)
            return DeviceChoice(device, *chosen)
        other = began not in (None, args.precision)
        reason = "asked for" + f"; the run began in {began}" * other
        return DeviceChoice(device, args.precision, reason)


class Data(NamedTuple):
    """The sets of a training; ``split`` names ``eval_set``; ``val_set`` selects the model."""

    train_set: transfer.ImageSet
    eval_set: transfer.ImageSet
    split: str
    val_set: transfer.ImageSet | None = None


def load_once(load: Callable[[argparse.Namespace], Data], args: argparse.Namespace) -> Data:
    """Call ``load`` in one process of each machine.

    Raises ``DataError`` if the machines that train together have other data.
    """
    data = ranks.run_on_local_rank0(load, args)
    own = [(each.classes, _digest(each.labels)) for each in (data.train_set, data.eval_set)]
    if any(other != own for other in ranks.all_gather_object(own)):
        message = "expected the same images on all machines, found others"
        raise transfer.DataError(f"{args.data}: {message}")
    return data


def _digest(labels: Any) -> str:
    parts = (labels,) if isinstance(labels, np.ndarray) else (labels.indptr, labels.indices)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def load_data(args: argparse.Namespace) -> Data:
    """Load the sets that the options name. Raises ``DataError``."""
    train_set = load_split(args.data, "train", flat=args.holdout is not None)
    selects = args.keep == "best" or args.patience is not None
    held_out = val_set = None
    if args.holdout is not None:
        train_set, held_out = transfer.hold_out(train_set, args.holdout, args.seed)
        if not selects:
            return Data(train_set, held_out, "holdout")
    if selects:
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


def _load(args: argparse.Namespace, split: str, train_set: transfer.ImageSet) -> transfer.ImageSet:
    found = load_split(args.data, split, train_set.classes)
    names = f"{args.data}/{split}", f"{args.data}/train"
    check_same_classes(found.classes, train_set.classes, *names)
    check_apart(train_set, found, args.data)
    return found


def fetch_weights(args: argparse.Namespace, weights: str | None) -> None:
    """Download the initial weights, if any, in one process of each machine.

    The others then find them in the cache.
    """
    if weights and not args.resume and ranks.is_local_rank0():
        weights_path(weights, args.model)


def given_options(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return the options of these names that a user gave, lists as tuples."""
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
    rule: transfer.Recipe,
    data: Data,
    choice: DeviceChoice,
    about: Mapping[str, Any],
) -> None:
    train_set, eval_set, split, val_set = data
    several = ", several labels per image" if train_set.multi_label else ""
    print(
        f"{args.model} from {weights or 'random weights'}: {len(train_set.images)} training "
        f"images, {len(eval_set.images)} {split} images, {len(train_set.classes)} classes{several}"
    )
    values = (f"{k.replace('_', ' ')} {v}" for k, v in dataclasses.asdict(rule).items())
    print(f"{type(rule).__name__}: {', '.join(values)}")
    print(f"{choice.precision} on {choice.device} ({choice.reason})")
    settings = {"model": args.model, "weights": weights, "data": args.data, "evaluated_on": split}
    settings |= {"command": args.command_line, **about}
    selection = None
    if val_set is not None:
        selection = transfer.Selection(val_set, args.keep, args.metric, args.patience)
        optimistic = ""
        if val_set is eval_set:
            optimistic = ", which are also the test images, so the result is optimistic"
        print(f"{args.keep} model by {args.metric} on {len(val_set.images)} images{optimistic}")
    with _tensorboard(args) as on_record:
        result = transfer.train(
            model,
            train_set,
            rule,
            eval_set=eval_set,
            flip=not args.no_flip,
            device=choice.device,
            precision=choice.precision,
            on_record=on_record,
            selection=selection,
            about=settings,
            **{name: getattr(args, name) for name in TRAIN_ARGUMENTS},
        )
    options.report_skipped(result.skipped)
    print(_describe(result, eval_set, split))
    print(f"open {Path(args.out) / REPORT}")


def _describe(result: transfer.TrainResult, eval_set: transfer.ImageSet, split: str) -> str:
    """Describe the results beside a baseline that always names the largest class."""
    assert result.metrics is not None
    counts = np.bincount(eval_set.labels) if not eval_set.multi_label else eval_set.labels.sum(0)
    largest, occurring = int(counts.argmax()), np.count_nonzero(counts)
    baseline = f"always naming {eval_set.classes[largest]}: "
    baseline += f"{100 * counts.max() / len(eval_set.images):.1f} %"
    if occurring and not eval_set.multi_label:
        baseline += f", balanced {100 / occurring:.1f} %"
    evaluations = [record for record in result.history if "top1" in record]
    best = max(evaluations, key=lambda record: record["top1"])
    return (
        f"{format_metrics(result.metrics)} on {len(eval_set.images)} {split} images ({baseline})\n"
        f"{format_duration(result.seconds)}; best top-1 {100 * best['top1']:.1f} % at step "
        f"{best['step']}"
    )


@contextlib.contextmanager
def _tensorboard(args: argparse.Namespace) -> Iterator[OnRecord | None]:
    """Yield a function that writes records for TensorBoard into the run's folder, if asked for."""
    if not args.tensorboard or ranks.rank():
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []  # created with the first record

    def write(record: dict[str, Any]) -> None:
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
