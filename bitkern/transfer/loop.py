"""The training loop of BiT transfer, and evaluation and prediction with its transforms.

All randomness is a function of (seed, step, example): data order, crops, flips and MixUp do not
depend on the number of loader workers or processes, and a resumed run continues bit for bit.

In several processes (torchrun) each computes its part of every micro-batch and the gradients are
summed once a step, after the backward pass of weight standardization.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bitkern.standardized import standardized
from bitkern.transfer import ranks, runs
from bitkern.transfer.data import ImageSet
from bitkern.transfer.hyperrule import HyperRule
from bitkern.transfer.loader import eval_batches, plan, to_input, train_batches
from bitkern.transfer.mixup import cross_entropy, mixup, mixup_loss

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TrainingError(RuntimeError):
    """Training cannot go on: the loss is not finite."""


class TrainResult(NamedTuple):
    """What :func:`train` returns.

    ``metrics`` is the last evaluation (see :func:`evaluate`; None without ``eval_set``);
    ``history`` the lines of metrics.jsonl: ``{"step", "loss", "lr"}`` for each optimizer step and
    ``{"step", "top1", "top5", "eval_loss"}`` for each evaluation, where step counts finished
    steps; ``seconds`` the wall time, evaluations and earlier parts of a resumed run included.
    """

    metrics: dict | None
    history: list[dict]
    seconds: float


def train(
    model: nn.Module,
    train_set: ImageSet,
    rule: HyperRule,
    *,
    eval_set: ImageSet | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    batch_split: int = 1,
    weight_decay: float = 0.0,
    flip: bool = True,
    eval_every: int | None = None,
    checkpoint_every: int | None = None,
    workers: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    progress: bool = True,
) -> TrainResult:
    """Train ``model`` in place by the BiT-HyperRule: SGD with momentum 0.9 on its trainable part.

    ``model`` maps (N, 3, crop, crop) in [-1, 1] to logits (N, classes); it is moved to ``device``,
    in channels_last on a GPU, and computes in ``precision`` ("fp32", or "bf16" by autocast). Each
    batch is taken in ``batch_split`` micro-batches, whose gradients add up to those of the mean
    over the batch. ``flip`` mirrors half the images: turn it off for digits and letters.

    ``eval_every`` and ``checkpoint_every`` are steps, by default a tenth of the run; the last step
    is always included. ``out`` is the folder of metrics.jsonl and last.pt; without it nothing is
    written. ``resume`` continues from last.pt with the bits of an uninterrupted run. Ctrl-C
    finishes the step, writes last.pt and raises ``KeyboardInterrupt``. A run that fails before its
    first checkpoint leaves no file behind.

    With a process group of torch.distributed (one that serves CPU tensors too) all its processes
    make the call. They start from the first one's model, share each batch and the evaluations, and
    get the same results, equal to those of a single process but for the rounding of sums; the first
    writes the files.

    Raises ``ValueError`` for bad arguments, :class:`TrainingError` when the loss is not finite,
    :class:`~bitkern.transfer.ranks.RankError` when another process fails.
    """
    if not len(train_set.images):
        raise ValueError("train_set: expected images, got none")
    rank, world_size = ranks.rank(), ranks.world_size()
    most = rule.batch_size // world_size
    if not most:
        raise ValueError(
            f"batch_size: expected {world_size} or more, an image for each process, "
            f"got {rule.batch_size}"
        )
    if not 1 <= batch_split <= most:
        limit = "the batch size" if world_size == 1 else "the batch size of each process"
        raise ValueError(f"batch_split: expected 1 to {most}, {limit}, got {batch_split}")
    for name, every in (("eval_every", eval_every), ("checkpoint_every", checkpoint_every)):
        if every is not None and every < 1:
            raise ValueError(f"{name}: expected a positive number of steps, got {every}")
    _check_precision(precision)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: expected trainable parameters, found none")
    out = None if out is None else Path(out)
    if out is not None:
        ranks.from_first(runs.check_out, out, resume)
    elif resume:
        raise ValueError("resume: expected out, the folder of the run to continue")

    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=weight_decay)
    settings = {
        **dataclasses.asdict(rule),
        "seed": seed,
        "batch_split": batch_split,
        "weight_decay": weight_decay,
        "flip": flip,
        "training images": len(train_set.images),
        "classes": list(train_set.classes),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable parameters": sum(p.numel() for p in parameters),
    }
    done = {"step": 0, "seconds": 0.0, "journal": 0}
    with ranks.together():
        to_device(model, device)
        if resume:
            done = runs.load_checkpoint(out, model, optimizer, settings)
    ranks.copy_from_first(model.state_dict().values())

    out = out if rank == 0 else None
    with runs.open_journal(out, done["journal"]) as journal, _deferred_interrupt() as interrupted:
        from tqdm import tqdm

        journal.records = ranks.from_first(lambda: journal.records)
        began = time.perf_counter() - done["seconds"]
        loader = train_batches(
            train_set,
            rule,
            seed=seed,
            batch_split=batch_split,
            flip=flip,
            start=done["step"],
            rank=rank,
            world_size=world_size,
            workers=workers,
            device=device,
        )
        batches = iter(loader)
        steps = range(done["step"], rule.steps)
        progress = progress and rank == 0
        hide = None if progress else True  # None: hidden unless on a terminal
        bar = tqdm(steps, "training", rule.steps, initial=done["step"], disable=hide)
        for step in bar:
            lr = rule.lr(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            lam, parts = plan(rule, step, seed, batch_split, rank, world_size)
            model.train()
            with ranks.together(), standardized(model):
                loss = _accumulate(model, batches, parts, lam, rule.batch_size, device, precision)
            (loss,) = ranks.total(loss)
            _check_finite(loss, "loss", step, rule)
            ranks.add_up(p.grad for p in parameters if p.grad is not None)
            optimizer.step()
            optimizer.zero_grad()
            journal.add(step=step + 1, loss=loss, lr=lr)
            bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2g}")

            if eval_set is not None and _is_due(step + 1, eval_every, rule.steps):
                metrics = evaluate(
                    model,
                    eval_set,
                    rule.crop,
                    batch_size=math.ceil(rule.batch_size / (batch_split * world_size)),
                    workers=workers,
                    device=device,
                    precision=precision,
                )
                _check_finite(metrics["eval_loss"], "evaluation loss", step, rule)
                journal.add(step=step + 1, **metrics)
                if progress:
                    bar.write(f"step {step + 1}: top-1 {metrics['top1']:.4f}")
            (stop,) = ranks.total(interrupted.is_set())
            if stop or _is_due(step + 1, checkpoint_every, rule.steps):
                with ranks.together():
                    if out:
                        seconds = time.perf_counter() - began
                        done = {"step": step + 1, "seconds": seconds, "journal": journal.size()}
                        runs.save_checkpoint(out, model, optimizer, settings, done)
            if stop:
                raise KeyboardInterrupt
        evaluated = [record for record in journal.records if "top1" in record]
        metrics = {k: v for k, v in evaluated[-1].items() if k != "step"} if evaluated else None
        return TrainResult(metrics, journal.records, time.perf_counter() - began)


def _accumulate(model, batches, parts, lam, batch_size, device, precision) -> float:
    """Add the gradients of a step's micro-batches; what they add to the mean loss over the batch.

    Of each micro-batch this process computes its part, the first ``own`` images that it loads.
    """
    total = 0.0
    for part in parts:
        images, labels = next(batches)
        x, y = to_input(images, device), labels.to(device)
        own = slice(part.own)
        with _autocast(device, precision):
            if lam is None:
                loss = cross_entropy(model(x), y)
            else:
                x, y, y_perm = mixup(x, y, lam, torch.from_numpy(part.permutation))
                loss = mixup_loss(model(x[own]), y[own], y_perm[own], lam)
        share = part.own / batch_size
        (share * loss).backward()
        total += share * loss.detach()
    return total.item()


def evaluate(
    model: nn.Module,
    eval_set: ImageSet,
    crop: int,
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> dict:
    """``{"top1", "top5", "eval_loss"}`` of ``model`` on ``eval_set``, resized to (crop, crop).

    The accuracies are fractions (with fewer than five classes, "top5" is among all of them), the
    loss the mean cross-entropy. The model is moved to ``device``. The processes of a group all make
    the call, share the set, and get the same result.
    """
    count = len(eval_set.images)
    part = eval_set.subset(np.arange(ranks.rank(), count, ranks.world_size()))
    sums = 0.0, 0.0, 0.0
    with ranks.together():
        if len(part.images) or not count:  # none at all are an error, that of predict
            outputs = predict(
                model,
                part,
                crop,
                batch_size=batch_size,
                workers=workers,
                device=device,
                precision=precision,
            )
            labels = torch.from_numpy(part.labels)
            right = outputs.topk(min(5, outputs.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(outputs.double(), labels, reduction="sum")
            sums = right[:, 0].sum().item(), right.sum().item(), loss.item()
    top1, top5, loss = ranks.total(*sums)
    return {"top1": top1 / count, "top5": top5 / count, "eval_loss": loss / count}


def predict(
    model: nn.Module,
    images: ImageSet,
    crop: int,
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> torch.Tensor:
    """The logits (N, classes) of ``images`` resized to (crop, crop): fp32, on the CPU."""
    if not len(images.images):
        raise ValueError("images: expected at least one, got none")
    _check_precision(precision)
    to_device(model, device).eval()
    batches = eval_batches(images, crop, batch_size=batch_size, workers=workers, device=device)
    with torch.inference_mode(), _autocast(device, precision):
        return torch.cat([model(to_input(x, device)).float().cpu() for x, _ in batches])


def to_device(model: nn.Module, device) -> nn.Module:
    """Move ``model`` to ``device``, in channels_last on a GPU."""
    on_gpu = torch.device(device).type == "cuda"
    return model.to(device, memory_format=torch.channels_last if on_gpu else None)


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected {' or '.join(PRECISIONS)}, got {precision!r}")


def _autocast(device, precision: str):
    kind = torch.device(device).type
    return torch.autocast(kind, PRECISIONS[precision], enabled=precision != "fp32")


def _check_finite(loss: float, name: str, step: int, rule: HyperRule) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the {name} is {loss} at step {step + 1}: lower the learning rate "
            f"(base_lr is {rule.base_lr})"
        )


def _is_due(step: int, every: int | None, steps: int) -> bool:
    return step == steps or step % (every or max(1, steps // 10)) == 0


@contextlib.contextmanager
def _deferred_interrupt():
    """An event that the first Ctrl-C sets instead of raising; the second raises as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return

    def handle(number, frame):
        event.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
