"""Where images come from: the ``"train"`` and ``"test"`` splits of named sources and folders."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from bitkern.transfer.data.digits import digits
from bitkern.transfer.data.folder import image_folder
from bitkern.transfer.data.images import (
    DataError,
    ImageSet,
    check_apart,
    check_same_classes,
    image_size,
)
from bitkern.transfer.data.subsets import few_shot, hold_out
from bitkern.transfer.data.table import image_table

__all__ = ["DataError", "ImageSet", "check_same_classes", "digits", "few_shot", "hold_out"]
__all__ += ["check_apart", "image_folder", "image_size", "image_table", "load_split"]

# Sources by name; anything else is a CSV file or a folder.
SOURCES: dict[str, Callable[[str], ImageSet]] = {"digits": digits}


def load_split(
    source: str | os.PathLike[str], split: str, classes: Sequence[str] | None = None
) -> ImageSet:
    """The images of a named source, CSV file or folder.

    A CSV file need not have images of all ``classes``. Raises :class:`DataError`: see
    :func:`image_folder` and :func:`image_table`.
    """
    if str(source) in SOURCES:
        return SOURCES[str(source)](split)
    if Path(source).suffix.lower() == ".csv":
        return image_table(source, split, classes)
    return image_folder(source, split)
