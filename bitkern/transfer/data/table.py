"""Images and labels listed in a CSV file."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bitkern import files
from bitkern.transfer.data.images import VALIDATION, DataError, ImageSet, NoSplitError

SEPARATOR = ";"  # between the labels of an image that may have several
SPLITS = {"train": "train", "test": "test", **dict.fromkeys(VALIDATION, "validation")}


class _Row(NamedTuple):
    where: str
    image: str
    labels: tuple[str, ...]
    split: str | None


def is_table(source: str) -> bool:
    """Return True for the name of a CSV file."""
    return Path(source).suffix.lower() == ".csv"


def image_table(
    path: str | os.PathLike[str], split: str, classes: Sequence[str] | None = None
) -> ImageSet:
    """Images of a CSV file with a header.

    Columns: ``image``, a path, from the file's folder on; ``label``, or ``labels``, which holds
    several separated by ";", or none, and makes a multi-label set; and, if there is one, ``split``,
    "train", "test" or "val": without it every row belongs to all. Other columns are ignored.
    Classes are the labels of all rows, sorted, unless they are given as ``classes``.

    Raises ``DataError``, naming the line, for a missing column, an empty label, one that is
    not among ``classes``, an image named twice and a missing image.
    """
    path = Path(path)
    columns, lines = _read(path)
    rows = list(_rows(path, columns, lines))
    _check(rows, classes)
    names = tuple(sorted({c for row in rows for c in row.labels}) if classes is None else classes)
    if len(names) < 2 and "label" in columns or not names:
        raise DataError(f"{path}: holds labels of {len(names)} classes, need two")
    rows = [row for row in rows if row.split in (None, split)]
    if not rows:
        raise NoSplitError(f"{path}: holds no images of the split {split}")
    for row in rows:
        if not os.path.isfile(row.image):
            raise DataError(f"{row.where}: {row.image}: no such file")
    images = [row.image for row in rows]
    index = {name: i for i, name in enumerate(names)}
    if "label" in columns:
        labels = np.array([index[row.labels[0]] for row in rows], np.int64)
        return ImageSet(images, labels, names)
    multi_hot = np.zeros((len(rows), len(names)), np.bool_)
    for i, row in enumerate(rows):
        multi_hot[i, [index[name] for name in row.labels]] = True
    return ImageSet(images, multi_hot, names)


def _read(path: Path) -> tuple[Sequence[str], list[tuple[int, dict[str, str]]]]:
    """Read the names of the columns, and each row with its line number."""
    try:
        with (
            files.explain_read_errors(path, "a CSV file"),
            open(path, newline="", encoding="utf-8-sig") as file,
        ):
            reader = csv.DictReader(file, strict=True, restval="")
            return reader.fieldnames or (), [(reader.line_num, row) for row in reader]
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise DataError(f"{path}: not UTF-8: save it as CSV UTF-8") from None
        raise DataError(str(error)) from None


def _rows(
    path: Path, columns: Sequence[str], lines: Sequence[tuple[int, dict[str, str]]]
) -> Iterator[_Row]:
    found = f"found {', '.join(columns) or 'an empty file'}"
    if "image" not in columns or ("label" in columns) == ("labels" in columns):
        raise DataError(f"{path}: expected the columns image and label, or labels, {found}")
    for number, cells in lines:
        where = f"{path}: line {number}"
        if "label" in columns:
            labels: tuple[str, ...] = (cells["label"].strip(),)
            if not labels[0]:
                raise DataError(f"{where}: label: expected one, got none")
        else:
            parts = (part.strip() for part in cells["labels"].split(SEPARATOR))
            labels = tuple(part for part in parts if part)
        image = cells["image"].strip()
        if not image:
            raise DataError(f"{where}: image: expected a path, got none")
        split = cells["split"].strip() if "split" in columns else None
        if split not in (None, *SPLITS):
            raise DataError(f"{where}: split: expected train, test or val, got {split!r}")
        yield _Row(where, os.path.join(path.parent, image), labels, split and SPLITS[split])


def _check(rows: Sequence[_Row], classes: Sequence[str] | None) -> None:
    """Raise ``DataError`` for an image named twice, or a label not among the classes."""
    seen = set()
    for row in rows:
        if row.image in seen:
            raise DataError(f"{row.where}: {row.image} is named twice")
        seen.add(row.image)
        for name in row.labels:
            if classes is not None and name not in classes:
                raise DataError(
                    f"{row.where}: expected one of {len(classes)} classes, got {name!r}"
                )
