"""``bitkern finetune``: transfer a BiT to images."""

import argparse
import dataclasses

import torch

from bitkern.cli import options, training
from bitkern.models import create_model
from bitkern.models.pretrained import find_release, released
from bitkern.models.registry import file_of
from bitkern.transfer import ranks
from bitkern.transfer.data import ImageSet, few_shot, image_size
from bitkern.transfer.recipes.hyperrule import HyperRule, hyperrule

DISTRIBUTED = True  # also under torchrun


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("finetune", help="transfer a BiT to a folder of images")
    add = parser.add_argument
    training.add_options(parser)
    add("--model", required=True, help="such as BiT-M-R50x1")
    add(
        "--weights",
        metavar="FILE|RUN|NAME",
        help="to start from: a checkpoint, the folder of a run, a name such as BiT-M-R50x1 or "
        "hf-hub:ORG/NAME, pretrained (the default where released under --model), or none",
    )
    add("--shots", type=options.positive, help="train on this many images of each class")
    add("--freeze", action="store_true", help="train the head alone")
    rule = parser.add_argument_group("in place of the value of the HyperRule")
    rule.add_argument("--steps", type=options.positive, help="stretches warm-up and decays with it")
    rule.add_argument("--warmup-steps", type=options.not_negative)
    rule.add_argument("--decay-steps", type=options.not_negative, nargs="*", metavar="STEP")
    rule.add_argument("--base-lr", type=float)
    rule.add_argument(
        "--batch-size", type=options.positive, help="the learning rate stays as it is"
    )
    rule.add_argument("--weight-decay", type=float, help="of the weights of convolutions and head")
    rule.add_argument("--mixup-alpha", type=float)
    rule.add_argument("--resize", type=options.positive, metavar="PIXELS")
    rule.add_argument("--crop", type=options.positive, metavar="PIXELS")


def run(args: argparse.Namespace) -> None:
    running = training.begin(args)
    data = ranks.from_first_of_host(_load_data, args)
    train_set, eval_set, _ = data
    training.check_same_everywhere(args.data, train_set, eval_set)
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
    about = {"shots": args.shots, "freeze": args.freeze}
    training.run(args, model, weights, rule, data, running, about)


def _weights(args: argparse.Namespace) -> str | None:
    """The path or name of the weights to start from, None for random ones."""
    if args.weights is None:
        release = find_release(args.model)
        return release.name if release else None
    if args.weights == "none":
        return None
    return released(args.model).name if args.weights == "pretrained" else args.weights


def _load_data(args: argparse.Namespace) -> tuple[ImageSet, ImageSet, str]:
    train_set, eval_set, split = training.load_data(args)
    if args.shots is not None:
        train_set = few_shot(train_set, args.shots, args.seed)
    return train_set, eval_set, split


def _rule(args: argparse.Namespace, train_set: ImageSet) -> HyperRule:
    """The HyperRule of the data set, with the values given on the command line in place."""
    rule = hyperrule(len(train_set.images), image_size(train_set))
    if args.steps is not None:
        rule = rule.with_steps(args.steps)
    names = [field.name for field in dataclasses.fields(HyperRule) if field.name != "steps"]
    return dataclasses.replace(rule, **training.given(args, names))
