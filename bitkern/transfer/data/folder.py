"""Labelled images: folders, scikit-learn's digits, few-shot subsets and held-out splits."""

import os
import struct
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

# The first word of every seed, so that no two uses of randomness share a stream.
ORDER, AUGMENT, MIXUP, FEW_SHOT, HOLDOUT = range(5)


def random_stream(use: int, *key: int) -> np.random.Generator:
    """The generator of one use of randomness: a function of its key (seed, step, …) alone."""
    return np.random.default_rng((use, *key))


class DataError(ValueError):
    """The data set cannot be used; the message names the file or folder and what to do."""


class ImageSet(NamedTuple):
    """Labelled images: file paths or uint8 arrays (H, W) or (H, W, 3), of any sizes.

    ``labels`` int64 (N,), indices into ``classes``.
    """

    images: Sequence
    labels: np.ndarray
    classes: tuple[str, ...]

    def subset(self, indices) -> "ImageSet":
        return ImageSet([self.images[i] for i in indices], self.labels[indices], self.classes)


def read_image(source):
    """The image of a path or uint8 array (H, W) or (H, W, 3) as an RGB ``PIL.Image``.

    Raises :class:`DataError`, naming the file, if it cannot be decoded.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    try:
        with Image.open(source) as image:
            if image.mode.startswith(("I", "F")):
                # Pillow would clip these to 255 instead of scaling them.
                raise ValueError(f"mode {image.mode}, expected 8 bits per channel")
            return image.convert("RGB")
    # What Pillow's decoders raise for broken files.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise DataError(f"{source}: not a readable image ({error})") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{source}: image too large ({error})") from None


def image_size(data: ImageSet) -> tuple[int, int]:
    """(height, width) of the median image by area, among at most 101 spread over the set."""
    some = np.unique(np.linspace(0, len(data.images) - 1, 101).astype(int))
    sizes = [read_image(data.images[i]).size for i in some]
    width, height = sorted(sizes, key=lambda size: size[0] * size[1])[len(sizes) // 2]
    return height, width


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


def unreadable(paths: Sequence[str], *, skip: bool) -> set[str]:
    """Decode every image once; the paths that fail if ``skip``, else ``DataError`` for the first.

    Done before training, so that a broken file stops a run at its start and not in its last hour.
    """
    from tqdm import tqdm

    def check(path):
        try:
            read_image(path)
        except DataError as error:
            if not skip:
                raise DataError(f"{error}: repair or delete it, or pass --skip-corrupt") from None
            return path

    with ThreadPool() as pool:
        checks = pool.imap(check, paths, chunksize=16)
        bar = tqdm(checks, "checking images", len(paths), leave=False, disable=None)
        return {path for path in bar if path}


def image_folder(root, split: str, *, skip_corrupt: bool = False) -> tuple[ImageSet, int]:
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
    skipped = unreadable([path for paths in found for path in paths], skip=skip_corrupt)
    found = [[path for path in paths if path not in skipped] for paths in found]
    for class_folder, paths in zip(folders, found, strict=True):
        if not paths:
            raise DataError(f"{class_folder}: every image is corrupt; replace them")
    labels = np.repeat(np.arange(len(found)), [len(paths) for paths in found])
    images = [path for paths in found for path in paths]
    return ImageSet(images, labels, tuple(f.name for f in folders)), len(skipped)


def check_same_classes(classes, expected, name: str, expected_name: str) -> None:
    """Raise :class:`DataError` unless both have the same classes in the same order."""
    if tuple(classes) == tuple(expected):
        return
    extra = [c for c in classes if c not in expected]
    missing = [c for c in expected if c not in classes]
    differences = [f"{len(missing)} missing, such as {missing[0]!r}"] if missing else []
    differences += [f"{len(extra)} more, such as {extra[0]!r}"] if extra else []
    raise DataError(
        f"{name}: expected the {len(expected)} classes of {expected_name}, found "
        f"{' and '.join(differences) or 'another order'}"
    )


def _choose(data: ImageSet, use: int, seed: int, count) -> np.ndarray:
    """Sorted indices: ``count(available, class name)`` examples of each class, drawn by seed."""
    chosen = []
    for label, name in enumerate(data.classes):
        indices = np.flatnonzero(data.labels == label)
        order = random_stream(use, label, seed).permutation(indices)
        chosen.append(order[: count(len(indices), name)])
    return np.sort(np.concatenate(chosen))


def few_shot(data: ImageSet, shots: int, seed: int) -> ImageSet:
    """``shots`` examples of each class, drawn by ``seed``. Raises :class:`DataError`."""
    if shots < 1:
        raise DataError(f"shots: expected a positive number, got {shots}")

    def count(available, name):
        if available < shots:
            raise DataError(f"shots: expected at most {available}, all of {name!r}, got {shots}")
        return shots

    return data.subset(_choose(data, FEW_SHOT, seed, count))


def hold_out(data: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """(training part, held-out part): ``fraction`` of each class, drawn by ``seed``, is held out.

    At least one example of a class is held out and at least one kept; a class with a single
    example keeps it. Raises :class:`DataError`.
    """
    if not 0 < fraction < 1:
        raise DataError(f"holdout: expected a fraction between 0 and 1, got {fraction}")

    def count(available, name):
        return min(max(round(fraction * available), 1), available - 1)

    held = _choose(data, HOLDOUT, seed, count)
    if not len(held):
        raise DataError("holdout: expected a class with more than one training image")
    kept = np.setdiff1d(np.arange(len(data.labels)), held)
    return data.subset(kept), data.subset(held)


def digits(split: str) -> ImageSet:
    """scikit-learn's 1797 handwritten digits, 8x8 grey: a fixed half of each class is ``"test"``.

    The other half is ``"train"``. Every writer may be in both.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    whole = ImageSet(images, data.target.astype(np.int64), tuple("0123456789"))
    train_set, test_set = hold_out(whole, 0.5, seed=0)
    return {"train": train_set, "test": test_set}[split]
