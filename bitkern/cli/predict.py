"""``bitkern predict``: the most probable classes of images."""

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bitkern.cli import options
from bitkern.packages import require
from bitkern.text import one_line
from bitkern.transfer import FinishedRun, load_run
from bitkern.transfer.data import ResizedImages, find_decoder, find_images
from bitkern.transfer.device_config import DeviceConfig
from bitkern.transfer.inference import predict_batches

DISTRIBUTED = False
EXAMPLES = """\
examples:
  bitkern predict runs/mine photo.jpg
  bitkern predict runs/mine FOLDER --csv > predictions.csv
"""


class Prediction(NamedTuple):
    """The most probable classes of an image, {"class", "probability"}, in descending order."""

    image: str
    predictions: list[dict[str, Any]]


def add(commands: "argparse._SubParsersAction[options.Parser]") -> None:
    help = "classify images"
    parser = commands.add_parser("predict", help=help, description=f"{help}.", epilog=EXAMPLES)
    parser.add_argument("run", help="the folder of a run, or its model.safetensors")
    parser.add_argument("images", nargs="+", metavar="image", help="image files or folders")
    help = "images per batch (default: 64)"
    parser.group("speed and memory")("--batch-size", type=options.positive, default=64, help=help)
    options.add_device_options(parser)
    output = parser.group("output")
    help = "classes to name for each image, the most probable first (default: 5)"
    output("--top-k", type=options.positive, default=5, help=help)
    formats = parser.groups["output"].add_mutually_exclusive_group()
    for name, form in (
        ("json", "one array"),
        ("jsonl", "an object per line"),
        ("csv", "a line per image and class"),
    ):
        help = f"print {form}"
        formats.add_argument(
            f"--{name}", action="store_const", const=name, dest="format", help=help
        )


def run(args: argparse.Namespace) -> None:
    require("PIL")
    device = options.usable_device(args.device)
    finished = load_run(args.run)
    images = _find_images(args.images)
    config = DeviceConfig.create(device, args.precision, args.workers)
    skipped: list[str] = []
    predictions = _predict(finished, images, config, args, skipped)
    WRITERS[args.format](predictions)
    options.report_skipped(len(skipped))
    if len(skipped) == len(images):
        raise ValueError("images: expected one that can be read, got none")


def _predict(
    finished: FinishedRun,
    images: Sequence[str],
    config: DeviceConfig,
    args: argparse.Namespace,
    skipped: list[str],
) -> Iterator[Prediction]:
    """Yield the predictions in order; corrupt images are added to ``skipped``."""
    names, top_k = finished.classes, min(args.top_k, len(finished.classes))
    paths = iter(images)
    resized = ResizedImages(images, finished.crop, find_decoder(finished.decoder))
    parts = resized, range(len(images)), args.batch_size
    for logits, unreadable in predict_batches(config, finished.model, *parts):
        probabilities = logits.sigmoid() if finished.multi_label else logits.softmax(1)
        best = probabilities.topk(top_k) if len(logits) else None
        rows = zip(best.values.tolist(), best.indices.tolist(), strict=True) if best else iter(())
        for i in range(len(logits) + len(unreadable)):
            path = next(paths)
            if i not in unreadable:
                pairs = zip(*next(rows), strict=True)
                yield Prediction(path, [{"class": names[c], "probability": p} for p, c in pairs])
            elif args.skip_corrupt:
                print(f"skipped {one_line(unreadable[i])}", file=sys.stderr)
                skipped.append(path)
            else:
                raise ValueError(f"{unreadable[i]}: leave it out, or pass skip_corrupt=True")


def _write_text(predictions: Iterable[Prediction]) -> None:
    for image, best in predictions:
        print(f"{image}:", ", ".join("{class} {probability:.4f}".format(**p) for p in best))


def _write_json(predictions: Iterable[Prediction]) -> None:
    before = "["
    for prediction in predictions:
        print(before, json.dumps(prediction._asdict()), sep="\n", end="")
        before = ","
    print("\n]" if before == "," else "[]")


def _write_jsonl(predictions: Iterable[Prediction]) -> None:
    for prediction in predictions:
        print(json.dumps(prediction._asdict()))


def _write_csv(predictions: Iterable[Prediction]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "probability"])
    for image, best in predictions:
        for rank, p in enumerate(best, 1):
            writer.writerow([image, rank, p["class"], f"{p['probability']:.6f}"])


WRITERS = {None: _write_text, "json": _write_json, "jsonl": _write_jsonl, "csv": _write_csv}


def _find_images(paths: Iterable[str]) -> list[str]:
    """List the files of these paths, and those in folders."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            images = find_images(path)
            if not images:
                raise ValueError(f"{path}: holds no images")
            found += images
        elif path.is_file():
            found.append(str(path))
        elif path.exists():
            raise ValueError(f"{path}: expected a file or folder")
        else:
            raise ValueError(f"{path}: no such file or folder")
    return found
