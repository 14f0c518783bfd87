"""The predictions of a model for each image of a set, compared with the labels."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitkern.transfer.data.images import ImageSet
from bitkern.transfer.recipes.mixup import cross_entropy

Bools = npt.NDArray[np.bool_]
ROWS = 4096  # of logits converted to float64 at a time
THRESHOLD = 0.5  # least probability at which a class of a multi-label set is predicted


class Evaluation(NamedTuple):
    """Predictions for N images and C classes.

    ``truth`` and ``predicted`` bool (N, C): the labels, and the predicted classes, which are the
    most probable one or, for a multi-label set, those of probability 0.5 or more;
    ``probabilities`` fp32 (N, C); ``rank`` int64 (N,): the rank of the most probable label among
    the classes, 1 for the first, 0 for an image without labels; ``loss`` is the mean cross-entropy,
    for a multi-label set the binary one, summed over the classes.
    """

    truth: Bools
    predicted: Bools
    probabilities: npt.NDArray[np.float32]
    rank: npt.NDArray[np.int64]
    loss: float

    @property
    def exact_matches(self) -> Bools:
        """bool (N,): True if the predicted classes are the labels, all and no others."""
        equal: Bools = (self.truth == self.predicted).all(1)
        return equal


def evaluate_logits(outputs: Tensor, data: ImageSet) -> Evaluation:
    """Compare logits (N, C) with the labels of ``data``; the first of equal logits ranks first.

    Raises ValueError naming ``outputs`` or ``data`` and what is wrong with it.
    """
    truth = _truth(data)
    if tuple(outputs.shape) != truth.shape or not outputs.is_floating_point():
        raise ValueError(
            f"outputs: expected floating-point logits {truth.shape}, "
            f"got {outputs.dtype} {tuple(outputs.shape)}"
        )
    outputs = outputs.detach().float().cpu()
    broken = (~outputs.isfinite()).any(1).nonzero()
    if len(broken):
        first = int(broken[0])
        raise ValueError(f"outputs: expected finite logits, got NaN or infinity for image {first}")
    logits = outputs.numpy()
    if data.multi_label:
        chances, labels = outputs.sigmoid(), torch.from_numpy(truth)
        predicted = (chances >= THRESHOLD).numpy()
    else:
        chances = outputs.softmax(1)
        labels = torch.from_numpy(data.labels_of(slice(None)).astype(np.int64))
        predicted = np.zeros_like(truth)
        predicted[np.arange(len(logits)), logits.argmax(1)] = True
    parts = zip(torch.split(outputs, ROWS), torch.split(labels, ROWS), strict=True)
    losses = [cross_entropy(x.double(), y).item() * len(x) for x, y in parts]
    loss = sum(losses) / len(logits)
    return Evaluation(truth, predicted, chances.numpy(), _rank(logits, truth), loss)


def _truth(data: ImageSet) -> Bools:
    count, classes = len(data.images), len(data.classes)
    labels = data.labels_of(slice(None))
    if not count or not classes:
        raise ValueError(f"data: expected images of classes, got {count} of {classes}")
    if data.multi_label:
        if labels.shape != (count, classes) or labels.dtype != np.bool_:
            raise ValueError(
                f"data: expected bool labels {(count, classes)}, got {labels.dtype} {labels.shape}"
            )
        return labels.astype(np.bool_)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"data: expected integer labels {(count,)}, got {labels.dtype} {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"data: expected labels from 0 to {classes - 1}, got {labels.min()} to {labels.max()}"
        )
    truth = np.zeros((count, classes), np.bool_)
    truth[np.arange(count), labels] = True
    return truth


def _rank(logits: npt.NDArray[np.float32], truth: Bools) -> npt.NDArray[np.int64]:
    of_labels = np.where(truth, logits, -np.inf)
    best = of_labels.argmax(1)[:, None]
    value = np.take_along_axis(logits, best, 1)
    ties_before = (logits == value) & (np.arange(logits.shape[1]) < best)
    rank = 1 + (logits > value).sum(1) + ties_before.sum(1)
    return np.where(truth.any(1), rank, 0)
