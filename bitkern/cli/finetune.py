"""``bitkern finetune``: transfer a BiT to images."""

import argparse
import dataclasses
import hashlib
from pathlib import Path

import torch

from bitkern.cli import options
from bitkern.models import create_model
from bitkern.models.pretrained import find_release, released
from bitkern.models.registry import file_of
from bitkern.transfer import ranks
from bitkern.transfer.balance import BALANCE
from bitkern.transfer.compute import CUDA_GRAPH, default_precision, require
from bitkern.transfer.data import (
    DataError,
    ImageSet,
    check_apart,
    check_same_classes,
    few_shot,
    hold_out,
    image_size,
    load_split,
)
from bitkern.transfer.data.decoders import DECODERS
from bitkern.transfer.loop import train
from bitkern.transfer.recipes.hyperrule import HyperRule, hyperrule
from bitkern.transfer.run import REPORT, check_out, read_checkpoint

DISTRIBUTED = True  # also under torchrun


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("finetune", help="transfer a BiT to a folder of images")
    add = parser.add_argument
    options.add_data(
        parser, "DIR/train/CLASS/*.jpg and DIR/test/…, or columns image, label or labels, and split"
    )
    add("--model", required=True, help="such as BiT-M-R50x1")
    add(
        "--weights",
        metavar="FILE|NAME",
        help="to start from: a checkpoint, a name such as BiT-M-R50x1 or hf-hub:ORG/NAME, "
        "pretrained (the default where released under --model), or none",
    )
    add("--out", required=True, metavar="DIR", help="where the results go")
    add("--resume", action="store_true", help="continue the unfinished run in --out")
    add("--seed", type=options.not_negative, default=0)
    add("--shots", type=options.positive, help="train on this many images of each class")
    add("--holdout", type=float, metavar="FRACTION", help="evaluate on part of train, not on test")
    add("--freeze", action="store_true", help="train the head alone")
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
    rule = parser.add_argument_group("in place of the value of the HyperRule")
    rule.add_argument("--steps", type=options.positive, help="stretches warm-up and decays with it")
    rule.add_argument("--warmup-steps", type=options.not_negative)
    rule.add_argument("--decay-steps", type=options.not_negative, nargs="*", metavar="STEP")
    rule.add_argument("--base-lr", type=float)
    rule.add_argument(
        "--batch-size", type=options.positive, help="the learning rate stays as it is"
    )
    rule.add_argument("--mixup-alpha", type=float)
    rule.add_argument("--resize", type=options.positive, metavar="PIXELS")
    rule.add_argument("--crop", type=options.positive, metavar="PIXELS")


def run(args: argparse.Namespace) -> None:
    require("PIL", "matplotlib", "sklearn", "tqdm")
    out = Path(args.out)
    ranks.from_first(check_out, out, args.resume)
    with ranks.together():
        device = options.usable_device(args.device)
        precision, why = _precision(args, device)
    train_set, eval_set, split = ranks.from_first_of_host(_load_data, args)
    _check_same_everywhere(args.data, train_set, eval_set)
    rule = ranks.from_first(_rule, args, train_set)
    with ranks.together():
        torch.manual_seed(args.seed)
        weights = _weights(args)
        # The other processes then find it in the cache.
        if weights and not args.resume and ranks.is_first_of_host():
            file_of(weights, args.model)
    with ranks.together():
        model = create_model(args.model, 0, weights=None if args.resume else weights)
    # Never the head of the weights: as many classes need not be the same ones.
    model.reset_classifier(len(train_set.classes))
    if args.freeze:
        model.freeze_backbone()
    several = ", several an image" if train_set.multi_label else ""
    print(
        f"{args.model} from {weights or 'random weights'}: {len(train_set.images)} training "
        f"images, {len(eval_set.images)} {split} images, {len(train_set.classes)} classes{several}"
    )
    print(f"{rule}, {precision} on {device} ({why})")
    about = {"model": args.model, "weights": weights, "data": args.data}
    about["evaluated_on"] = split
    result = train(
        model,
        train_set,
        rule,
        eval_set=eval_set,
        out=out,
        resume=args.resume,
        seed=args.seed,
        batch_split=args.batch_split or ("auto" if device.startswith("cuda") else 1),
        balance=args.balance,
        flip=not args.no_flip,
        eval_every=args.eval_every,
        checkpoint_every=args.checkpoint_every,
        workers=args.workers,
        device=device,
        precision=precision,
        cuda_graph=args.cuda_graph,
        cache=args.cache,
        decoder=args.decoder,
        skip_corrupt=args.skip_corrupt,
        check=args.check,
        about=about | {"shots": args.shots, "freeze": args.freeze},
    )
    options.report_skipped(result.skipped)
    assert result.metrics is not None
    print(f"top-1 {result.metrics['top1']:.4f} on {split}; results in {out}, look at {REPORT}")


def _weights(args: argparse.Namespace) -> str | None:
    """The path or name of the weights to start from, None for random ones."""
    if args.weights is None:
        release = find_release(args.model)
        return release.name if release else None
    if args.weights == "none":
        return None
    return released(args.model).name if args.weights == "pretrained" else args.weights


def _precision(args: argparse.Namespace, device: str) -> tuple[str, str]:
    """The precision, and why."""
    began = read_checkpoint(Path(args.out))["settings"]["precision"] if args.resume else None
    if args.precision == "auto":
        return (began, "as the run began") if began else default_precision(device)
    other = began not in (None, args.precision)
    return args.precision, f"asked for; the run began in {began}" if other else "asked for"


def _load_data(args: argparse.Namespace) -> tuple[ImageSet, ImageSet, str]:
    """(training set, evaluation set, what the latter is)."""
    train_set = load_split(args.data, "train")
    if args.holdout is not None:
        split = "holdout"
        train_set, eval_set = hold_out(train_set, args.holdout, args.seed)
    else:
        split = "test"
        eval_set = load_split(args.data, split, train_set.classes)
        names = f"{args.data}/test", f"{args.data}/train"
        check_same_classes(eval_set.classes, train_set.classes, *names)
        check_apart(train_set, eval_set, args.data)
    if args.shots is not None:
        train_set = few_shot(train_set, args.shots, args.seed)
    return train_set, eval_set, split


def _check_same_everywhere(source: str, *sets: ImageSet) -> None:
    """Raise DataError if the machines that train together have other data."""
    mine = [(data.classes, hashlib.sha256(data.labels.tobytes()).hexdigest()) for data in sets]
    if any(other != mine for other in ranks.everyones(mine)):
        raise DataError(f"{source}: expected the same images on all machines, found others")


def _rule(args: argparse.Namespace, train_set: ImageSet) -> HyperRule:
    """The HyperRule of the data set, with the values given on the command line in place."""
    rule = hyperrule(len(train_set.images), image_size(train_set))
    if args.steps is not None:
        rule = rule.with_steps(args.steps)
    names = [field.name for field in dataclasses.fields(HyperRule) if field.name != "steps"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "decay_steps" in given:
        given["decay_steps"] = tuple(given["decay_steps"])
    return dataclasses.replace(rule, **given)
