"""Evaluation and prediction, with the transforms of BiT."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bitkern.transfer import ranks
from bitkern.transfer.compute import Compute
from bitkern.transfer.data.images import DataError, ImageSet, Source
from bitkern.transfer.data.loader import eval_batches
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
) -> dict[str, float]:
    """``{"top1", "top5", "eval_loss"}`` of ``model`` on ``eval_set``, resized to (crop, crop).

    The accuracies are fractions (with fewer than five classes, "top5" is among all of them), the
    loss the mean cross-entropy. Where an image may have several labels, it counts as right if the
    surest class, or one of five, is one of them; the loss is that of sigmoids, summed over classes.
    The model is moved to ``device``, in channels_last, and computes in ``precision``, batches as
    CUDA graphs with ``cuda_graph``: see :func:`train`. The processes of a group all make the call,
    share the set, and get the same result.

    Raises ValueError for an empty set or a bad argument.
    """
    compute = Compute.of(device, precision, workers, cuda_graph)
    share = predict_share(compute, model, eval_set, crop, batch_size)
    return metrics_of(share, eval_set)


def _rows(count: int) -> npt.NDArray[np.intp]:
    """The images of a set that this process computes."""
    return np.arange(ranks.rank(), count, ranks.world_size())


def predict_share(
    compute: Compute, model: nn.Module, data: ImageSet, crop: int, batch_size: int
) -> Tensor:
    """The logits of this process's share of a set, for :func:`metrics_of` and :func:`gathered`."""
    if not len(data.images):
        raise ValueError("images: expected at least one, got none")
    with ranks.together():
        images = [data.images[i] for i in _rows(len(data.images))]
        if not images:
            return torch.empty(0, len(data.classes))
        return _predict_on(compute, model, images, crop, batch_size)


def metrics_of(share: Tensor, data: ImageSet) -> dict[str, float]:
    """The metrics of :func:`evaluate`, from all shares of a set's logits."""
    count = len(data.images)
    with ranks.together():
        labels = torch.from_numpy(data.labels[_rows(count)])
        best = share.topk(min(5, share.shape[1])).indices
        right = labels.gather(1, best) if data.multi_label else best == labels[:, None]
        loss = cross_entropy(share.double(), labels).item() * len(share) if len(share) else 0.0
        sums = right[:, 0].sum().item(), right.any(1).sum().item(), loss
    top1, top5, total_loss = ranks.sums_of(*sums)
    return {"top1": top1 / count, "top5": top5 / count, "eval_loss": total_loss / count}


def gathered(share: Tensor, count: int) -> Tensor:
    """The logits (count, classes) of a whole set, from all processes' shares, in all of them."""
    whole = torch.zeros(count, share.shape[1])
    whole[_rows(count)] = share
    ranks.add_up([whole])
    return whole


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
) -> Tensor:
    """The logits (N, classes) of ``images`` resized to (crop, crop): fp32, on the CPU.

    How to run it as in :func:`evaluate`. Raises ValueError without images, DataError for one that
    cannot be read.
    """
    compute = Compute.of(device, precision, workers, cuda_graph)
    return _predict_on(compute, model, images.images, crop, batch_size)


def _predict_on(
    compute: Compute, model: nn.Module, images: Sequence[Source], crop: int, batch_size: int
) -> Tensor:
    if not len(images):
        raise ValueError("images: expected at least one, got none")
    outputs = []
    for logits, unreadable in predict_batches(compute, model, images, crop, batch_size):
        for error in unreadable.values():
            raise error
        outputs.append(logits)
    return torch.cat(outputs)


def predict_batches(
    compute: Compute, model: nn.Module, images: Sequence[Source], crop: int, batch_size: int
) -> Iterator[tuple[Tensor, dict[int, DataError]]]:
    """Of each batch the logits fp32 (N, classes), on the CPU, and what is wrong with the rest.

    The batches are those of :func:`eval_batches`; images that cannot be read have no logits.
    """
    compute.place(model)
    model.eval()

    def logits(batches: Iterable[Batch]) -> Tensor:
        ((x,),) = batches
        result: Tensor = model(compute.to_input(x)).float()
        return result

    run = Graphed(logits, compute.device) if compute.cuda_graph else logits
    for x, unreadable in eval_batches(images, crop, compute, batch_size=batch_size):
        outputs = torch.empty(0, 0)
        if len(x):
            with torch.inference_mode(), compute.autocast():
                # A copy also on the CPU: the next batch may overwrite the result.
                outputs = run([(x,)]).to("cpu", copy=True)
        yield outputs, unreadable
