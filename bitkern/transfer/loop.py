"""The training loop, of any recipe: its learning rate, loss, transforms and MixUp are its own.

All randomness is a function of (seed, step, example): data order, crops, flips and MixUp do not
depend on the number of loader workers or processes, and a resumed run continues bit for bit.

In several processes (torchrun) each computes its part of every micro-batch and the gradients are
summed once a step, while the backward pass of the last micro-batch goes on.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitkern.transfer import ranks
from bitkern.transfer.compute import Compute, require
from bitkern.transfer.data.images import ImageSet
from bitkern.transfer.data.opening import Reading
from bitkern.transfer.fit import Due
from bitkern.transfer.recipes import Recipe
from bitkern.transfer.report import check_report
from bitkern.transfer.run import REPORT, Record, check_out
from bitkern.transfer.selection import Selection
from bitkern.transfer.setup import Setup
from bitkern.transfer.training import Training, TrainResult


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
    setup = Setup(model, train_set, rule, compute, seed, first_split, balance, flip, decoder)
    folder = None if out is None else Path(out)
    _check_out(folder, resume, eval_set, model, about or {})
    training = Training(
        setup,
        Reading.of(cache, decoder, skip_corrupt, check),
        eval_set,
        selection,
        folder,
        Due(rule.steps, eval_every, checkpoint_every),
        progress and ranks.rank() == 0,
        dict(about or {}),
    )
    resumed = training.restore(resume, precision == "auto", batch_split == "auto")
    training.open_images()
    trial, auto = None, batch_split == "auto" and not resumed
    if auto or progress:
        trial = training.fit_memory(auto)
    return training.run(resume, trial, on_record)


def _check_out(
    folder: Path | None,
    resume: bool,
    eval_set: ImageSet | None,
    model: nn.Module,
    about: Mapping[str, Any],
) -> None:
    """Raise before the training what else would be raised when its results are written."""
    if folder is None:
        if resume:
            raise ValueError("resume: expected out, the folder of the run to continue")
        return
    require("matplotlib", "tqdm")
    ranks.from_first(check_out, folder, resume)
    if eval_set is not None:
        ranks.from_first(check_report, folder / REPORT)
    for name, value in about.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise type(error)(f"about: expected what JSON can hold, got {name}: {error}") from None
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"model: expected tensors in its state, got {name}: {type(value)}")


def _like(train_set: ImageSet, data: ImageSet, name: str) -> ImageSet:
    """A set to evaluate, with labels as those to train on."""
    require("sklearn")
    if train_set.multi_label:
        return data.as_multi_label()
    if data.multi_label:
        raise ValueError(f"{name}: expected one label an image as train_set has, got several")
    return data
