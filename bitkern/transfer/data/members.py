"""What the sources of many images share: images that are made when asked for, and their labels."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bitkern.transfer.data.images import DataError, ImageSet, Member

MOST_CLASSES = 1_000_000  # more than anyone has: a larger number is not that of a class


class Members(Sequence[Member]):
    """``member(row)`` for each of ``rows``, int64 (N,): no object is kept for an image."""

    def __init__(self, member: Callable[[int], Member], rows: npt.NDArray[np.int64]) -> None:
        self.member = member
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(index)
        return self.member(int(self.rows[index]))

    def take(self, indices: Any) -> "Members":
        """Those at these indices."""
        return Members(self.member, self.rows[indices])


class Labels(NamedTuple):
    """The labels that a source states, image after image.

    ``values``, int64, are numbers of classes, or places in ``names``, the names it states.
    ``counts``, int64 (N,), is how many of them each image has, and None where each has one.
    """

    values: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64] | None
    names: Sequence[str] | None


def check_number(value: int) -> None:
    """Raise ValueError for what cannot be the number of a class."""
    if not 0 <= value < MOST_CLASSES:
        raise ValueError(f"label: expected a number from 0 to {MOST_CLASSES - 1}, got {value}")


def image_set(
    images: Members, labels: Labels, classes: Sequence[str] | None, source: str
) -> ImageSet:
    """The images of ``source`` with their labels.

    Without ``classes`` they are the names of the labels, or "0", "1", … up to the greatest number.
    Raises ``DataError`` for a label that is not among the classes, and for less than two.
    """
    values, counts, names = labels
    if names is None:
        if classes is None:
            classes = [str(i) for i in range(min(values.max(initial=-1) + 1, MOST_CLASSES))]
        places = np.where(values < len(classes), values, -1)
    else:
        classes = names if classes is None else classes
        place = {name: i for i, name in enumerate(classes)}
        # A -1 behind the names is for what lies outside them.
        known = np.array([*(place.get(name, -1) for name in names), -1], np.int64)
        places = known[np.where((0 <= values) & (values < len(names)), values, -1)]
    wrong = np.flatnonzero(places < 0)
    if len(wrong):
        first = int(wrong[0])
        image = first if counts is None else int(np.searchsorted(np.cumsum(counts), first, "right"))
        raise DataError(f"{images[image]}: {_reason(int(values[first]), names, len(classes))}")
    if len(classes) < 2 and counts is None or not classes:
        raise DataError(f"{source}: holds labels of {len(classes)} classes, need two")
    if counts is None:
        return ImageSet(images, places, tuple(classes))
    from scipy.sparse import csr_array

    rows = np.concatenate([[0], np.cumsum(counts)])
    shape = len(counts), len(classes)
    index = np.int32 if len(places) < 1 << 31 else np.int64
    parts = np.ones(len(places), np.bool_), places.astype(index), rows.astype(index)
    several = csr_array(parts, shape)
    several.sum_duplicates()  # which state a label once more
    return ImageSet(images, several, tuple(classes))


def _reason(value: int, names: Sequence[str] | None, classes: int) -> str:
    """Why a label is none of the classes."""
    if names is not None and 0 <= value < len(names):
        return f"label: expected one of {classes} classes, got {names[value]!r}"
    try:
        check_number(value)
    except ValueError as error:
        return str(error)
    return f"label: more classes than names: expected a number below {classes}, got {value}"
