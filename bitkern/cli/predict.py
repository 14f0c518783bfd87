"""``bitkern predict``: the most probable classes of images."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bitkern.cli import options
from bitkern.transfer import inference
from bitkern.transfer.compute import require
from bitkern.transfer.data import ImageSet
from bitkern.transfer.data.folder import find_images, unreadable
from bitkern.transfer.finished import load_run

DISTRIBUTED = False


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("predict", help="the most probable classes of images")
    parser.add_argument("run", help="the folder of a run, or its model.safetensors")
    parser.add_argument("images", nargs="+", metavar="image", help="image files or folders")
    parser.add_argument("--top-k", type=options.positive, default=5)
    parser.add_argument("--batch-size", type=options.positive, default=64)
    parser.add_argument("--json", action="store_true")
    options.add_running(parser)


def run(args: argparse.Namespace) -> None:
    require("PIL", "tqdm")
    device = options.usable_device(args.device)
    finished = load_run(args.run)
    classes = finished.classes
    images = _images_of(args.images)
    corrupt = unreadable(images, skip_corrupt=args.skip_corrupt)
    images = [image for image in images if image not in corrupt]
    unlabelled = ImageSet(images, np.zeros(len(images), np.int64), classes)
    logits = inference.predict(
        finished.model,
        unlabelled,
        finished.crop,
        batch_size=args.batch_size,
        workers=args.workers,
        device=device,
        precision=args.precision,
    )
    best = logits.softmax(1).topk(min(args.top_k, len(classes)))
    predictions = [
        [{"class": classes[i], "probability": p} for p, i in zip(*row, strict=True)]
        for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    options.report_skipped(len(corrupt))
    if args.json:
        rows = zip(images, predictions, strict=True)
        print(json.dumps([{"image": image, "predictions": top} for image, top in rows], indent=2))
        return
    for image, top in zip(images, predictions, strict=True):
        print(f"{image}:", ", ".join("{class} {probability:.4f}".format(**p) for p in top))


def _images_of(paths: Iterable[str]) -> list[str]:
    """The files named and those in the folders named."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            images = find_images(path)
            if not images:
                raise ValueError(f"{path}: holds no images")
            found += images
        elif path.exists():
            found.append(str(path))
        else:
            raise ValueError(f"{path}: no such file or folder")
    return found
