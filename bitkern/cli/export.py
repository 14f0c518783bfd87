"""``bitkern export``: a run's model for other libraries."""

import argparse

from bitkern.cli import options
from bitkern.export import TARGETS, TOLERANCE, export

DISTRIBUTED = False


def add(commands: "argparse._SubParsersAction[options.Parser]") -> None:
    help = "write a run's model for other libraries, and check that it computes the same"
    parser = commands.add_parser("export", help=help, description=f"{help}.")
    parser.add_argument("run", help="the folder of a run, or its model.safetensors")
    parser.add_argument("--to", required=True, choices=TARGETS, help="the library or format")
    parser.add_argument("--out", required=True, metavar="PATH", help="a new file or folder")


def run(args: argparse.Namespace) -> None:
    difference = export(args.run, args.to, args.out)
    checked = f"largest relative difference {difference:.1e} (limit {TOLERANCE:g})"
    print(f"{args.out}: for {args.to}; checked: {checked}")
