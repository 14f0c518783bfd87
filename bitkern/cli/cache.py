"""``bitkern cache``: the resized images on disk."""

import argparse
import datetime
import json
from typing import Any

from bitkern.cli import options
from bitkern.transfer.data import CacheEntry, cache_entries, images_folder, index_folder

DISTRIBUTED = False


def add(commands: "argparse._SubParsersAction[options.Parser]") -> None:
    parser = commands.add_parser("cache", help="list the resized images on disk, or delete them")
    actions = parser.add_subparsers(required=True, metavar="list|clear", dest="action")
    listing = actions.add_parser("list", help="the entries, the most recently used first")
    listing.add_argument("--json", action="store_true", help="print JSON")
    help = "delete the named entries, or all and the indexes of shards"
    clearing = actions.add_parser("clear", help=help)
    clearing.add_argument("key", nargs="*", help="key of an entry, as in the list")


def run(args: argparse.Namespace) -> None:
    if args.action == "list":
        rows = [_row(entry) for entry in cache_entries()]
        print(json.dumps(rows, indent=2) if args.json else _table(rows))
        return
    every = {entry.folder.name: entry for entry in cache_entries()}
    for key in args.key:
        if key not in every:
            raise ValueError(f"{key}: no such entry in {images_folder()}")
    chosen = [every[key] for key in args.key] if args.key else list(every.values())
    sizes = {entry: entry.bytes() for entry in chosen}
    kept = [entry for entry in chosen if not entry.remove()]
    freed = sum(size for entry, size in sizes.items() if entry not in kept)
    print(f"deleted {len(chosen) - len(kept)} of {len(every)} entries, {freed / 1e9:.1f} GB")
    if not args.key:
        for path in index_folder().glob("*.npz"):
            path.unlink(missing_ok=True)
    for entry in kept:
        raise ValueError(
            f"{entry.folder}: cannot be deleted: another process is filling it, or it is read-only"
        )


def _row(entry: CacheEntry) -> dict[str, Any]:
    index = entry.read()
    return {
        "key": entry.folder.name,
        "images": index.count if index else None,
        "done": index.done if index else 0,
        "size": index.size if index else None,
        "decoder": index.decoder if index else None,
        "bytes": entry.bytes(),
        "used": datetime.datetime.fromtimestamp(entry.used()).isoformat(" ", "minutes"),
        "data": index.data if index else None,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    line = "{:<32} {:>9} {:>5} {:>5} {:>8}  {:<16}  {}".format
    lines = [line("key", "images", "done", "size", "GB", "used", "data")]
    for row in rows:
        count = row["images"]
        done = f"{row['done'] / count:.0%}" if count else "?"
        values = row["key"], count or "?", done, row["size"] or "?", f"{row['bytes'] / 1e9:.2f}"
        lines.append(line(*values, row["used"], row["data"] if count else "damaged"))
    total = sum(row["bytes"] for row in rows) / 1e9
    return "\n".join([*lines, f"{len(rows)} entries, {total:.2f} GB in {images_folder()}"])
