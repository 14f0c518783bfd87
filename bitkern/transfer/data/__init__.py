"""Where images come from: the ``"train"`` and ``"test"`` splits of named sources and folders."""

import os
from collections.abc import Callable

from bitkern.transfer.data.digits import digits
from bitkern.transfer.data.folder import image_folder
from bitkern.transfer.data.images import DataError, ImageSet, check_same_classes, image_size
from bitkern.transfer.data.subsets import few_shot, hold_out

__all__ = ["DataError", "ImageSet", "check_same_classes", "digits", "few_shot", "hold_out"]
__all__ += ["image_folder", "image_size", "load_split"]

# Sources by name; anything else is a folder.
SOURCES: dict[str, Callable[[str], ImageSet]] = {"digits": digits}


def load_split(
    source: str | os.PathLike[str], split: str, *, skip_corrupt: bool = False
) -> tuple[ImageSet, int]:
    """The images of a named source or of a folder, and the number of corrupt ones skipped.

    Raises :class:`DataError`: see :func:`image_folder`.
    """
    if str(source) in SOURCES:
        return SOURCES[str(source)](split), 0
    return image_folder(source, split, skip_corrupt=skip_corrupt)
