"""``bitkern evaluate``: the accuracy of a run's model."""

import argparse
import json
from pathlib import Path

import torch

from bitkern.cli import options
from bitkern.packages import require
from bitkern.text import format_metrics
from bitkern.transfer import DataError, check_report, load_run, ranks, write_report
from bitkern.transfer.data import ImageReadOptions, check_same_classes, load_split, open_resized
from bitkern.transfer.device_config import DeviceConfig
from bitkern.transfer.inference import predict_on_rank

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
    help = "images per batch (default: 64)"
    parser.group("speed and memory")("--batch-size", type=options.positive, default=64, help=help)
    options.add_device_options(parser)
    options.add_cache(parser, "cache of resized images (default: auto, used if it exists)")
    output = parser.group("output")
    output("--json", action="store_true", help="print the numbers as JSON")
    help = "write a page, report.json and predictions.csv beside it"
    output("--report", metavar="PATH.html", help=help)


def run(args: argparse.Namespace) -> None:
    require("PIL", "sklearn", "tqdm")
    page = None if args.report is None else Path(args.report)
    if page:
        ranks.run_on_rank0(check_report, page)
    with ranks.propagate_errors():
        device = options.usable_device(args.device)
        config = DeviceConfig.create(device, args.precision, args.workers)
        finished = load_run(args.run)
    test_set = ranks.run_on_local_rank0(load_split, args.data, "test", finished.classes, flat=True)
    check_same_classes(test_set.classes, finished.classes, args.data, args.run)
    if finished.multi_label:
        test_set = test_set.as_multi_label()
    elif test_set.multi_label:
        raise DataError(
            f"{args.data}: expected one label per image as {args.run} has learnt, found several"
        )
    read_options = ImageReadOptions(args.cache, finished.decoder, args.skip_corrupt)
    resized = open_resized(test_set.images, finished.crop, read_options, reused=False)
    parts = config, finished.model, resized, test_set, args.batch_size
    predictions = predict_on_rank(*parts, args.skip_corrupt)
    metrics = predictions.metrics()
    skipped = len(test_set.images) - predictions.readable
    options.report_skipped(skipped)
    if page:
        evaluated = predictions.gather()
        about = {"run": args.run, "data": args.data, "skipped_images": skipped}
        about |= {"precision": config.precision, "device": device, "torch": torch.__version__}
        about["training"] = finished.summary
        history = [record for record in finished.history if "run" not in record]  # a demo's has
        ranks.run_on_rank0(write_report, page, *evaluated, history=history, about=about)
    if args.json:
        print(json.dumps({**metrics, "images": predictions.readable}))
        return
    top5 = f", top-5 {100 * metrics['top5']:.1f} %" if len(finished.classes) > 5 else ""
    loss = metrics["eval_loss"]
    print(f"{format_metrics(metrics)}{top5}, loss {loss:.3g} on {predictions.readable} images")
    if page:
        print(f"open {page}")
