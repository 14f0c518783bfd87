"""Where images come from: the ``"train"`` and ``"test"`` splits of named sources and folders."""

import os
from collections.abc import Callable, Sequence

from bitkern.transfer.data.digits import digits
from bitkern.transfer.data.folder import image_folder
from bitkern.transfer.data.huggingface import image_dataset, is_dataset
from bitkern.transfer.data.images import (
    DataError,
    ImageSet,
    NoSplitError,
    check_apart,
    check_same_classes,
    image_size,
)
from bitkern.transfer.data.shards import image_shards, is_shards
from bitkern.transfer.data.subsets import few_shot, hold_out
from bitkern.transfer.data.table import image_table, is_table

__all__ = [
    "DataError",
    "ImageSet",
    "NoSplitError",
    "check_same_classes",
    "digits",
    "few_shot",
    "hold_out",
]
__all__ += ["check_apart", "image_dataset", "image_folder", "image_shards", "image_size"]
__all__ += ["image_table", "load_split"]

# Sources by name. Then those that are told by what they are called; anything else is a folder.
SOURCES: dict[str, Callable[[str], ImageSet]] = {"digits": digits}
Load = Callable[[str, str, Sequence[str] | None], ImageSet]
KINDS: tuple[tuple[Callable[[str], bool], Load], ...] = (
    (is_dataset, image_dataset),
    (is_shards, image_shards),
    (is_table, image_table),
)


def load_split(
    source: str | os.PathLike[str],
    split: str,
    classes: Sequence[str] | None = None,
    *,
    flat: bool = False,
) -> ImageSet:
    """The images of a named source, Hugging Face dataset, tar shards, CSV file or folder.

    All but named sources need not have images of all ``classes``, those of the set that was trained
    on. ``flat`` is as in ``image_folder``. Raises ``DataError``: see ``image_folder``,
    ``image_table``, ``image_shards`` and ``image_dataset``.
    """
    name = os.fspath(source)
    if name in SOURCES:
        return SOURCES[name](split)
    for is_kind, load in KINDS:
        if is_kind(name):
            return load(name, split, classes)
    return image_folder(source, split, classes, flat=flat)
