"""Parts of a set of images: few-shot subsets and held-out splits, drawn by a seed."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bitkern.transfer.data.images import DataError, ImageSet
from bitkern.transfer.rng import FEW_SHOT, HOLDOUT, random_stream


def _draw(
    data: ImageSet, use: int, seed: int, count: Callable[[int, str], int]
) -> npt.NDArray[np.intp]:
    """Draw ``count(available, class name)`` examples of each class; returns sorted indices."""
    chosen = []
    by_class = np.argsort(data.labels, kind="stable")
    ends = np.searchsorted(data.labels[by_class], np.arange(len(data.classes) + 1))
    for label, name in enumerate(data.classes):
        indices = by_class[ends[label] : ends[label + 1]]
        order = random_stream(use, label, seed).permutation(indices)
        chosen.append(order[: count(len(indices), name)])
    return np.sort(np.concatenate(chosen))


def few_shot(data: ImageSet, shots: int, seed: int) -> ImageSet:
    """Draw ``shots`` examples of each class by ``seed``. Raises ``DataError``."""
    if shots < 1:
        raise DataError(f"shots: expected a positive number, got {shots}")
    if data.multi_label:
        raise DataError("shots: expected one label per image, got a multi-label set")

    def count(available: int, name: str) -> int:
        if available < shots:
            raise DataError(f"shots: expected at most {available}, all of {name!r}, got {shots}")
        return shots

    return data.subset(_draw(data, FEW_SHOT, seed, count))


def hold_out(data: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split into (training part, held-out part): ``fraction`` of each class, drawn by ``seed``.

    A multi-label set is split regardless of its labels. At least one example of a class is held out
    and at least one kept; a class with a single example keeps it. Raises ``DataError``.
    """
    if not 0 < fraction < 1:
        raise DataError(f"holdout: expected a fraction between 0 and 1, got {fraction}")

    def count(available: int, name: str) -> int:
        return min(max(round(fraction * available), 1), available - 1)

    # A multi-label set is split like a set of one class.
    one_class = ImageSet(data.images, np.zeros(len(data.images), np.int64), ("image",))
    held = _draw(one_class if data.multi_label else data, HOLDOUT, seed, count)
    if not len(held):
        raise DataError("holdout: expected a class with more than one training image")
    kept = np.setdiff1d(np.arange(len(data.images)), held)
    return data.subset(kept), data.subset(held)
