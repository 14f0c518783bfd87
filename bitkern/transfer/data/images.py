"""Labelled images, and checks of one set against another."""

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Pixels = npt.NDArray[np.uint8]


class EncodedImage(Protocol):
    """An encoded image inside a larger file; ``str(image)`` names it in errors."""

    @property
    def version(self) -> str:
        """A text that is unique to the image, and changes when its file does."""

    def read(self) -> bytes:
        """Read the bytes of a JPEG, PNG, … Raises OSError or ValueError; thread-safe."""


Source = str | Path | Pixels | EncodedImage
# A function from an image's (height, width) to the part wanted: top, left, height, width.
Region = Callable[[int, int], tuple[int, int, int, int]]

VALIDATION = ("val", "validation", "valid")  # names of the validation split, by preference


class DataError(ValueError):
    """The data set cannot be used; the message names the file or folder and what to do."""


class NoSplitError(DataError):
    """The data set has no images of that split."""


class ImageSet(NamedTuple):
    """Labelled images: file paths, uint8 arrays (H, W) or (H, W, 3), or images in other files.

    ``images`` may be any sequence; a lazy one, for millions of images, has a method
    ``take(indices)``, which returns another. ``labels`` int64 (N,), indices into ``classes``; or
    for a multi-label set bool (N, classes), True for each label of an image, which may have none.
    It may be a ``csr_array`` of SciPy, which takes five bytes for each label.
    """

    images: Sequence[Source]
    labels: "npt.NDArray[np.int64] | npt.NDArray[np.bool_] | csr_array"
    classes: tuple[str, ...]

    @property
    def multi_label(self) -> bool:
        """True if an image may have several labels."""
        return self.labels.ndim == 2

    def as_multi_label(self) -> "ImageSet":
        """Return the same images as a multi-label set."""
        if self.multi_label:
            return self
        from scipy.sparse import csr_array

        count = len(self.images)
        labels = np.asarray(self.labels, np.int32)
        parts = np.ones(count, np.bool_), labels, np.arange(count + 1, dtype=np.int32)
        return self._replace(labels=csr_array(parts, (count, len(self.classes))))

    def labels_of(self, indices: Any) -> npt.NDArray[Any]:
        """Return the labels at these indices as an array: int64 (M,) or bool (M, classes)."""
        labels = self.labels[indices]
        return labels if isinstance(labels, np.ndarray) else labels.toarray()

    def subset(self, indices: Any) -> "ImageSet":
        """Return the images at these indices."""
        take = getattr(self.images, "take", lambda indices: [self.images[i] for i in indices])
        return ImageSet(take(indices), self.labels[indices], self.classes)


def check_same_classes(
    classes: Sequence[str], expected: Sequence[str], name: str, expected_name: str
) -> None:
    """Raise ``DataError`` unless both have the same classes in the same order."""
    if tuple(classes) == tuple(expected):
        return
    unexpected = [c for c in classes if c not in expected]
    missing = [c for c in expected if c not in classes]
    nfc = [{unicodedata.normalize("NFC", c) for c in names} for names in (missing, unexpected)]
    hint = ""
    if nfc[0] & nfc[1]:
        missing, unexpected = [*map(ascii, missing)], [*map(ascii, unexpected)]
        hint = ", which are equal after Unicode normalization: rename one of them"
    kinds = ("missing", missing), ("unexpected", unexpected)
    listed = "; ".join(f"{kind}: {listing(names)}" for kind, names in kinds if names)
    raise DataError(
        f"{name}: expected the {len(expected)} classes of {expected_name}; "
        f"{listed or 'found another order'}{hint}"
    )


def listing(names: Sequence[str], limit: int = 10) -> str:
    """Name the first few of many."""
    more = f" and {len(names) - limit} more" * (len(names) > limit)
    return f"{', '.join(names[:limit])}{more}"


def check_apart(train_set: ImageSet, test_set: ImageSet, source: str) -> None:
    """Raise ``DataError`` if an image file of the test set is also one of the training set."""
    test_files = {image for image in test_set.images if not isinstance(image, np.ndarray)}
    for image in train_set.images if test_files else ():
        if not isinstance(image, np.ndarray) and image in test_files:
            raise DataError(
                f"{source}: {image} is in the training set and in the test set: name the split of "
                "each image, or hold out part of them"
            )
