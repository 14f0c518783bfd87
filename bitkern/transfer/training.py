"""``train``: check the arguments, then run the stages of a training.

The recipe decides on the learning rate, loss, transforms and MixUp. All randomness is a function of
(seed, step, example): data order, crops, flips and MixUp do not depend on the number of loader
workers or processes, and a resumed run continues bit for bit.

With several processes (torchrun) each computes its part of every micro-batch, and gradients are
all-reduced once a step, during the backward pass of the last micro-batch.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitkern.packages import require
from bitkern.transfer import checks, ranks
from bitkern.transfer.curves import Record
from bitkern.transfer.data.images import ImageSet
from bitkern.transfer.data.open_images import ImageReadOptions
from bitkern.transfer.device_config import DeviceConfig
from bitkern.transfer.recipes import Recipe
from bitkern.transfer.report import check_report
from bitkern.transfer.run import REPORT, check_out
from bitkern.transfer.selection import Selection
from bitkern.transfer.train_setup import TrainSetup
from bitkern.transfer.trainer import Trainer, TrainResult


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
    """Train ``model`` in place by a recipe: SGD with momentum 0.9 on its trainable parameters.

    ``model`` maps (N, 3, crop, crop) in [-1, 1] to logits (N, classes); it is moved to ``device``,
    in channels_last, and computes in ``precision``: "fp32", "bf16" or "fp16" by autocast, the last
    with loss scaling, or "auto", which is ``default_precision``, or that of the run that is
    resumed. Each batch is split into ``batch_split`` micro-batches, whose gradients add up to those
    of the mean over the batch; "auto" finds the smallest number that fits into memory, or takes
    that of the run that is resumed. ``balance`` is "sample" to draw all classes equally often,
    "loss" to weight each by its rarity: see ``bitkern.transfer.balance``. Multi-label sets
    (``ImageSet``) are trained with sigmoids. ``flip`` mirrors half the images: turn it off for
    digits and letters. ``cuda_graph`` is "on" to replay steps and evaluations as CUDA graphs, on
    one GPU, for a model that does the same in every step; "auto" is "off" until it has been
    measured on a GPU.

    ``workers`` threads load images, 0 for the caller's alone; all cores read them before the
    training. ``cache`` is "ram" to decode each image once and keep it, resized, in memory that the
    processes of a machine share, "disk" in a file that later runs use too, "off" to decode at every
    use, "auto" for whichever there is room for, which is printed. ``decoder`` is "pillow" or
    "torchvision", whose pixels differ. ``check`` reads all images before the training; None does so
    for sets of up to 100 000. Larger sets are cached only on "ram" or "disk"; where crops are cut
    out of whole images (``Pretraining``), only the evaluation images are. With ``skip_corrupt`` the
    next image of the set takes the place of one that cannot be read, and evaluations leave it out.
    Of these only the decoder changes the result.

    ``eval_every`` and ``checkpoint_every`` are steps, by default a tenth of the run; the last step
    is always included. ``out`` is the folder of metrics.jsonl and last.pt, and in the end of
    model.safetensors, curves.png, with ``eval_set`` the files of ``write_report``, and
    summary.json, which begins with ``about``; without it nothing is written. ``resume`` continues
    from last.pt, bit for bit as if the run had not been interrupted. Ctrl-C finishes the
    micro-batch (with several processes, and where the model has buffers, the step), writes last.pt
    and raises ``KeyboardInterrupt``; a second one raises it at once. A run that fails before its
    first checkpoint leaves no file behind. ``on_record`` is called by the first process with each
    line of metrics.jsonl as it is written; a run that was killed may repeat its last ones. With
    ``selection`` another set is evaluated during the training, to keep the best model and to stop
    early; ``metrics`` are then those of ``eval_set`` at the end.

    With a process group of torch.distributed (one that serves CPU tensors too) all its processes
    make the call. They start from rank 0's model, share each batch and the evaluations, and get the
    same results, equal to those of a single process except for the rounding of sums; rank 0 writes
    the files.

    Raises ``ValueError`` for bad arguments, ``DataError`` for an image that cannot be read,
    ``TrainingError`` when the loss is not finite (``model`` is then spoilt, last.pt is not),
    ``RankError`` when another process fails.
    """
    for name, every in (("eval_every", eval_every), ("checkpoint_every", checkpoint_every)):
        checks.check(every is None or every >= 1, name, "a positive number of steps", every)
    config = DeviceConfig.create(device, precision, workers, cuda_graph)
    if rule.sigmoid:
        train_set = train_set.as_multi_label()
    if eval_set is not None:
        eval_set = _match_labels(train_set, eval_set, "eval_set")
    if selection:
        val_set = _match_labels(train_set, selection.val_set, "val_set")
        selection = dataclasses.replace(selection, val_set=val_set)
        eval_set = val_set if eval_set is None else eval_set
    first_split = 1 if batch_split == "auto" else batch_split
    setup = TrainSetup(
        model,
        train_set,
        rule,
        config,
        seed,
        first_split,
        balance,
        flip,
        ImageReadOptions(cache, decoder, skip_corrupt, check),
        eval_set,
        selection,
        None if out is None else Path(out),
        eval_every,
        checkpoint_every,
        progress and ranks.rank() == 0,
        dict(about or {}),
    )
    _check_out(setup, resume)
    trainer = Trainer(setup)
    resumed = trainer.restore(resume, precision == "auto", batch_split == "auto")
    trainer.open_images()
    auto = batch_split == "auto" and not resumed
    trial = trainer.fit_memory(auto) if auto or progress else None
    return trainer.run(resume, trial, on_record)


def _check_out(setup: TrainSetup, resume: bool) -> None:
    """Raise now the errors that would stop the results from being written."""
    if setup.folder is None:
        if resume:
            raise ValueError("resume: expected out, the folder of the run to continue")
        return
    require("matplotlib", "tqdm")
    ranks.run_on_rank0(check_out, setup.folder, resume)
    if setup.eval_set is not None:
        ranks.run_on_rank0(check_report, setup.folder / REPORT)
    for name, value in setup.about.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise type(error)(f"about: expected JSON values, got {name}: {error}") from None
    for name, value in setup.model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"model: expected tensors in its state, got {name}: {type(value)}")


def _match_labels(train_set: ImageSet, data: ImageSet, name: str) -> ImageSet:
    """Return an evaluation set with labels of the same kind as the training set's."""
    require("sklearn")
    if train_set.multi_label:
        return data.as_multi_label()
    if data.multi_label:
        raise ValueError(f"{name}: expected one label per image as train_set has, got several")
    return data
