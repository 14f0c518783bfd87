"""Evaluation and prediction, with the transforms of BiT."""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitkern.transfer import ranks
from bitkern.transfer.compute import Compute
from bitkern.transfer.data.images import ImageSet
from bitkern.transfer.data.loader import eval_batches
from bitkern.transfer.graphs import Batch, Graphed


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
    loss the mean cross-entropy. The model is moved to ``device``, in channels_last, and computes in
    ``precision``, batches as CUDA graphs with ``cuda_graph``: see :func:`train`. The processes of a
    group all make the call, share the set, and get the same result.

    Raises ValueError for an empty set or a bad argument.
    """
    compute = Compute.of(device, precision, workers, cuda_graph)
    return evaluate_on(compute, model, eval_set, crop, batch_size)


def evaluate_on(
    compute: Compute, model: nn.Module, eval_set: ImageSet, crop: int, batch_size: int
) -> dict[str, float]:
    """:func:`evaluate`, its way to run being given."""
    count = len(eval_set.images)
    part = eval_set.subset(np.arange(ranks.rank(), count, ranks.world_size()))
    sums = 0.0, 0.0, 0.0
    with ranks.together():
        if len(part.images) or not count:  # none at all are an error, that of predict
            outputs = _predict_on(compute, model, part, crop, batch_size)
            labels = torch.from_numpy(part.labels)
            right = outputs.topk(min(5, outputs.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(outputs.double(), labels, reduction="sum")
            sums = right[:, 0].sum().item(), right.sum().item(), loss.item()
    top1, top5, total_loss = ranks.sums_of(*sums)
    return {"top1": top1 / count, "top5": top5 / count, "eval_loss": total_loss / count}


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

    How to run it as in :func:`evaluate`. Raises ValueError without images.
    """
    compute = Compute.of(device, precision, workers, cuda_graph)
    return _predict_on(compute, model, images, crop, batch_size)


def _predict_on(
    compute: Compute, model: nn.Module, images: ImageSet, crop: int, batch_size: int
) -> Tensor:
    if not len(images.images):
        raise ValueError("images: expected at least one, got none")
    compute.place(model)
    model.eval()
    batches = eval_batches(images, crop, compute, batch_size=batch_size)

    def logits(batches: Iterable[Batch]) -> Tensor:
        ((x,),) = batches
        result: Tensor = model(compute.to_input(x)).float()
        return result

    run = Graphed(logits, compute.device) if compute.cuda_graph else logits
    with torch.inference_mode(), compute.autocast():
        # A copy also on the CPU: the next batch may overwrite the result.
        return torch.cat([run([(x,)]).to("cpu", copy=True) for x, _ in batches])
