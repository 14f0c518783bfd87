"""Evaluation and prediction, with the transforms of BiT."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bitkern.transfer import ranks
from bitkern.transfer.compute import Compute, require
from bitkern.transfer.data.decoders import find_decoder
from bitkern.transfer.data.images import DataError, ImageSet
from bitkern.transfer.data.loader import eval_batches
from bitkern.transfer.data.opening import Reading, open_resized
from bitkern.transfer.data.resized import ADVICE, Resized
from bitkern.transfer.graphs import Batch, Graphed
from bitkern.transfer.recipes.mixup import cross_entropy


def evaluate(
    model: nn.Module,
    eval_set: ImageSet,
    crop: int,
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    cuda_graph: str = "auto",
    cache: str = "auto",
    decoder: str = "pillow",
    skip_corrupt: bool = False,
) -> dict[str, float]:
    """``{"top1", "top5", "eval_loss", …}`` of ``model`` on ``eval_set``, resized to (crop, crop).

    The accuracies are fractions (with fewer than five classes, "top5" is among all of them),
    "balanced_accuracy" and "macro_f1" the means of recall and F1 over the classes that occur, the
    loss the mean cross-entropy. Where an image may have several labels, it counts as right if the
    surest class, or one of five, is one of them ("top1" is then the precision at 1); the loss is
    that of sigmoids, summed over classes; and "mean_average_precision" is that over the classes
    that occur, if any.

    The model is moved to ``device``, in channels_last, and computes in ``precision``, batches as
    CUDA graphs with ``cuda_graph``; ``workers``, ``cache`` and ``decoder`` are as in ``train``,
    but that the cache "auto" is one that is on disk already, or none. Images that cannot be read
    are left out with ``skip_corrupt``. The processes of a group all make the call, share the set,
    and get the same result.

    Raises ValueError for an empty set or a bad argument, ``DataError`` for an image that
    cannot be read.
    """
    compute = Compute.of(device, precision, workers, cuda_graph)
    require("sklearn")
    reading = Reading.of(cache, decoder, skip_corrupt)
    resized = open_resized(eval_set.images, crop, reading, again=False)
    share = predict_share(compute, model, resized, eval_set, batch_size, skip_corrupt)
    return metrics_of(share, eval_set)


class Share(NamedTuple):
    """What a process computed of a set: the images it could read, int64 (M,), and their logits.

    ``readable`` is the number of images of the set that could be read, by all processes together.
    """

    rows: npt.NDArray[np.int64]
    logits: Tensor
    readable: int


def predict_share(
    compute: Compute,
    model: nn.Module,
    resized: Resized,
    data: ImageSet,
    batch_size: int,
    skip_corrupt: bool,
    on_batch: Callable[[], object] = lambda: None,
) -> Share:
    """This process's share of a set, for ``metrics_of`` and ``gathered``.

    ``on_batch`` is called after each batch, and may break off by an exception.
    """
    if not len(data.images):
        raise ValueError("images: expected at least one, got none")
    with ranks.together():
        rows = np.arange(ranks.rank(), len(data.images), ranks.world_size())
        outputs, read, first = [], np.ones(len(rows), np.bool_), 0
        for logits, unreadable in predict_batches(compute, model, resized, rows, batch_size):
            for place, error in unreadable.items():
                if not skip_corrupt:
                    raise DataError(f"{error}: {ADVICE}")
                read[first + place] = False
            first += len(logits) + len(unreadable)
            outputs += [logits] if len(logits) else []
            on_batch()
        empty = torch.empty(0, len(data.classes))
        logits = torch.cat(outputs) if outputs else empty
    (readable,) = ranks.sums_of(len(logits))
    if not readable:
        raise DataError(f"{data.images[0]}: nor can any other image be read; replace them")
    return Share(rows[read], logits, int(readable))


def metrics_of(share: Share, data: ImageSet) -> dict[str, float]:
    """The metrics of ``evaluate``, from all shares of a set's logits."""
    with ranks.together():
        logits, labels = share.logits, torch.from_numpy(data.labels_of(share.rows))
        counts = _counts(logits, labels, data.multi_label)
        best = logits.topk(min(5, logits.shape[1])).indices
        right = labels.gather(1, best) if data.multi_label else best == labels[:, None]
        loss = cross_entropy(logits.double(), labels).item() * len(labels) if len(labels) else 0.0
        sums = right[:, 0].sum().item(), right.any(1).sum().item(), loss
    top1, top5, total_loss = (total / share.readable for total in ranks.sums_of(*sums))
    metrics = {"top1": top1, "top5": top5, "eval_loss": total_loss}
    ranks.add_up([counts])
    found, support, named = counts[:, counts[1] > 0]
    if len(support):  # not so if an image may be without labels
        metrics["balanced_accuracy"] = (found / support).mean().item()
        metrics["macro_f1"] = (2 * found / (support + named)).mean().item()
    if data.multi_label and math.isfinite(total_loss):
        metrics |= _mean_average_precision(share, data)
    return metrics


