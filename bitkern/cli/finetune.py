"""The command line: finetune, evaluate, predict, demo, info."""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from bitkern.models import create_model
from bitkern.models.checkpoints import read_metadata
from bitkern.transfer import data, ranks, runs, trainer
from bitkern.transfer.hyperrule import HyperRule, hyperrule


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, None if ranks.rank() else f"bitkern: error: {message}\n")


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def _not_negative(text):
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0 or a positive whole number, got {text!r}")
    return int(text)


def _require(*modules):
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"{module} is not installed: pip install 'bitkern[train]'")


def _device(name):
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if ranks.world_size() > 1:
        if name not in ("cpu", "cuda"):
            raise ValueError(f"--device: expected cpu or cuda in several processes, got {name}")
        if name == "cuda":  # torchrun gives each process a GPU of its own
            name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the second from a torch without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name}: cannot be used here ({reason})") from None
    if name.startswith("cuda"):
        torch.cuda.set_device(name)
    return name


def _precision(name, device):
    if name is not None:
        return name
    on_gpu = torch.device(device).type == "cuda"
    native = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def _load_split(args, split):
    """The images of "train" or "test", and the number of corrupt ones skipped."""
    if args.data == "digits":
        _require("sklearn")
        return data.digits(split), 0
    return data.image_folder(args.data, split, skip_corrupt=args.skip_corrupt)


def _load_data(args):
    """(training set, evaluation set, what the latter is, number of corrupt images skipped)."""
    train_set, skipped = _load_split(args, "train")
    if args.holdout is not None:
        split = "holdout"
        train_set, eval_set = data.hold_out(train_set, args.holdout, args.seed)
    else:
        split = "test"
        eval_set, more = _load_split(args, split)
        skipped += more
        names = f"{args.data}/test", f"{args.data}/train"
        data.check_same_classes(eval_set.classes, train_set.classes, *names)
    if args.shots is not None:
        train_set = data.few_shot(train_set, args.shots, args.seed)
    return train_set, eval_set, split, skipped


