"""``bitkern demo``: Big Transfer in miniature."""

import argparse

from bitkern.cli import options

DISTRIBUTED = False


def add(commands: "argparse._SubParsersAction[options.Parser]") -> None:
    help = "Big Transfer in miniature, in about two minutes: from letters to digits"
    parser = commands.add_parser("demo", help=help, description=f"{help}.")
    add = parser.add_argument
    help = "folder of the results (default: %(default)s)"
    add("--out", default="runs/demo", metavar="DIR", help=help)
    add("--seed", type=options.non_negative, default=0, help="random seed (default: 0)")
    add("--letters", type=options.positive, help="training letters to render (default: 8000)")


def run(args: argparse.Namespace) -> None:
    from bitkern import demo

    demo.run(args.out, args.seed, args.letters)