def _counts(logits: Tensor, labels: Tensor, multi_label: bool) -> Tensor:
    """Count for each class the images found, those that have it and those called so: (3, C)."""
    classes = logits.shape[1]
    if multi_label:
        named = logits >= 0
        counts = [(named & labels).sum(0), labels.sum(0), named.sum(0)]
    else:
        predicted = logits.argmax(1)
        each = predicted[predicted == labels], labels, predicted
        counts = [torch.bincount(classes_of, minlength=classes) for classes_of in each]
    return torch.stack(counts).double()


def _mean_average_precision(share: Share, data: ImageSet) -> dict[str, float]:
    """Over the classes that occur, of which each process takes some; none where none does."""
    from sklearn.metrics import average_precision_score

    logits, found = gathered(share, data)
    truth = found.labels_of(slice(None))
    occur = np.flatnonzero(truth.any(0))
    if not len(occur):
        return {}
    with ranks.together():
        chances = logits.sigmoid().numpy()
        own = occur[ranks.rank() :: ranks.world_size()]
        sum_of_own = sum(average_precision_score(truth[:, c], chances[:, c]) for c in own)
    (total,) = ranks.sums_of(sum_of_own)
    return {"mean_average_precision": total / len(occur)}


def gathered(share: Share, data: ImageSet) -> tuple[Tensor, ImageSet]:
    """From all processes' shares the logits (N, classes) of the images that could be read.

    And these images, in all processes.
    """
    whole = torch.zeros(len(data.images), share.logits.shape[1])
    read = torch.zeros(len(data.images))
    whole[share.rows], read[share.rows] = share.logits, 1.0
    ranks.add_up([whole, read])
    rows = read.nonzero()[:, 0]
    return (whole, data) if len(rows) == len(read) else (whole[rows], data.subset(rows.numpy()))


def predict(
    model: nn.Module,
    images: ImageSet,
    crop: int,
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    cuda_graph: str = "auto",
    decoder: str = "pillow",
) -> Tensor:
    """The logits (N, classes) of ``images`` resized to (crop, crop): fp32, on the CPU.

    How to run it as in ``evaluate``. Raises ValueError without images, DataError for one that
    cannot be read.
    """
    if not len(images.images):
        raise ValueError("images: expected at least one, got none")
    compute = Compute.of(device, precision, workers, cuda_graph)
    resized = Resized(images.images, crop, find_decoder(decoder))
    rows = np.arange(len(resized))
    outputs = []
    for logits, unreadable in predict_batches(compute, model, resized, rows, batch_size):
        for error in unreadable.values():
            raise error
        outputs.append(logits)
    return torch.cat(outputs)


def predict_batches(
    compute: Compute,
    model: nn.Module,
    resized: Resized,
    rows: Sequence[int] | npt.NDArray[np.int64],
    batch_size: int,
) -> Iterator[tuple[Tensor, dict[int, DataError]]]:
    """Of each batch the logits fp32 (N, classes), on the CPU, and what is wrong with the rest.

    The batches are those of ``eval_batches``; images that cannot be read have no logits.
    """
    compute.place(model)
    model.eval()

    def logits(batches: Iterable[Batch]) -> Tensor:
        ((x,),) = batches
        result: Tensor = model(compute.to_input(x)).float()
        return result

    run = Graphed(logits, compute.device) if compute.cuda_graph else logits
    for x, unreadable in eval_batches(resized, rows, compute, batch_size=batch_size):
        outputs = torch.empty(0, 0)
        if len(x):
            with torch.inference_mode(), compute.autocast():
                # A copy also on the CPU: the next batch may overwrite the result.
                outputs = run([(x,)]).to("cpu", copy=True)
        yield outputs, unreadable
