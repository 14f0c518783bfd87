"""Images in folders, one for each class."""

import os
from pathlib import Path

import numpy as np

from bitkern.transfer.data.images import DataError, ImageSet

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def find_images(folder: Path) -> list[str]:
    """The image files below ``folder``, sorted; hidden ones are left out."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(parent, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS
        ]
    return sorted(found)


def image_folder(root: str | os.PathLike[str], split: str) -> ImageSet:
    """The images ``root/split/CLASS/*.jpg`` (png, webp, …).

    Classes are the names of the folders, sorted. Raises ``DataError`` for a missing or empty
    folder and for a class without images. Whether images can be read shows when they are.
    """
    folder = Path(root) / split
    expected = f"expected images in {Path(root)}/{split}/CLASS/"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {expected}")
    folders = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    if len(folders) < 2:
        raise DataError(f"{folder}: holds {len(folders)} class folders, need two; {expected}")
    found = [find_images(class_folder) for class_folder in folders]
    for class_folder, paths in zip(folders, found, strict=True):
        if not paths:
            raise DataError(f"{class_folder}: no images; add some or remove the folder")
    labels = np.repeat(np.arange(len(found)), [len(paths) for paths in found])
    images = [path for paths in found for path in paths]
    return ImageSet(images, labels.astype(np.int64), tuple(f.name for f in folders))
