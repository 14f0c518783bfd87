"""``bitkern evaluate``: the accuracy of a run's model."""

import argparse
import json
from pathlib import Path

import torch

from bitkern.cli import options
from bitkern.transfer import ranks
from bitkern.transfer.compute import Compute, require
from bitkern.transfer.data import DataError, check_same_classes, load_split
from bitkern.transfer.data.opening import Reading, open_resized
from bitkern.transfer.finished import load_run
from bitkern.transfer.inference import gathered, metrics_of, predict_share
from bitkern.transfer.report import check_report, write_report
from bitkern.transfer.watching import in_words

DISTRIBUTED = True
EXAMPLES = """\
example:
  bitkern evaluate runs/mine --data DATA --report again/report.html
"""


def add(commands: "argparse._SubParsersAction[options.Parser]") -> None:
    help = "measure the accuracy of a run's model on test images"
    parser = commands.add_parser("evaluate", help=help, description=f"{help}.", epilog=EXAMPLES)
    parser.add_argument("run", help="the folder of a run, or its model.safetensors")
    options.add_data(parser, "DIR/test/CLASS/*.jpg, or columns image, and label or labels")
    help = "images computed at a time (default: 64)"
    parser.group("speed and memory")("--batch-size", type=options.positive, default=64, help=help)
    options.add_running(parser)
    options.add_cache(parser, "resized images on disk (default: auto, those that are there)")
    output = parser.group("output")
    output("--json", action="store_true", help="print the numbers as JSON")
    help = "write a page, report.json and predictions.csv beside it"
    output("--report", metavar="PATH.html", help=help)


def run(args: argparse.Namespace) -> None:
    require("PIL", "sklearn", "tqdm")
    page = None if args.report is None else Path(args.report)
    if page:
        ranks.from_first(check_report, page)
    with ranks.together():
        device = options.usable_device(args.device)
        compute = Compute.of(device, args.precision, args.workers)
        finished = load_run(args.run)
    test_set = ranks.from_first_of_host(load_split, args.data, "test", finished.classes, flat=True)
    check_same_classes(test_set.classes, finished.classes, args.data, args.run)
    if finished.multi_label:
        test_set = test_set.as_multi_label()
    elif test_set.multi_label:
        raise DataError(
            f"{args.data}: expected one label an image as {args.run} has learnt, found several"
        )
    reading = Reading.of(args.cache, finished.decoder, args.skip_corrupt)
    resized = open_resized(test_set.images, finished.crop, reading, again=False)
    parts = resized, test_set, args.batch_size, args.skip_corrupt
    share = predict_share(compute, finished.model, *parts)
    metrics = metrics_of(share, test_set)
    skipped = len(test_set.images) - share.readable
    options.report_skipped(skipped)
    if page:
        outputs, evaluated = gathered(share, test_set)
        about = {"run": args.run, "data": args.data, "skipped_images": skipped}
        about |= {"precision": compute.precision, "device": device, "torch": torch.__version__}
        about["training"] = finished.summary
        history = [record for record in finished.history if "run" not in record]  # of a demo
        with ranks.together():
            if ranks.rank() == 0:
                write_report(page, outputs, evaluated, history=history, about=about)
    if args.json:
        print(json.dumps({**metrics, "images": share.readable}))
        return
    top5 = f", top-5 {100 * metrics['top5']:.1f} %" if len(finished.classes) > 5 else ""
    loss = metrics["eval_loss"]
    print(f"{in_words(metrics)}{top5}, loss {loss:.3g} on {share.readable} images")
    if page:
        print(f"open {page}")
