"""``bitkern weights``: released weights and their cache."""

import argparse
import json

from bitkern.cli import options
from bitkern.models.pretrained import RELEASES
from bitkern.models.weights import fetch, find_cached, source

DISTRIBUTED = False


def add(commands: "argparse._SubParsersAction[options.Parser]") -> None:
    help = "list released weights, download them, find them"
    parser = commands.add_parser("weights", help=help, description=f"{help}.")
    actions = parser.add_subparsers(required=True, metavar="list|fetch|path", dest="action")
    parsers = [actions.add_parser("list", help="the names, and which are in the cache")]
    for action, help in (("fetch", "download into the cache"), ("path", "the file in the cache")):
        parsers.append(actions.add_parser(action, help=help))
        parsers[-1].add_argument("name", help="such as BiT-M-R50x1, or hf-hub:ORG/NAME")
    for each in parsers:
        each.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    if args.action == "list":
        rows = _rows()
        print(json.dumps(rows, indent=2) if args.json else _table(rows))
        return
    path = fetch(args.name) if args.action == "fetch" else find_cached(args.name)
    if path is None:
        raise ValueError(f"{args.name}: not in the cache; bitkern weights fetch downloads it")
    print(json.dumps({"name": args.name, "path": str(path)}) if args.json else path)


def _rows() -> list[dict[str, str | int | bool | None]]:
    return [
        {
            "name": release.name,
            "architecture": release.architecture,
            "classes": release.classes,
            "source": source(release),
            "cached": find_cached(release.name) is not None,
        }
        for release in RELEASES.values()
    ]


def _table(rows: list[dict[str, str | int | bool | None]]) -> str:
    line = "{name:<50} {architecture:<12} {classes:>7}  {cached:<6} {source}".format_map
    lines = [line({key: key for key in rows[0]})]
    lines += [line(row | {"cached": "yes" if row["cached"] else "no"}) for row in rows]
    return "\n".join([*lines, "and vtab/BiT-M-ARCHITECTURE-run{0,1,2}-TASK"])