def _rule(args, train_set):
    """The HyperRule of the data set, with the values given on the command line in place."""
    rule = hyperrule(len(train_set.images), data.image_size(train_set))
    if args.steps is not None:
        rule = rule.with_steps(args.steps)
    names = [field.name for field in dataclasses.fields(HyperRule) if field.name != "steps"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "decay_steps" in given:
        given["decay_steps"] = tuple(given["decay_steps"])
    return dataclasses.replace(rule, **given)


def _report_skipped(skipped):
    if skipped and ranks.rank() == 0:
        print(f"skipped {skipped} corrupt image{'s' * (skipped > 1)}", file=sys.stderr)


def finetune(args):
    _require("PIL", "matplotlib", "tqdm")
    out = Path(args.out)
    ranks.from_first(runs.check_out, out, args.resume)
    with ranks.together():
        device = _device(args.device)
        precision = _precision(args.precision, device)
        torch.manual_seed(args.seed)
        model = create_model(args.model, weights=None if args.resume else args.weights)
    train_set, eval_set, split, skipped = ranks.from_first(_load_data, args)
    rule = ranks.from_first(_rule, args, train_set)
    # Also in place of a head of as many classes: they need not be the same ones.
    model.reset_classifier(len(train_set.classes))
    if args.freeze:
        model.freeze_backbone()
    _report_skipped(skipped)
    print(
        f"{args.model} from {args.weights or 'random weights'}: {len(train_set.images)} training "
        f"images of {len(train_set.classes)} classes, {len(eval_set.images)} {split} images"
    )
    print(f"{rule}, {precision} on {device}")
    result = trainer.train(
        model,
        train_set,
        rule,
        eval_set=eval_set,
        out=out,
        resume=args.resume,
        seed=args.seed,
        batch_split=args.batch_split,
        flip=not args.no_flip,
        eval_every=args.eval_every,
        checkpoint_every=args.checkpoint_every,
        workers=args.workers,
        device=device,
        precision=precision,
    )
    summary = {
        "model": args.model,
        "weights": args.weights,
        "data": args.data,
        "evaluated_on": split,
        "top1": result.metrics["top1"],
        "top5": result.metrics["top5"],
        "eval_loss": result.metrics["eval_loss"],
        "steps": rule.steps,
        "seconds": round(result.seconds, 1),
        "classes": len(train_set.classes),
        "training_images": len(train_set.images),
        "evaluation_images": len(eval_set.images),
        "skipped_images": skipped,
        "rule": dataclasses.asdict(rule),
        "seed": args.seed,
        "shots": args.shots,
        "batch_split": args.batch_split,
        "flip": not args.no_flip,
        "freeze": args.freeze,
        "device": device,
        "processes": ranks.world_size(),
        "precision": precision,
        "torch": torch.__version__,
    }
    metadata = {"classes": list(train_set.classes), "crop": rule.crop}
    ranks.from_first(runs.write_results, out, model, result.history, summary, **metadata)
    print(f"top-1 {summary['top1']:.4f} on {split}; results in {out}")


def _load_run(path):
    """The model of a run's folder or of its model.safetensors, its class names and crop."""
    path = Path(path)
    if path.is_dir():
        if not (path / runs.WEIGHTS).exists() and (path / runs.CHECKPOINT).exists():
            raise ValueError(f"{path}: the run is not finished; continue it with --resume")
        path = path / runs.WEIGHTS
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected the folder of a run, or its {runs.WEIGHTS}")
    metadata = read_metadata(path)
    if not {"model", "classes", "crop"} <= metadata.keys():
        raise ValueError(f"{path}: holds no class names; expected a file of bitkern finetune")
    classes = tuple(metadata["classes"])
    model = create_model(metadata["model"], weights=path)
    if model.num_classes != len(classes):
        raise ValueError(f"{path}: names {len(classes)} classes, its head has {model.num_classes}")
    return model, classes, metadata["crop"]


def evaluate(args):
    _require("PIL", "tqdm")
    with ranks.together():
        device = _device(args.device)
        model, classes, crop = _load_run(args.run)
    test_set, skipped = ranks.from_first(_load_split, args, "test")
    data.check_same_classes(test_set.classes, classes, args.data, args.run)
    metrics = trainer.evaluate(
        model,
        test_set,
        crop,
        batch_size=args.batch_size,
        workers=args.workers,
        device=device,
        precision=_precision(args.precision, device),
    )
    _report_skipped(skipped)
    if args.json:
        print(json.dumps({**metrics, "images": len(test_set.images)}))
        return
    print(
        f"top-1 {metrics['top1']:.4f}, top-5 {metrics['top5']:.4f}, "
        f"loss {metrics['eval_loss']:.4f} on {len(test_set.images)} images"
    )


def _images_of(paths):
    """The files named and those in the folders named."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            images = data.find_images(path)
            if not images:
                raise ValueError(f"{path}: holds no images")
            found += images
        elif path.exists():
            found.append(str(path))
        else:
            raise ValueError(f"{path}: no such file or folder")
    return found


def predict(args):
    _require("PIL", "tqdm")
    device = _device(args.device)
    model, classes, crop = _load_run(args.run)
    images = _images_of(args.images)
    corrupt = data.unreadable(images, skip=args.skip_corrupt)
    images = [image for image in images if image not in corrupt]
    unlabelled = data.ImageSet(images, np.zeros(len(images), np.int64), classes)
    logits = trainer.predict(
        model,
        unlabelled,
        crop,
        batch_size=args.batch_size,
        workers=args.workers,
        device=device,
        precision=_precision(args.precision, device),
    )
    best = logits.softmax(1).topk(min(args.top_k, len(classes)))
    predictions = [
        [{"class": classes[i], "probability": p} for p, i in zip(*row, strict=True)]
        for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    _report_skipped(len(corrupt))
    if args.json:
        rows = zip(images, predictions, strict=True)
        print(json.dumps([{"image": image, "predictions": top} for image, top in rows], indent=2))
        return
    for image, top in zip(images, predictions, strict=True):
        print(f"{image}:", ", ".join("{class} {probability:.4f}".format(**p) for p in top))


def info(args):
    from bitkern.info import collect, report

    print(json.dumps(collect(), indent=2) if args.json else report())


def demo(args):
    from bitkern.demo import run

    run(args)


def _add_running(parser):
    """The options of every command that runs a model."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    parser.add_argument(
        "--precision",
        choices=list(trainer.PRECISIONS),
        help="default: bf16 on a GPU that has it, else fp32",
    )
    parser.add_argument(
        "--workers",
        type=_not_negative,
        default=min(8, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
        help="processes that load images; results do not depend on it (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-corrupt", action="store_true", help="leave out images that cannot be read"
    )


def _add_finetune(commands):
    parser = commands.add_parser("finetune", help="transfer a BiT to a folder of images")
    parser.set_defaults(command=finetune)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR|digits", help="DIR/train/CLASS/*.jpg and DIR/test/…")
    add("--model", required=True, help="such as BiT-M-R50x1")
    add("--weights", metavar="FILE", help="checkpoint to start from; its head is replaced")
    add("--out", required=True, metavar="DIR", help="where the results go")
    add("--resume", action="store_true", help="continue the unfinished run in --out")
    add("--seed", type=_not_negative, default=0)
    add("--shots", type=_positive, help="train on this many images of each class")
    add("--holdout", type=float, metavar="FRACTION", help="evaluate on part of train, not on test")
    add("--freeze", action="store_true", help="train the head alone")
    add("--no-flip", action="store_true", help="no mirroring, for digits and letters")
    add("--batch-split", type=_positive, default=1, help="micro-batches per step, to save memory")
    add("--eval-every", type=_positive, metavar="STEPS", help="default: a tenth of the run")
    add("--checkpoint-every", type=_positive, metavar="STEPS", help="default: a tenth of the run")
    _add_running(parser)
    rule = parser.add_argument_group("in place of the value of the HyperRule")
    rule.add_argument("--steps", type=_positive, help="stretches warm-up and decays with it")
    rule.add_argument("--warmup-steps", type=_not_negative)
    rule.add_argument("--decay-steps", type=_not_negative, nargs="*", metavar="STEP")
    rule.add_argument("--base-lr", type=float)
    rule.add_argument("--batch-size", type=_positive, help="the learning rate stays as it is")
    rule.add_argument("--mixup-alpha", type=float)
    rule.add_argument("--resize", type=_positive, metavar="PIXELS")
    rule.add_argument("--crop", type=_positive, metavar="PIXELS")


def _add_evaluate(commands):
    parser = commands.add_parser("evaluate", help="accuracy of a run's model on DIR/test")
    parser.set_defaults(command=evaluate)
    parser.add_argument("run", help="the folder of a run, or its model.safetensors")
    parser.add_argument("--data", required=True, metavar="DIR|digits")
    parser.add_argument("--batch-size", type=_positive, default=64)
    parser.add_argument("--json", action="store_true")
    _add_running(parser)


def _add_predict(commands):
    parser = commands.add_parser("predict", help="the most probable classes of images")
    parser.set_defaults(command=predict)
    parser.add_argument("run", help="the folder of a run, or its model.safetensors")
    parser.add_argument("images", nargs="+", metavar="image", help="image files or folders")
    parser.add_argument("--top-k", type=_positive, default=5)
    parser.add_argument("--batch-size", type=_positive, default=64)
    parser.add_argument("--json", action="store_true")
    _add_running(parser)


def _parser():
    parser = Parser(prog="bitkern", description="Big Transfer: fine-tune BiT on your own images.")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_finetune(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    show = commands.add_parser("demo", help="Big Transfer in miniature: letters to digits")
    show.set_defaults(command=demo)
    show.add_argument("--out", default="runs/demo", metavar="DIR")
    show.add_argument("--seed", type=_not_negative, default=0)
    show.add_argument("--letters", type=_positive, help="training letters to render")
    show = commands.add_parser("info", help="versions, devices, and what serves each operator")
    show.set_defaults(command=info)
    show.add_argument("--json", action="store_true")
    return parser


def _run(argv) -> int:
    args = _parser().parse_args(argv)
    try:
        if ranks.world_size() > 1 and args.command not in (finetune, evaluate):
            raise ValueError("torchrun: expected finetune or evaluate, the rest is for one process")
        args.command(args)
    except KeyboardInterrupt:
        code, message = 130, "interrupted; finetune continues with --resume"
    except torch.OutOfMemoryError:
        code, message = 2, "error: out of GPU memory: raise --batch-split or lower --batch-size"
    except (ValueError, OSError, trainer.TrainingError, ranks.RankError) as error:
        code, message = 2, f"error: {' '.join(str(error).split())}"
    else:
        return 0
    if ranks.rank() == 0:
        print(f"bitkern: {message}", file=sys.stderr)
    return code


def main(argv=None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's error, 130 for Ctrl-C.

    Of several processes, as torchrun starts them, the first speaks for all.
    """
    with ranks.launched():
        silent = ranks.rank() > 0
        with contextlib.redirect_stdout(None) if silent else contextlib.nullcontext():
            return _run(argv)
