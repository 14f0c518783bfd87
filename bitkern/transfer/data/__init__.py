"""Sources of images: the ``"train"`` and ``"test"`` splits of named sources and folders."""

import os
from collections.abc import Callable, Sequence

from bitkern.transfer.data.decoders import DECODERS, find_decoder, image_size
from bitkern.transfer.data.digits import digits
from bitkern.transfer.data.disk_cache import CacheEntry, cache_entries, images_folder
from bitkern.transfer.data.folder import find_images, image_folder
from bitkern.transfer.data.huggingface import image_dataset, is_dataset
from bitkern.transfer.data.images import (
    DataError,
    ImageSet,
    NoSplitError,
    check_apart,
    check_same_classes,
)
from bitkern.transfer.data.memory import is_out_of_memory
from bitkern.transfer.data.open_images import ImageReadOptions, open_resized
from bitkern.transfer.data.resized import ResizedImages
from bitkern.transfer.data.shards import image_shards, index_folder, is_shards
from bitkern.transfer.data.subsets import few_shot, hold_out
from bitkern.transfer.data.table import image_table, is_table

__all__ = ["CacheEntry", "DECODERS", "DataError", "ImageReadOptions", "ImageSet", "NoSplitError"]
__all__ += ["ResizedImages", "cache_entries", "check_apart", "check_same_classes", "digits"]
__all__ += ["few_shot", "find_decoder", "find_images", "hold_out", "image_dataset", "image_folder"]
__all__ += ["image_shards", "image_size", "image_table", "images_folder", "index_folder"]
__all__ += ["is_out_of_memory", "load_split", "open_resized"]

# Sources with a fixed name; then those recognized by their form. Anything else is a folder.
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
    """Load a split of a named source, Hugging Face dataset, tar shards, CSV file or folder.

    ``classes`` are those of the training set; not all need have images, except in named sources.
    ``flat`` is as in ``image_folder``. Raises ``DataError``: see ``image_folder``,
    ``image_table``, ``image_shards`` and ``image_dataset``.
    """
    name = os.fspath(source)
    if name in SOURCES:
        return SOURCES[name](split)
    for is_kind, load in KINDS:
        if is_kind(name):
            return load(name, split, classes)
    return image_folder(source, split, classes, flat=flat)
