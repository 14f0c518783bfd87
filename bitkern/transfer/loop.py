"""The training loop, of any recipe: its learning rate, loss, transforms and MixUp are its own.

All randomness is a function of (seed, step, example): data order, crops, flips and MixUp do not
depend on the number of loader workers or processes, and a resumed run continues bit for bit.

In several processes (torchrun) each computes its part of every micro-batch and the gradients are
summed once a step, while the backward pass of the last micro-batch goes on.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bitkern.transfer import ranks
from bitkern.transfer.compute import Compute, require
from bitkern.transfer.data.images import ImageSet
from bitkern.transfer.data.loader import TrainBatches, kept_on, open_for
from bitkern.transfer.data.opening import Reading, open_resized
from bitkern.transfer.data.resized import Resized, check_classes
from bitkern.transfer.inference import gathered, metrics_of, predict_share
from bitkern.transfer.recipes import Recipe
from bitkern.transfer.reduction import Reduction
from bitkern.transfer.report import check_report, write_report
from bitkern.transfer.run import (
    REPORT,
    Journal,
    Progress,
    Record,
    Run,
    check_out,
    load_checkpoint,
    read_checkpoint,
)
from bitkern.transfer.setup import Setup, TrainingError
from bitkern.transfer.step import Later


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
    from last.pt with the bits of an uninterrupted run. Ctrl-C finishes the step, writes last.pt and
    raises ``KeyboardInterrupt``. A run that fails before its first checkpoint leaves no file
    behind. ``on_record`` is called by the first process with each line of metrics.jsonl as it is
    written; a run that was killed may repeat its last ones.

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
        require("sklearn")
        if train_set.multi_label:
            eval_set = eval_set.as_multi_label()
        elif eval_set.multi_label:
            raise ValueError("eval_set: expected one label an image as train_set has, got several")
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
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    if folder and checkpoint:
        if batch_split == "auto":
            setup = dataclasses.replace(setup, batch_split=checkpoint["settings"]["batch_split"])
        with ranks.together():
            done = load_checkpoint(folder, checkpoint, state, setup.settings)
            said = checkpoint["about"]
    if done.corrupt and not skip_corrupt:
        raise ValueError("the run goes on without images that it could not read: skip_corrupt=True")
    train_images = _told(open_for(rule, train_set.images, reading), train_set, "training", shown)
    for i in done.corrupt:  # so that others go on in their place, even if they can be read by now
        train_images.corrupt.setdefault(i, f"{train_set.images[i]}: could not be read before")
    evaluation = None
    if eval_set is not None:
        opened = open_resized(eval_set.images, rule.crop, reading)
        evaluation = _told(opened, eval_set, "evaluation", shown), eval_set
    with ranks.together():
        on_device = kept_on(compute.device, train_images)
    # Before the memory is tried: with its first message NCCL takes its buffers.
    ranks.copy_from_first(model.state_dict().values())
    if batch_split == "auto" and not checkpoint:
        setup = setup.fitted(optimizer, scaler, reduction)
        if shown:
            print(f"batch_split {setup.batch_split}, the smallest that fits on {compute.device}")
    del checkpoint

    run = Run(folder if rank == 0 else None, state, setup.settings, said, done)
    with contextlib.ExitStack() as stack:
        with ranks.together():
            journal = stack.enter_context(run.recording(resume, on_record))
        interrupted = stack.enter_context(_deferred_interrupt())
        journal.records = ranks.from_first(lambda: journal.records)
        began = time.perf_counter() - done.seconds
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
        take_step = setup.stepper(optimizer, scaler, reduction, loading)
        losses = _Losses(rule, journal)
        share = None
        for step, bar in _bar(done.step, rule.steps, shown):
            losses.add(step, take_step(step, rule.lr(step)), bar)
            if evaluation and _is_due(step + 1, eval_every, rule.steps):
                losses.read()
                share = predict_share(compute, model, *evaluation, setup.micro_batch, skip_corrupt)
                metrics = metrics_of(share, evaluation[1])
                _check_finite(metrics["eval_loss"], "evaluation loss", step, rule)
                journal.add(step=step + 1, **metrics)
                if progress:
                    bar.write(f"step {step + 1}: top-1 {metrics['top1']:.4f}")
            (stop,) = ranks.sums_of(interrupted.is_set())
            if stop or _is_due(step + 1, checkpoint_every, rule.steps):
                losses.read()  # so that no checkpoint holds a step that diverged
                corrupt = _corrupt(train_images)
                with ranks.together():
                    seconds = time.perf_counter() - began
                    run.save(Progress(step + 1, seconds, corrupt=corrupt))
            if stop:
                raise KeyboardInterrupt
        skipped = len(_corrupt(train_images))
        outcome = None
        if evaluation:
            if share is None:  # a run that was stopped between its last step and its end
                share = predict_share(compute, model, *evaluation, setup.micro_batch, skip_corrupt)
            skipped += len(evaluation[1].images) - share.readable
            outcome = gathered(share, evaluation[1]) if folder else None
        result = _result(journal.records, time.perf_counter() - began, skipped)
        with ranks.together():
            summary = {
                **said,
                **(result.metrics or {}),
                "steps": rule.steps,
                "seconds": round(result.seconds, 1),
                "classes": len(train_set.classes),
                "training_images": len(train_set.images),
                "multi_label": train_set.multi_label,
                "evaluation_images": share.readable if share else 0,
                "skipped_images": skipped,
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


@dataclasses.dataclass
class _Losses:
    """The losses of the steps, each read when the device has the next step to do."""

    rule: Recipe
    journal: Journal
    unread: tuple[int, Later, Any] | None = None

    def add(self, step: int, loss: Tensor, bar: Any) -> None:
        """Read the loss of the step before; this one will be shown on the bar."""
        later = Later(loss)
        self.read()
        self.unread = step, later, bar

    def read(self) -> None:
        """Write down the loss that is unread, if any; TrainingError if it is not finite."""
        if self.unread is None:
            return
        step, later, bar = self.unread
        self.unread = None
        with ranks.together():
            own_loss = later.value()
        (loss,) = ranks.sums_of(own_loss)
        _check_finite(loss, "loss", step, self.rule)
        lr = self.rule.lr(step)
        self.journal.add(step=step + 1, loss=loss, lr=lr)
        bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2g}")


def _told(images: Resized, data: ImageSet, name: str, shown: bool) -> Resized:
    """The images that were opened, of which a user is told how."""
    with ranks.together():
        check_classes(data, images)
    if shown:
        print(f"cache of the {name} images: {images.cache}")
    return images


def _corrupt(images: Resized) -> tuple[int, ...]:
    """The images that some process could not read."""
    return tuple(sorted({i for corrupt in ranks.everyones([*images.corrupt]) for i in corrupt}))


def _result(records: list[Record], seconds: float, skipped: int) -> TrainResult:
    evaluated = [record for record in records if "top1" in record]
    metrics = {k: v for k, v in evaluated[-1].items() if k != "step"} if evaluated else None
    return TrainResult(metrics, records, seconds, skipped)


def _bar(start: int, steps: int, shown: bool) -> Iterator[tuple[int, Any]]:
    """The steps, each with the progress bar: hidden unless on a terminal."""
    from tqdm import tqdm

    bar = tqdm(range(start, steps), "training", steps, initial=start, disable=not shown or None)
    for step in bar:
        yield step, bar


def _check_finite(loss: float, name: str, step: int, rule: Recipe) -> None:
    if not math.isfinite(loss):
        base_lr = getattr(rule, "base_lr", None)
        now = f"{rule.lr(step):g}" if base_lr is None else f"base_lr is {base_lr:g}"
        raise TrainingError(
            f"the {name} is {loss} at step {step + 1}: lower the learning rate ({now})"
        )


def _is_due(step: int, every: int | None, steps: int) -> bool:
    return step == steps or step % (every or max(1, steps // 10)) == 0


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets instead of raising; the second raises as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return

    def handle(number: int, frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
