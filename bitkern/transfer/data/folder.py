"""Images in folders, one for each class."""

import os
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from bitkern.transfer.data.images import DataError, ImageSet, read_image

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


def unreadable(paths: Sequence[str], *, skip_corrupt: bool) -> set[str]:
    """Decode every image once; the paths that fail, or ``DataError`` unless ``skip_corrupt``.

    Done before training, so that a broken file stops a run at its start and not in its last hour.
    """
    from tqdm import tqdm

    def check(path: str) -> str | None:
        try:
            read_image(path)
        except DataError as error:
            if not skip_corrupt:
                raise DataError(
                    f"{error}: repair or delete it, or pass skip_corrupt=True"
                ) from None
            return path
        return None

    with ThreadPool() as pool:
        checks = pool.imap(check, paths, chunksize=16)
        bar = tqdm(checks, "checking images", len(paths), leave=False, disable=None)
        return {path for path in bar if path}


def image_folder(
    root: str | os.PathLike[str], split: str, *, skip_corrupt: bool = False
) -> tuple[ImageSet, int]:
    """The images ``root/split/CLASS/*.jpg`` (png, webp, …) and the number of corrupt ones skipped.

    Classes are the names of the folders, sorted. Raises :class:`DataError` for a missing or empty
    folder, a class without images, and, unless ``skip_corrupt``, a file that cannot be decoded.
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
    every = [path for paths in found for path in paths]
    skipped = unreadable(every, skip_corrupt=skip_corrupt)
    found = [[path for path in paths if path not in skipped] for paths in found]
    for class_folder, paths in zip(folders, found, strict=True):
        if not paths:
            raise DataError(f"{class_folder}: every image is corrupt; replace them")
    labels = np.repeat(np.arange(len(found)), [len(paths) for paths in found])
    images = [path for paths in found for path in paths]
    return ImageSet(images, labels.astype(np.int64), tuple(f.name for f in folders)), len(skipped)
