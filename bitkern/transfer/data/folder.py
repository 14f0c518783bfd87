"""Images in folders, one for each class."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bitkern.transfer.data.decoders import image_formats
from bitkern.transfer.data.images import VALIDATION, DataError, ImageSet, NoSplitError, listing

# Names of the folder of a split, by preference.
SPLITS = {"train": ("train",), "test": ("test", *VALIDATION), "validation": VALIDATION}


class _ImageFinder:
    """Finds image files below folders and counts the files that it leaves out."""

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()
        self.repeated = 0  # folders linked more than once

    def find(self, folder: Path) -> list[str]:
        """List image files, sorted; visits each folder once, and hidden ones never."""
        found, seen = [], set[tuple[int, int]]()
        for parent, folders, names in os.walk(folder, followlinks=True):
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in seen:
                self.repeated += 1
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                suffix = os.path.splitext(name)[1].lower()
                path = os.path.join(parent, name)
                if name.startswith("."):
                    continue
                if suffix not in image_formats():
                    self.skipped[suffix or "without a suffix"] += 1
                elif not os.path.isfile(path):
                    self.skipped["that are no files"] += 1
                else:
                    found.append(path)
        return sorted(found)

    def report(self, folder: Path) -> None:
        if self.skipped:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.skipped.most_common())
            print(f"{folder}: not images, left out: {kinds}", file=sys.stderr)
        if self.repeated:
            count = (
                "1 folder that is" if self.repeated == 1 else f"{self.repeated} folders that are"
            )
            print(f"{folder}: {count} linked more than once, read once", file=sys.stderr)


def find_images(folder: Path) -> list[str]:
    """List the image files below ``folder``, sorted; prints the kinds of files left out."""
    finder = _ImageFinder()
    images = finder.find(folder)
    finder.report(folder)
    return images


def image_folder(
    root: str | os.PathLike[str],
    split: str,
    classes: Sequence[str] | None = None,
    *,
    flat: bool = False,
) -> ImageSet:
    """Images ``root/split/CLASS/*.jpg`` (png, webp, …: all formats that Pillow reads).

    ``root/val``, ``validation`` or ``valid`` serves as split "test" where there is none of that
    name. With ``flat`` also ``root/CLASS/*.jpg`` where there are no splits. Classes are the names
    of the folders, sorted, or ``classes``, which need not all have images.

    Raises ``DataError`` for a missing or empty folder, a class without images and a folder that is
    none of ``classes``. Whether images can be read shows when they are.
    """
    folder = split_folder(Path(root), split, flat)
    folders = {f.name: f for f in class_folders(folder)}
    if classes is None and len(folders) < 2:
        count = f"{len(folders)} class folder{'s' * (len(folders) != 1)}"
        raise DataError(
            f"{folder}: has {count}, at least 2 are needed; expected images in {folder}/CLASS/"
        )
    finder = _ImageFinder()
    paths = {name: finder.find(class_folder) for name, class_folder in folders.items()}
    finder.report(folder)
    names = tuple(folders)
    if classes is None:
        for name in names:
            if not paths[name]:
                raise DataError(f"{folders[name]}: no images; add some or remove the folder")
    elif not any(paths.values()):
        raise DataError(f"{folder}: no images; expected some in {folder}/CLASS/")
    elif {*names} <= {*classes}:  # else check_same_classes names the others
        names = tuple(classes)
        missing = [name for name in names if not paths.get(name)]
        if missing:
            count = f"{len(missing)} of {len(names)} classes"
            print(f"{folder}: no images of {count}: {listing(missing)}", file=sys.stderr)
    counts = [len(paths.get(name, ())) for name in names]
    labels = np.repeat(np.arange(len(names)), counts).astype(np.int64)
    return ImageSet([path for name in names for path in paths.get(name, ())], labels, names)


def class_folders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def split_folder(root: Path, split: str, flat: bool) -> Path:
    """Find the folder of a split; raises ``DataError`` with a hint at how to name it."""
    for name in SPLITS.get(split, (split,)):
        if (root / name).is_dir():
            if split == "test" and name != split:
                print(f"{root / name}: used as test images", file=sys.stderr)
            return root / name
    wanted = f"{root / split}: no such folder"
    expected = f"expected images in {root}/{split}/CLASS/"
    every = {name for names in SPLITS.values() for name in names}
    if root.name in every and any((root.parent / name).is_dir() for name in every - {root.name}):
        raise DataError(f"{wanted}; name the folder above it: --data {root.parent}")
    is_flat = root.is_dir() and not any((root / name).is_dir() for name in every)
    if is_flat and len(class_folders(root)) > 1:
        if flat:
            return root
        if split == "train":
            raise DataError(
                f"{wanted}; if {root} holds a folder for each class, --holdout 0.2 tests on a "
                f"fifth of it and trains on the rest; else {expected}"
            )
    hint = "" if split == "train" else ", or holdout"
    raise NoSplitError(f"{wanted}; {expected}{hint}")
