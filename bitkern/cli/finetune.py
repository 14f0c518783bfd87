"""``bitkern finetune``: fine-tune a BiT model on images."""

import argparse
import dataclasses

import torch

from bitkern.cli import options, training
from bitkern.models import create_model
from bitkern.models.pretrained import find_release, get_release
from bitkern.transfer import HyperRule, ImageSet, few_shot, hyperrule, ranks
from bitkern.transfer.data import image_size

DISTRIBUTED = True  # also under torchrun
PRESETS = ("hyperrule", "quick")
EXAMPLES = """\
examples:
  bitkern finetune --data DATA --model BiT-M-R50x1 --out runs/mine
  bitkern finetune --data DATA --model BiT-M-R50x1 --out runs/quick --preset quick
  bitkern finetune --resume --out runs/mine
"""


def add(commands: "argparse._SubParsersAction[options.Parser]") -> None:
    help = "fine-tune a BiT model on a folder of images"
    parser = commands.add_parser("finetune", help=help, description=f"{help}.", epilog=EXAMPLES)
    training.add_options(parser)
    model = parser.group("model and weights")
    model(
        "--weights",
        metavar="FILE|RUN|NAME",
        help="initial weights: a checkpoint, the folder of a run, a name such as BiT-M-R50x1 or "
        "hf-hub:ORG/NAME, or none for random ones (default: those released under --model)",
    )
    model("--freeze", action="store_true", help="train the head alone: faster, less accurate")
    help = "train on this many images of each class"
    parser.group("data")("--shots", type=options.positive, help=f"{help} (default: all)")
    rule = parser.group(training.SCHEDULE)
    rule(
        "--preset",
        choices=PRESETS,
        default="hyperrule",
        help="hyperrule, as published; quick, for small machines: images of 128 pixels, 100 steps "
        "of 64, minutes instead of hours and usually less accurate (default: hyperrule)",
    )
    rule("--steps", type=options.positive, help="optimizer steps; scales the whole schedule")
    rule("--warmup-steps", type=options.non_negative, help="steps until the full learning rate")
    help = "steps after which the learning rate falls to a tenth"
    rule("--decay-steps", type=options.non_negative, nargs="*", metavar="STEP", help=help)
    rule("--base-lr", type=float, help="learning rate (default: 0.003)")
    help = "images per step; does not rescale the learning rate (default: 512)"
    rule("--batch-size", type=options.positive, help=help)
    help = "weight decay of convolutions and head (default: 0)"
    rule("--weight-decay", type=float, help=help)
    help = "strength of MixUp, 0 for none (default: 0.1 from 20 000 images on, else 0)"
    rule("--mixup-alpha", type=float, help=help)
    help = "size of the resized square image (default: 512, 160 if small)"
    rule("--resize", type=options.positive, metavar="PIXELS", help=help)
    help = "size of the square crop (default: 480, 128 if small)"
    rule("--crop", type=options.positive, metavar="PIXELS", help=help)


def run(args: argparse.Namespace) -> None:
    choice = training.prepare(args)
    data = training.load_once(_load_data, args)
    rule = ranks.run_on_rank0(_rule, args, data.train_set)
    with ranks.propagate_errors():
        torch.manual_seed(args.seed)
        weights = _weights(args)
        training.fetch_weights(args, weights)
    with ranks.propagate_errors():
        model = create_model(args.model, 0, weights=None if args.resume else weights)
    # A new head always, because the same number of classes need not be the same classes.
    model.reset_classifier(len(data.train_set.classes))
    if args.freeze:
        model.freeze_backbone()
    about = {"shots": args.shots, "freeze": args.freeze}
    training.run(args, model, weights, rule, data, choice, about)


def _weights(args: argparse.Namespace) -> str | None:
    """Return the path or name of the weights to start from, None for random ones."""
    if args.weights is None:
        release = find_release(args.model)
        return release.name if release else None
    if args.weights == "none":
        return None
    return get_release(args.model).name if args.weights == "pretrained" else args.weights


def _load_data(args: argparse.Namespace) -> training.Data:
    data = training.load_data(args)
    if args.shots is not None:
        return data._replace(train_set=few_shot(data.train_set, args.shots, args.seed))
    return data


def _rule(args: argparse.Namespace, train_set: ImageSet) -> HyperRule:
    """Return the HyperRule of the data set with the values given on the command line."""
    rule = hyperrule(len(train_set.images), image_size(train_set))
    if args.preset == "quick":
        rule = rule.quick()
    if args.steps is not None:
        rule = rule.with_steps(args.steps)
    names = [field.name for field in dataclasses.fields(HyperRule) if field.name != "steps"]
    return dataclasses.replace(rule, **training.given_options(args, names))
