"""The training loop, of any recipe: its learning rate, loss, transforms and MixUp are its own.

All randomness is a function of (seed, step, example): data order, crops, flips and MixUp do not
depend on the number of loader workers or processes, and a resumed run continues bit for bit.

In several processes (torchrun) each computes its part of every micro-batch and the gradients are
summed once a step, while the backward pass of the last micro-batch goes on.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bitkern.transfer import ranks
from bitkern.transfer.compute import Compute, require
from bitkern.transfer.data.images import ImageSet, notes
from bitkern.transfer.data.loader import TrainBatches, kept_on, open_for
from bitkern.transfer.data.opening import Reading, open_resized
from bitkern.transfer.data.resized import Resized, check_classes
from bitkern.transfer.fit import Due, Fit, corrupt_everywhere
from bitkern.transfer.inference import gathered, metrics_of
from bitkern.transfer.recipes import Recipe
from bitkern.transfer.reduction import Reduction
from bitkern.transfer.report import check_report, write_report
from bitkern.transfer.run import (
    REPORT,
    Progress,
    Record,
    Run,
    check_out,
    load_checkpoint,
    read_checkpoint,
)
from bitkern.transfer.selection import Kept, Selection
from bitkern.transfer.setup import Setup
from bitkern.transfer.watching import Display, Stopped, deferred_interrupt


class TrainResult(NamedTuple):
    """What ``train`` returns.

    ``metrics`` is the last evaluation (see ``evaluate``; None without ``eval_set``);
    ``history`` the lines of metrics.jsonl: ``{"step", "loss", "lr"}`` for each optimizer step and
    ``{"step", "top1", "top5", "eval_loss", …}`` for each evaluation, where step counts finished
    steps; ``seconds`` the wall time, evaluations and earlier parts of a resumed run included;
    ``skipped`` the number of images that could not be read, where not all were, of those that were
    met.
    """

    metrics: dict[str, float] | None
    history: list[Record]
    seconds: float
    skipped: int


def train(
    model: nn.Module,
    train_set: ImageSet,
    rule: Recipe,
    *,
    eval_set: ImageSet | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int = 0,
    batch_split: int | Literal["auto"] = 1,
    balance: str = "none",
    flip: bool = True,
    eval_every: int | None = None,
    checkpoint_every: int | None = None,
    workers: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    cuda_graph: str = "auto",
    cache: str = "auto",
    decoder: str = "pillow",
    skip_corrupt: bool = False,
    check: bool | None = None,
    progress: bool = True,
    on_record: Callable[[Record], object] | None = None,
    selection: Selection | None = None,
    about: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train ``model`` in place by a recipe: SGD with momentum 0.9 on its trainable part.

    ``model`` maps (N, 3, crop, crop) in [-1, 1] to logits (N, classes); it is moved to ``device``,
    in channels_last, and computes in ``precision``: "fp32", "bf16" or "fp16" by autocast, the last
    with its loss scaled, or "auto", which is ``default_precision``, or what the run began with
    on resuming. Each batch is taken in ``batch_split`` micro-batches, whose gradients add up to
    those of the mean over the batch; "auto" is the smallest number for which the memory of the
    device suffices, found by trying, or the one that the run began with. ``balance`` is "sample" to
    draw all classes equally often, "loss" to weigh each by its rarity: see
    ``bitkern.transfer.balance``. Images of several labels (``ImageSet``) are learnt by
    sigmoids. ``flip`` mirrors half the images: turn it off for digits and letters. ``cuda_graph``
    is "on" to replay steps and evaluations as CUDA graphs, on one GPU, for a model that does the
    same in every step; "auto" is "off" until it has been measured on a GPU.

    ``workers`` threads load images, 0 for none but the caller's; all cores read them before.
    ``cache`` is "ram" to decode each image once and keep it, resized, in memory that the processes
    of a machine share, "disk" in a file that later runs find too, "off" to decode at every use,
    "auto" for what there is room for, which it says. ``decoder`` is "pillow" or "torchvision",
    whose pixels differ. ``check`` has all images read before the training, None those of sets of up
    to 100 000; other sets are kept only on "ram" or "disk", and where crops are cut out of whole
    images (``Pretraining``) those to evaluate alone. With ``skip_corrupt`` the next image of
    the set takes the place of one that cannot be read, and evaluations leave it out. None of these
    but the decoder changes a bit of the result.

    ``eval_every`` and ``checkpoint_every`` are steps, by default a tenth of the run; the last step
    is always included. ``out`` is the folder of metrics.jsonl and last.pt, and in the end of
    model.safetensors, curves.png, with ``eval_set`` the files of ``write_report``, and
    summary.json, which begins with ``about``; without it nothing is written. ``resume`` continues
    from last.pt with the bits of an uninterrupted run. Ctrl-C finishes the micro-batch (in
    several processes, and where the model has buffers, the step), writes last.pt and raises
    ``KeyboardInterrupt``; a second one raises it at once. A run that fails before its first
    checkpoint leaves no file behind. ``on_record`` is called by the first process with each line
    of metrics.jsonl as it is written; a run that was killed may repeat its last ones. With
    ``selection`` another set is evaluated while it trains, by which the best model may be kept and
    the training end early; ``metrics`` are then those of ``eval_set`` at the end.

    With a process group of torch.distributed (one that serves CPU tensors too) all its processes
    make the call. They start from the first one's model, share each batch and the evaluations, and
    get the same results, equal to those of a single process but for the rounding of sums; the first
    writes the files.

    Raises ``ValueError`` for bad arguments, ``DataError`` for an image that
    cannot be read, ``TrainingError`` when the loss is not finite
    (``model`` is spoilt then, last.pt is not), ``RankError`` when
    another process fails.
    """
    rank, world_size, said = ranks.rank(), ranks.world_size(), dict(about or {})
    for name, every in (("eval_every", eval_every), ("checkpoint_every", checkpoint_every)):
        if every is not None and every < 1:
            raise ValueError(f"{name}: expected a positive number of steps, got {every}")
    compute = Compute.of(device, precision, workers, cuda_graph)
    if rule.sigmoid:
        train_set = train_set.as_multi_label()
    if eval_set is not None:
        eval_set = _like(train_set, eval_set, "eval_set")
    if selection:
        val_set = _like(train_set, selection.val_set, "val_set")
        selection = dataclasses.replace(selection, val_set=val_set)
        eval_set = val_set if eval_set is None else eval_set
    first_split = 1 if batch_split == "auto" else batch_split
    options = seed, first_split, balance, flip, decoder
    setup = Setup(model, train_set, rule, compute, *options)
    reading = Reading.of(cache, decoder, skip_corrupt, check)
    shown = progress and rank == 0
    folder = None if out is None else Path(out)
    if folder is not None:
        require("matplotlib", "tqdm")
        ranks.from_first(check_out, folder, resume)
        if eval_set is not None:
            ranks.from_first(check_report, folder / REPORT)
        _check_can_be_written(model, said)
    elif resume:
        raise ValueError("resume: expected out, the folder of the run to continue")

    optimizer, done = setup.optimizer(), Progress()
    with ranks.together():
        checkpoint = read_checkpoint(folder) if folder and resume else None
        if checkpoint and precision == "auto":
            compute = compute._replace(precision=checkpoint["settings"]["precision"])
            setup = dataclasses.replace(setup, compute=compute)
        compute.place(model)
        reduction = Reduction(model)
    scaler = compute.scaler()
    kept = Kept(model)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler, "kept": kept}
    chosen = selection.settings if selection else {"keep": "last"}
    if folder and checkpoint:
        if batch_split == "auto":
            setup = dataclasses.replace(setup, batch_split=checkpoint["settings"]["batch_split"])
        with ranks.together():
            done = load_checkpoint(folder, checkpoint, state, setup.settings | chosen)
            said = checkpoint["about"]
    if done.corrupt and not skip_corrupt:
        raise ValueError("the run goes on without images that it could not read: skip_corrupt=True")
    train_images = _told(open_for(rule, train_set.images, reading), train_set, "training", shown)
    for i in done.corrupt:  # so that others go on in their place, even if they can be read by now
        train_images.corrupt.setdefault(i, f"{train_set.images[i]}: could not be read before")
    evaluation = test = None
    if eval_set is not None:
        opened = open_resized(eval_set.images, rule.crop, reading)
        evaluation = test = _told(opened, eval_set, "evaluation", shown), eval_set
    if selection and selection.val_set is not eval_set:
        opened = open_resized(selection.val_set.images, rule.crop, reading)
        val_set = selection.val_set
        evaluation = _told(opened, val_set, "validation", shown), val_set
    with ranks.together():
        on_device = kept_on(compute.device, train_images)
    # Before the memory is tried: with its first message NCCL takes its buffers.
    ranks.copy_from_first(model.state_dict().values())
    trial, auto = None, batch_split == "auto" and not checkpoint
    if auto or progress:
        setup, trial = setup.fitted(optimizer, scaler, reduction, auto)
    del checkpoint

    split = "validation" if selection else said.get("evaluated_on", "test")
    run = Run(folder if rank == 0 else None, state, setup.settings | chosen, said, done)
    with contextlib.ExitStack() as stack:
        with ranks.together():
            journal = stack.enter_context(run.recording(resume, on_record))
        journal.records = ranks.from_first(lambda: journal.records)
        display = stack.enter_context(
            contextlib.closing(Display(done.step, rule.steps, split, shown, done.seconds))
        )
        fit = Fit(
            setup,
            run,
            display,
            stack.enter_context(deferred_interrupt(shown)),
            train_images,
            evaluation,
            Due(rule.steps, eval_every, checkpoint_every),
            skip_corrupt,
            selection,
            kept,
        )
        if shown and trial:
            display.say(fit.estimate(trial))
        batches = TrainBatches(
            train_set,
            train_images,
            setup.schedule,
            compute,
            flip=flip,
            skip_corrupt=skip_corrupt,
            start=done.step,
            on_device=on_device,
        )
        loading = stack.enter_context(contextlib.closing(iter(batches)))
        share = fit.steps(setup.stepper(optimizer, scaler, reduction, loading, fit.between))
        skipped = len(corrupt_everywhere(train_images))
        outcome = metrics = None
        if selection and selection.keep == "best":
            kept.put_back()
        if test:
            if share is None or selection:  # or stopped between its last step and its end
                try:
                    share = fit.predict(*test)
                except Stopped:
                    raise KeyboardInterrupt from None
            skipped += len(test[1].images) - share.readable
            metrics = metrics_of(share, test[1])
            outcome = gathered(share, test[1]) if folder else None
        result = TrainResult(metrics, journal.records, fit.seconds, skipped)
        with ranks.together():
            summary = {
                **said,
                **(result.metrics or {}),
                "steps": fit.step,
                **(selection.about(journal.records) if selection else {}),
                "seconds": round(result.seconds, 1),
                "classes": len(train_set.classes),
                "training_images": len(train_set.images),
                "multi_label": train_set.multi_label,
                "evaluation_images": share.readable if share else 0,
                "skipped_images": skipped,
                **({"images": [*notes]} if notes else {}),
                "rule": dataclasses.asdict(rule),
                **setup.options,
                "cuda_graph": compute.cuda_graph,
                "device": str(device),
                "processes": world_size,
                "torch": torch.__version__,
            }
            metadata = {"classes": list(train_set.classes), "crop": rule.crop}
            metadata |= {"multi_label": train_set.multi_label, "decoder": decoder}
            run.save_results(**metadata)
            if run.out and outcome:
                known = {"seconds", *(result.metrics or {})}  # and the report's are its own
                settings = {name: value for name, value in summary.items() if name not in known}
                page, history = run.out / REPORT, journal.records
                write_report(page, *outcome, history=history, about=settings)
            run.finish(summary)
    return result


def _check_can_be_written(model: nn.Module, about: Mapping[str, Any]) -> None:
    """Raise before the training what else would be raised after it."""
    for name, value in about.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise type(error)(f"about: expected what JSON can hold, got {name}: {error}") from None
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"model: expected tensors in its state, got {name}: {type(value)}")


def _told(images: Resized, data: ImageSet, name: str, shown: bool) -> Resized:
    """The images that were opened, of which a user is told how."""
    with ranks.together():
        check_classes(data, images)
    if shown:
        print(f"image cache, {name}: {images.cache}")
    return images


def _like(train_set: ImageSet, data: ImageSet, name: str) -> ImageSet:
    """A set to evaluate, with labels as those to train on."""
    require("sklearn")
    if train_set.multi_label:
        return data.as_multi_label()
    if data.multi_label:
        raise ValueError(f"{name}: expected one label an image as train_set has, got several")
    return data
