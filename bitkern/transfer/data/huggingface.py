"""Images in the tables of Hugging Face's ``datasets``, on this machine."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitkern.packages import require
from bitkern.text import one_line
from bitkern.transfer.data.images import DataError, ImageSet, NoSplitError
from bitkern.transfer.data.lazy_images import Labels, LazyImages, labelled_set

PREFIX = "hfds:"
LABEL_COLUMNS = ("label", "labels")
# Names of a split, by preference.
SPLITS = {"train": ("train",), "test": ("test", "validation"), "validation": ("validation",)}


@dataclasses.dataclass(frozen=True)
class _Table:
    """A table with one column, of images; ``name`` is used in errors."""

    name: str
    files: str  # digest of its files' names, sizes and times
    column: str
    rows: Any = dataclasses.field(compare=False, repr=False)
    holds_paths: bool = False

    def encoded(self, row: int) -> tuple[bytes | None, str | None]:
        value = self.rows[row][self.column] or {}
        return value.get("bytes"), value.get("path")


@dataclasses.dataclass(frozen=True)
class DatasetImage:
    """An image in a row of a table, or in a file that the row names."""

    table: _Table
    row: int

    @property
    def version(self) -> str:
        """The state of the table's files when it was opened, and the row."""
        version = f"{self.table.files}:{self.table.column}:{self.row}"
        if self.table.holds_paths:
            data, path = self.table.encoded(self.row)
            if data is None and path and os.path.exists(path):
                version += f":{_state(path)}"
        return version

    def __str__(self) -> str:
        return f"{self.table.name}: row {self.row}"

    def read(self) -> bytes:
        """Read its bytes. Raises OSError, or ValueError if the row has no image."""
        data, path = self.table.encoded(self.row)
        if data is None and path:
            return Path(path).read_bytes()
        if not data:
            raise ValueError("no image in the row")
        return data


def is_dataset(source: str | os.PathLike[str]) -> bool:
    """Return True for a source of the form ``hfds:FOLDER``."""
    return os.fspath(source).startswith(PREFIX)


def image_dataset(
    source: str | os.PathLike[str], split: str, classes: Sequence[str] | None = None
) -> ImageSet:
    """Images of ``hfds:FOLDER``: a dataset saved by ``save_to_disk``, or Parquet or Arrow files.

    A saved dataset without splits serves as every split; the split of a file is in its name or its
    folder's, by the rules of ``datasets``. "validation" serves as "test" where there is none. One
    column holds ``Image``; another ``ClassLabel``, or lists of them, which make a multi-label set,
    or else integers or strings, and is called ``label`` or ``labels``. Classes are ``classes``,
    else the names of the labels.

    Nothing is downloaded. Raises ``DataError``, and ValueError where ``datasets`` is missing.
    """
    require("datasets")
    source = os.fspath(source)
    folder = Path(source.removeprefix(PREFIX)).expanduser()
    if not folder.is_dir():
        raise DataError(f"{source}: no such folder; expected {PREFIX}FOLDER")
    try:
        return _image_set(folder, source, split, classes)
    except DataError:
        raise
    except Exception as error:  # damaged files can raise anything
        reason = one_line(error.__cause__ or error)
        raise DataError(f"{source}: cannot be read: {reason}") from None


def _image_set(folder: Path, source: str, split: str, classes: Sequence[str] | None) -> ImageSet:
    part, dataset = _open(folder, source, split)
    name = f"{source}: {part}" if part else source
    if not len(dataset):
        raise DataError(f"{name}: holds no images")
    dataset = dataset.with_format(None)  # the saved format would change the type of rows
    image, label = _columns(dataset.features, name)
    table = _table(dataset, image, folder, name, part)
    images = LazyImages(functools.partial(DatasetImage, table), np.arange(len(dataset)))
    return labelled_set(images, _labels(dataset, label, name), classes, name)


