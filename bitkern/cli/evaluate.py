"""``bitkern evaluate``: the accuracy of a run's model."""

import argparse
import json

from bitkern.cli import options
from bitkern.transfer import inference, ranks
from bitkern.transfer.compute import require
from bitkern.transfer.data import DataError, check_same_classes, load_split
from bitkern.transfer.finished import load_run

DISTRIBUTED = True


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("evaluate", help="accuracy of a run's model on DIR/test")
    parser.add_argument("run", help="the folder of a run, or its model.safetensors")
    options.add_data(parser, "DIR/test/CLASS/*.jpg, or columns image, and label or labels")
    parser.add_argument("--batch-size", type=options.positive, default=64)
    parser.add_argument("--json", action="store_true")
    options.add_running(parser)


def run(args: argparse.Namespace) -> None:
    require("PIL", "tqdm")
    with ranks.together():
        device = options.usable_device(args.device)
        finished = load_run(args.run)
    loading = {"skip_corrupt": args.skip_corrupt, "classes": finished.classes}
    test_set, skipped = ranks.from_first(load_split, args.data, "test", **loading)
    check_same_classes(test_set.classes, finished.classes, args.data, args.run)
    if test_set.multi_label != finished.multi_label:
        kinds = ("one label an image", "several")
        expected, found = kinds[finished.multi_label], kinds[test_set.multi_label]
        raise DataError(f"{args.data}: expected {expected} as {args.run} has learnt, found {found}")
    metrics = inference.evaluate(
        finished.model,
        test_set,
        finished.crop,
        batch_size=args.batch_size,
        workers=args.workers,
        device=device,
        precision=args.precision,
    )
    options.report_skipped(skipped)
    if args.json:
        print(json.dumps({**metrics, "images": len(test_set.images)}))
        return
    print(
        f"top-1 {metrics['top1']:.4f}, top-5 {metrics['top5']:.4f}, "
        f"loss {metrics['eval_loss']:.4f} on {len(test_set.images)} images"
    )
