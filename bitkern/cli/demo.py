"""``bitkern demo``: Big Transfer in miniature."""

import argparse

from bitkern.cli import options

DISTRIBUTED = False


def add(commands: "argparse._SubParsersAction[options.Parser]") -> None:
    parser = commands.add_parser("demo", help="Big Transfer in miniature: letters to digits")
    parser.add_argument("--out", default="runs/demo", metavar="DIR")
    parser.add_argument("--seed", type=options.not_negative, default=0)
    parser.add_argument("--letters", type=options.positive, help="training letters to render")


def run(args: argparse.Namespace) -> None:
    from bitkern import demo

    demo.run(args.out, args.seed, args.letters)
