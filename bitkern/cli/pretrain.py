"""``bitkern pretrain``: train a BiT from scratch, like its upstream models."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bitkern.cli import options, training
from bitkern.models import ResNetV2, create_model
from bitkern.models.checkpoints import read_metadata
from bitkern.models.registry import weights_path
from bitkern.transfer import DataError, ImageSet, Pretraining, pretraining, ranks
from bitkern.transfer.data import check_same_classes
from bitkern.transfer.recipes.pretraining import PRESETS

DISTRIBUTED = True
LOSSES = ("softmax", "sigmoid")
EXAMPLES = """\
example:
  bitkern pretrain --data 'SHARDS/train-{000000..000146}.tar' --holdout 0.01 \\
    --preset BiT-S --model R50x1 --out runs/upstream
"""


def add(commands: "argparse._SubParsersAction[options.Parser]") -> None:
    help = "train a BiT model from scratch, as published"
    parser = commands.add_parser("pretrain", help=help, description=f"{help}.", epilog=EXAMPLES)
    training.add_options(parser)
    help = "initial weights, including the head (default: random)"
    parser.group("model and weights")("--weights", metavar="FILE|RUN|NAME", help=help)
    rule = parser.group(training.SCHEDULE)
    help = "the published model whose schedule and loss to use"
    rule("--preset", required=True, choices=PRESETS, help=help)
    help = "epochs of training; scales the decays (default: 90; BiT-L: 40)"
    rule("--epochs", type=float, help=help)
    rule("--steps", type=options.positive, help="optimizer steps, instead of --epochs")
    help = "epochs after which the learning rate falls to a tenth"
    rule("--decay-epochs", type=float, nargs="*", metavar="EPOCH", help=help)
    help = "steps until the full learning rate (default: 5000)"
    rule("--warmup-steps", type=options.non_negative, help=help)
    rule("--batch-size", type=options.positive, help="images per step (default: 4096)")
    help = "learning rate for 256 images, scaled for others (default: 0.03)"
    rule("--base-lr", type=float, help=help)
    help = "weight decay of convolutions and head (default: 0.0001)"
    rule("--weight-decay", type=float, help=help)
    rule("--loss", choices=LOSSES, help="(default: softmax for BiT-S, else sigmoid)")
    help = "size of the square crops (default: 224)"
    rule("--image-size", type=options.positive, metavar="PIXELS", help=help)
    help = "least fraction of an image in a crop (default: 0.05)"
    rule("--min-area", type=float, metavar="FRACTION", help=help)


def run(args: argparse.Namespace) -> None:
    choice = training.prepare(args)
    data = training.load_once(training.load_data, args)
    with ranks.propagate_errors():
        rule = _rule(args, len(data.train_set.images))
        _check_labels(args, data.train_set, rule)
        torch.manual_seed(args.seed)
        training.fetch_weights(args, args.weights)
    with ranks.propagate_errors():
        model = _model(args, data.train_set.classes, rule)
    training.run(args, model, args.weights, rule, data, choice, {"preset": args.preset})


def _rule(args: argparse.Namespace, num_examples: int) -> Pretraining:
    names = ("epochs", "steps", "decay_epochs", "warmup_steps", "batch_size", "base_lr")
    values = training.given_options(args, (*names, "weight_decay", "image_size", "min_area"))
    if args.loss:
        values["sigmoid"] = args.loss == "sigmoid"
    return pretraining(args.preset, num_examples, **values)


def _check_labels(args: argparse.Namespace, data: ImageSet, rule: Pretraining) -> None:
    """Raise for a softmax on a multi-label set, and for one of its images without labels."""
    if not data.multi_label:
        return
    if not rule.sigmoid:
        raise ValueError("loss: expected sigmoid for several labels per image, got softmax")
    unlabelled = np.flatnonzero(data.labels.sum(1) == 0)
    if len(unlabelled):
        image = data.images[unlabelled[0]]
        raise DataError(f"{args.data}: {image}: expected a label, got none")


def _model(args: argparse.Namespace, classes: Sequence[str], rule: Pretraining) -> ResNetV2:
    if not args.weights or args.resume:
        model = create_model(args.model, len(classes))
        torch.nn.init.constant_(model.get_parameter("head.fc.bias"), rule.head_bias(len(classes)))
        return model
    path = Path(weights_path(args.weights, args.model))
    model = create_model(args.model, weights=path)
    if model.num_classes != len(classes):
        raise ValueError(
            f"weights: expected a head of {len(classes)} classes as {args.data} has, "
            f"got {args.weights} with {model.num_classes}"
        )
    named = read_metadata(path).get("classes") if path.suffix == ".safetensors" else None
    if named:
        check_same_classes(named, classes, args.weights, args.data)
    return model
