"""Evaluation and prediction, with the transforms of BiT."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bitkern.packages import require
from bitkern.transfer import ranks
from bitkern.transfer.cuda_graphs import Batch, CudaGraphRunner
from bitkern.transfer.data.decoders import find_decoder
from bitkern.transfer.data.images import DataError, ImageSet
from bitkern.transfer.data.loader import eval_batches
from bitkern.transfer.data.open_images import ImageReadOptions, open_resized
from bitkern.transfer.data.resized import ADVICE, ResizedImages
from bitkern.transfer.device_config import DeviceConfig
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
    """Compute ``{"top1", "top5", "eval_loss", …}`` of ``model`` on a set resized to (crop, crop).

    The accuracies are fractions (with fewer than five classes, "top5" is among all of them),
    "balanced_accuracy" and "macro_f1" the means of recall and F1 over the classes that occur, the
    loss the mean cross-entropy. For a multi-label set an image counts as right if the most probable
    class, or one of five, is one of its labels ("top1" is then the precision at 1); the loss is
    that of sigmoids, summed over classes; and "mean_average_precision" is the mean over the classes
    that occur, if any.

    The model is moved to ``device``, in channels_last, and computes in ``precision``, batches as
    CUDA graphs with ``cuda_graph``; ``workers``, ``cache`` and ``decoder`` are as in ``train``,
    except that the cache "auto" uses an existing file or none. Images that cannot be read are left
    out with ``skip_corrupt``. All processes of a group make the call, share the set, and get the
    same result.

    Raises ValueError for an empty set or a bad argument, ``DataError`` for an image that
    cannot be read.
    """
    config = DeviceConfig.create(device, precision, workers, cuda_graph)
    require("sklearn")
    options = ImageReadOptions(cache, decoder, skip_corrupt)
    resized = open_resized(eval_set.images, crop, options, reused=False)
    return predict_on_rank(config, model, resized, eval_set, batch_size, skip_corrupt).metrics()


class RankPredictions(NamedTuple):
    """The logits that this process computed for a set, which it shares with the other processes.

    ``rows`` int64 (M,) are the images that it could read, ``logits`` (M, classes) theirs;
    ``readable`` is the number of readable images over all processes.
    """

    data: ImageSet
    rows: npt.NDArray[np.int64]
    logits: Tensor
    readable: int

    def metrics(self) -> dict[str, float]:
        """Compute the metrics of ``evaluate`` over all processes."""
        data = self.data
        with ranks.propagate_errors():
            logits, labels = self.logits, torch.from_numpy(data.labels_of(self.rows))
            counts = _class_counts(logits, labels, data.multi_label)
            best = logits.topk(min(5, logits.shape[1])).indices
            right = labels.gather(1, best) if data.multi_label else best == labels[:, None]
            loss = (
                cross_entropy(logits.double(), labels).item() * len(labels) if len(labels) else 0.0
            )
            sums = right[:, 0].sum().item(), right.any(1).sum().item(), loss
        top1, top5, mean_loss = (total / self.readable for total in ranks.all_reduce_sum(*sums))
        metrics = {"top1": top1, "top5": top5, "eval_loss": mean_loss}
        ranks.all_reduce_tensors([counts])
        true_positives, support, predicted = counts[:, counts[1] > 0]
        if len(support):  # multi-label images may have no labels
            metrics["balanced_accuracy"] = (true_positives / support).mean().item()
            metrics["macro_f1"] = (2 * true_positives / (support + predicted)).mean().item()
        if data.multi_label and math.isfinite(mean_loss):
            metrics |= self._mean_average_precision()
        return metrics

    def _mean_average_precision(self) -> dict[str, float]:
        """Compute it over the classes that occur, divided among the processes; {} if none does."""
        from sklearn.metrics import average_precision_score

        logits, data = self.gather()
        truth = data.labels_of(slice(None))
        occurring = np.flatnonzero(truth.any(0))
        if not len(occurring):
            return {}
        with ranks.propagate_errors():
            chances = logits.sigmoid().numpy()
            own = occurring[ranks.rank() :: ranks.world_size()]
            own_sum = sum(average_precision_score(truth[:, c], chances[:, c]) for c in own)
        (total,) = ranks.all_reduce_sum(own_sum)
        return {"mean_average_precision": total / len(occurring)}

    def gather(self) -> tuple[Tensor, ImageSet]:
        """Gather the logits (N, classes) of all readable images, and these images."""
        data = self.data
        logits = torch.zeros(len(data.images), self.logits.shape[1])
        read = torch.zeros(len(data.images))
        logits[self.rows], read[self.rows] = self.logits, 1.0
        ranks.all_reduce_tensors([logits, read])
        rows = read.nonzero()[:, 0]
        return (
            (logits, data) if len(rows) == len(read) else (logits[rows], data.subset(rows.numpy()))
        )


def predict_on_rank(
    config: DeviceConfig,
    model: nn.Module,
    resized: ResizedImages,
    data: ImageSet,
    batch_size: int,
    skip_corrupt: bool,
    on_batch: Callable[[], object] = lambda: None,
) -> RankPredictions:
    """Predict this process's share of a set.

    ``on_batch`` is called after each batch, and may raise an exception to stop.
    """
    if not len(data.images):
        raise ValueError("images: expected at least one, got none")
    with ranks.propagate_errors():
        rows = np.arange(ranks.rank(), len(data.images), ranks.world_size())
        outputs, read, first = [], np.ones(len(rows), np.bool_), 0
        for logits, unreadable in predict_batches(config, model, resized, rows, batch_size):
            for i, error in unreadable.items():
                if not skip_corrupt:
                    raise DataError(f"{error}: {ADVICE}")
                read[first + i] = False
            first += len(logits) + len(unreadable)
            outputs += [logits] if len(logits) else []
            on_batch()
        logits = torch.cat(outputs) if outputs else torch.empty(0, len(data.classes))
    (readable,) = ranks.all_reduce_sum(len(logits))
    if not readable:
        raise DataError(
            f"{data.images[0]}: cannot be read, and neither can any other image; replace them"
        )
    return RankPredictions(data, rows[read], logits, int(readable))


def _class_counts(logits: Tensor, labels: Tensor, multi_label: bool) -> Tensor:
    """Count true positives, labels and predictions of each class: float64 (3, C)."""
    classes = logits.shape[1]
    if multi_label:
        predicted = logits >= 0
        counts = [(predicted & labels).sum(0), labels.sum(0), predicted.sum(0)]
    else:
        predicted = logits.argmax(1)
        kinds = predicted[predicted == labels], labels, predicted
        counts = [torch.bincount(kind, minlength=classes) for kind in kinds]
    return torch.stack(counts).double()


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
    """Compute the logits (N, classes) of ``images`` resized to (crop, crop): fp32, on the CPU.

    The other arguments are as in ``evaluate``. Raises ValueError without images, ``DataError`` for
    one that cannot be read.
    """
    if not len(images.images):
        raise ValueError("images: expected at least one, got none")
    config = DeviceConfig.create(device, precision, workers, cuda_graph)
    outputs, resized = [], ResizedImages(images.images, crop, find_decoder(decoder))
    rows = range(len(resized))
    for logits, unreadable in predict_batches(config, model, resized, rows, batch_size):
        for error in unreadable.values():
            raise error
        outputs.append(logits)
    return torch.cat(outputs)


def predict_batches(
    config: DeviceConfig,
    model: nn.Module,
    resized: ResizedImages,
    rows: Sequence[int] | npt.NDArray[np.int64],
    batch_size: int,
) -> Iterator[tuple[Tensor, dict[int, DataError]]]:
    """Yield the fp32 logits (N, classes) of each batch, on the CPU, and the errors by place.

    The batches are those of ``eval_batches``; images that cannot be read have no logits.
    """
    config.place(model)
    model.eval()

    def logits(batches: Iterable[Batch]) -> Tensor:
        ((x,),) = batches
        result: Tensor = model(config.to_input(x)).float()
        return result

    run = CudaGraphRunner(logits, config.device) if config.cuda_graph else logits
    for x, unreadable in eval_batches(resized, rows, config, batch_size=batch_size):
        outputs = torch.empty(0, 0)
        if len(x):
            with torch.inference_mode(), config.autocast():
                # A copy also on the CPU: the next batch may overwrite the result.
                outputs = run([(x,)]).to("cpu", copy=True)
        yield outputs, unreadable
