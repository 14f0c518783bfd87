"""Sequences of images that are created on access, and the labels of their sources."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bitkern.transfer.data.images import DataError, EncodedImage, ImageSet

MOST_CLASSES = 1_000_000  # a larger number is not that of a class


@dataclasses.dataclass(eq=False, repr=False)
class LazyImages(Sequence[EncodedImage]):
    """``make_image(row)`` for each of ``rows``, int64 (N,); no object is kept for an image."""

    make_image: Callable[[int], EncodedImage]
    rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(index)
        return self.make_image(int(self.rows[index]))

    def take(self, indices: Any) -> "LazyImages":
        """Return the images at these indices."""
        return LazyImages(self.make_image, self.rows[indices])


class Labels(NamedTuple):
    """The labels of a source, image after image.

    ``values``, int64, are numbers of classes, or indices into ``names``. ``counts``, int64 (N,), is
    the number of labels of each image, or None where each has one.
    """

    values: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64] | None
    names: Sequence[str] | None


def check_number(value: int) -> None:
    """Raise ValueError for a value that cannot be the number of a class."""
    if not 0 <= value < MOST_CLASSES:
        raise ValueError(f"label: expected a number from 0 to {MOST_CLASSES - 1}, got {value}")


def labelled_set(
    images: LazyImages, labels: Labels, classes: Sequence[str] | None, source: str
) -> ImageSet:
    """Combine the images of ``source`` with their labels.

    The default ``classes`` are the names of the labels, or "0", "1", … up to the greatest number.
    Raises ``DataError`` for a label that is not among the classes, and for fewer than two classes.
    """
    values, counts, names = labels
    if names is None:
        if classes is None:
            classes = [str(i) for i in range(min(values.max(initial=-1) + 1, MOST_CLASSES))]
        mapped = np.where(values < len(classes), values, -1)
    else:
        classes = names if classes is None else classes
        index = {name: i for i, name in enumerate(classes)}
        # The last element, -1, is for values outside the names.
        known = np.array([*(index.get(name, -1) for name in names), -1], np.int64)
        mapped = known[np.where((0 <= values) & (values < len(names)), values, -1)]
    wrong = np.flatnonzero(mapped < 0)
    if len(wrong):
        first = int(wrong[0])
        image = first if counts is None else int(np.searchsorted(np.cumsum(counts), first, "right"))
        raise DataError(f"{images[image]}: {_explain(int(values[first]), names, len(classes))}")
    if len(classes) < 2 and counts is None or not classes:
        raise DataError(f"{source}: holds labels of {len(classes)} classes, need two")
    if counts is None:
        return ImageSet(images, mapped, tuple(classes))
    from scipy.sparse import csr_array

    rows = np.concatenate([[0], np.cumsum(counts)])
    dtype = np.int32 if len(mapped) < 1 << 31 else np.int64
    parts = np.ones(len(mapped), np.bool_), mapped.astype(dtype), rows.astype(dtype)
    multi_hot = csr_array(parts, (len(counts), len(classes)))
    multi_hot.sum_duplicates()  # an image may state a label twice
    return ImageSet(images, multi_hot, tuple(classes))


def _explain(value: int, names: Sequence[str] | None, classes: int) -> str:
    if names is not None and 0 <= value < len(names):
        return f"label: expected one of {classes} classes, got {names[value]!r}"
    try:
        check_number(value)
    except ValueError as error:
        return str(error)
    return f"label: more classes than names: expected a number below {classes}, got {value}"