def _open(folder: Path, source: str, split: str) -> tuple[str, Any]:
    """Return (name, rows) of a split; the name is "" for a dataset without splits."""
    import datasets

    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.Dataset):
            return "", saved
        chosen = _choose_split(saved, source, split)
        return chosen, saved[chosen]
    splits = _split_files(folder)
    chosen = _choose_split(splits, source, split)
    paths = splits[chosen]
    kinds = {Path(path).suffix for path in paths}
    if len(kinds) > 1:
        raise DataError(f"{source}: {chosen}: expected Parquet files or Arrow files, found both")
    if kinds == {".parquet"}:
        # Unlike load_dataset this sends no telemetry.
        return chosen, datasets.Dataset.from_parquet(paths)
    tables = [datasets.Dataset.from_file(path) for path in paths]
    return chosen, datasets.concatenate_datasets(tables)


def _split_files(folder: Path) -> dict[str, list[str]]:
    """Find the Parquet and Arrow files of each split, by the rules of ``datasets``."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    base = str(folder.resolve())
    try:
        patterns = get_data_patterns(base)
        found = DataFilesDict.from_patterns(patterns, base_path=base)
    except (EmptyDatasetError, FileNotFoundError):
        return {}
    suffixes = (".parquet", ".arrow")
    splits = {str(s): [path for path in f if path.endswith(suffixes)] for s, f in found.items()}
    return {name: paths for name, paths in splits.items() if paths}


def _choose_split(splits: Any, source: str, split: str) -> str:
    for name in SPLITS[split]:
        if name in splits:
            return name
    hint = ", or holdout" if split == "test" else ""
    raise NoSplitError(
        f"{source}: expected a saved dataset, Parquet or Arrow files with the split "
        f"{' or '.join(SPLITS[split])}{hint}, found {', '.join(splits) or 'none'}"
    )


def _columns(features: Any, name: str) -> tuple[str, str]:
    """Find the column of images, and that of labels."""
    from datasets import ClassLabel, Image, Value

    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    labels = [c for c, feature in features.items() if isinstance(_item(feature), ClassLabel)]
    labels = labels or [
        column
        for column in LABEL_COLUMNS
        if isinstance(item := _item(features.get(column)), Value)
        and ("int" in item.dtype or "string" in item.dtype)
    ]
    for content, found in (("images", images), ("labels", labels)):
        if len(found) != 1:
            names = ", ".join(found) or f"none among {', '.join(features)}"
            raise DataError(f"{name}: expected one column of {content}, found {one_line(names)}")
    return images[0], labels[0]


def _item(feature: Any) -> Any:
    """Return the feature of a column, or of the items of its lists."""
    from datasets import LargeList, List

    return feature.feature if isinstance(feature, List | LargeList) else feature


def _table(dataset: Any, image: str, folder: Path, name: str, part: str) -> _Table:
    from datasets import Image

    rows = dataset.select_columns([image]).cast_column(image, Image(decode=False))
    found = [path for path in folder.rglob("*") if path.suffix in (".arrow", ".parquet")]
    states = [_state(path) for path in sorted(found) if not path.name.startswith("cache-")]
    digest = hashlib.sha256("\n".join([part, *states]).encode(errors="surrogateescape"))
    by_path = any(chunk.field("bytes").null_count for chunk in rows.data.column(image).chunks)
    return _Table(name, digest.hexdigest()[:32], image, rows, by_path)


def _state(path: str | Path) -> str:
    status = os.stat(path)
    return f"{os.path.realpath(path)}:{status.st_size}:{status.st_mtime_ns}"


def _labels(dataset: Any, column: str, name: str) -> Labels:
    """Read the labels of all rows, from this column alone."""
    import pyarrow
    from pyarrow import compute

    feature = dataset.features[column]
    values = dataset.select_columns([column]).with_format("arrow")[:].column(0)
    counts = None
    if values.null_count:
        row = compute.index(compute.is_null(values), True).as_py()
        raise DataError(f"{name}: row {row}: {column}: expected a label, got none")
    if _item(feature) is not feature:
        counts = compute.list_value_length(values).to_numpy().astype(np.int64)
        values = compute.list_flatten(values)
        if values.null_count:
            raise DataError(f"{name}: {column}: expected labels, got none in a list")
    names = getattr(_item(feature), "names", None)
    if pyarrow.types.is_integer(values.type):
        return Labels(values.to_numpy().astype(np.int64), counts, names)
    names = sorted(compute.unique(values).to_pylist())
    indices = compute.index_in(values, pyarrow.array(names, values.type))
    return Labels(indices.to_numpy().astype(np.int64), counts, names)
