"""Images in tar files, in the layout of the webdataset library."""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bitkern import files
from bitkern.packages import require
from bitkern.text import one_line
from bitkern.transfer.data import tar
from bitkern.transfer.data.decoders import image_formats
from bitkern.transfer.data.images import DataError, ImageSet, NoSplitError
from bitkern.transfer.data.lazy_images import Labels, LazyImages, check_number, labelled_set

FORMAT = 1  # of the index in the cache
OPEN_SHARDS = 64  # in each process, well below the limits of systems
LONGEST_LABEL = 1 << 20  # bytes


class Shard(NamedTuple):
    """A tar file with its state when it was indexed; ``name`` is the path that the user gave."""

    name: str
    path: str
    size: int
    mtime_ns: int


class ShardImage(NamedTuple):
    """An image in a tar file."""

    shard: Shard
    name: str
    offset: int
    length: int

    @property
    def version(self) -> str:
        """The state of its file when it was indexed, and its position there."""
        return ":".join(str(part) for part in (*self.shard[1:], self.offset, self.length))

    def __str__(self) -> str:
        return f"{self.shard.name}: {self.name}"

    def read(self) -> bytes:
        """Read its bytes. Raises OSError if the tar file has changed."""
        file = _opened(self.shard)  # a reference, because the cache may drop it meanwhile
        data = os.pread(file.number, self.length, self.offset)
        found = os.fstat(file.number)
        if (found.st_size, found.st_mtime_ns) != self.shard[2:] or len(data) < self.length:
            raise OSError("the shard has changed since it was indexed")
        return data


class _Descriptor:
    """An open file, closed with the last reference to it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@functools.lru_cache(OPEN_SHARDS)
def _opened(shard: Shard) -> _Descriptor:
    return _Descriptor(shard.path)


class _Index(NamedTuple):
    """The images of shards, in order, as arrays; the fields are those of the file in the cache.

    ``names`` are the members' names, concatenated, UTF-8, of ``name_lengths``; ``label_names`` is
    empty if labels are numbers.
    """

    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    names: npt.NDArray[np.uint8]
    name_lengths: npt.NDArray[np.int32]
    values: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    several: npt.NDArray[np.bool_]
    label_names: npt.NDArray[np.str_]


def _image(
    shards: Sequence[Shard], index: _Index, name_ends: npt.NDArray[np.int64], row: int
) -> ShardImage:
    name = index.names[name_ends[row] - index.name_lengths[row] : name_ends[row]].tobytes()
    offset, length = int(index.offset[row]), int(index.length[row])
    return ShardImage(shards[index.shard[row]], tar.printable(name), offset, length)


def is_shards(source: str | os.PathLike[str]) -> bool:
    """Return True for the name of tar files."""
    return re.search(r"\.tar\b", os.path.basename(source)) is not None


def image_shards(
    source: str | os.PathLike[str], split: str, classes: Sequence[str] | None = None
) -> ImageSet:
    """Images of tar files: one, ``DIR/train-{000000..000146}.tar`` or ``DIR/train-*.tar``.

    Members whose paths agree up to the first dot of the file name are a sample: an image, and its
    label in ``.cls``, a number, or ``.json``, ``{"label": 3}`` or ``{"labels": ["ant", "bee"]}``,
    numbers or names; ``labels`` makes a multi-label set. Classes are ``classes``, else the lines of
    a ``classes.txt`` beside the shards, else the names found, sorted, or numbers. The split "test"
    is in the shards with "test" in their names in place of "train".

    The index of the images is kept in the cache. Raises ``DataError``, naming shard and key, for an
    incomplete sample, and for a shard that is missing, damaged or not a plain tar.
    """
    shards = _shards(os.fspath(source), split)
    index = _cached_index(shards)
    class_file = Path(shards[0].name).with_name("classes.txt")
    if classes is None and class_file.is_file():
        classes = _read_classes(class_file)
    names = index.label_names.tolist() or None
    labels = Labels(index.values, index.counts if index.several else None, names)
    name_ends = np.cumsum(index.name_lengths, dtype=np.int64)
    make_image = functools.partial(_image, shards, index, name_ends)
    images = LazyImages(make_image, np.arange(len(index.shard)))
    return labelled_set(images, labels, classes, os.fspath(source))


def _shards(source: str, split: str) -> list[Shard]:
    folder, name = os.path.split(source)
    if split == "validation":
        raise NoSplitError(f"{source}: no validation shards: expected holdout")
    if split != "test" or "train" not in name:
        found = _expand(source)
        if not found:
            raise DataError(f"{source}: no such shards")
        return [_shard(path) for path in found]
    beside = os.path.join(folder, re.sub(r"\{[^{}]*\}", "*", name.replace("train", "test")))
    found = [path for path in _expand(beside) if os.path.exists(path)]
    if not found:
        raise NoSplitError(f"{source}: no test shards: expected {beside}, or holdout")
    return [_shard(path) for path in found]


def _expand(source: str) -> list[str]:
    """Expand the braces of a path, and the wildcards of its file name."""
    patterns = [source]
    if "{" in source:
        require("webdataset")
        from webdataset.shardlists import expand_urls

        try:
            patterns = expand_urls(source)
        except (ValueError, AssertionError) as error:
            raise DataError(f"{source}: {one_line(error)}") from None
    found = []
    for pattern in patterns:
        folder, name = os.path.split(pattern)
        if glob.has_magic(name) and not os.path.exists(pattern):
            names = sorted(glob.glob(name, root_dir=folder or None))
            found += [os.path.join(folder, name) for name in names]
        else:
            found.append(pattern)
    return found


def _shard(path: str) -> Shard:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: no such shard ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: expected a tar file, got a folder or the like")
    return Shard(path, os.path.realpath(path), status.st_size, status.st_mtime_ns)


def _read_classes(path: Path) -> list[str]:
    try:
        with files.explain_read_errors(path, "a list of classes"):
            names = path.read_text("utf-8-sig").rstrip().split("\n")
    except ValueError as error:
        raise DataError(str(error)) from None
    numbers: dict[str, int] = {}
    for number, name in enumerate(map(str.strip, names), 1):
        if not name or numbers.setdefault(name, number) != number:
            raise DataError(f"{path}: line {number}: expected another class, got {name!r}")
    return list(numbers)


def index_folder() -> Path:
    return files.cache_folder() / "shards"


def _cached_index(shards: Sequence[Shard]) -> _Index:
    """Load the index of shards from the cache, or make it and keep it there."""
    from tqdm import tqdm

    key = json.dumps([FORMAT, [shard[1:] for shard in shards]])
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = index_folder() / f"{digest}.npz"
    # A damaged file can raise anything.
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as arrays:
        return _Index(*(arrays[field] for field in _Index._fields))
    indexer = _Indexer()
    for shard in tqdm(shards, "indexing shards", leave=False, disable=None):
        indexer.add(shard)
    index = indexer.index()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(path) as part:
            np.savez(part, **index._asdict())
    except OSError as error:
        reason = error.strerror or error
        print(f"{path}: cannot keep the index of the shards: {reason}", file=sys.stderr)
    return index


def _read_label(file: tar.Reader, offset: int, length: int) -> bytes:
    if length > LONGEST_LABEL:
        raise ValueError(f"label: expected a short file, got {length} bytes")
    return file.read(offset, length)


@dataclasses.dataclass(slots=True)
class _Sample:
    name: bytes = b""  # of the image's member
    offset: int = 0
    length: int = 0
    labels: tuple[int, ...] | None = None
    json: tuple[int, int] | None = None  # offset, length


class _Indexer:
    """Indexes shards one after the other."""

    def __init__(self) -> None:
        self.parts: list[_Index] = []
        self.names: dict[str, int] = {}  # of labels, numbered in the order found
        self.images = {suffix[1:].encode() for suffix in image_formats()}
        self.forms: dict[str, str] = {}  # of the labels, the same in all samples

    def add(self, shard: Shard) -> None:
        """Read the headers and labels of a shard. Raises ``DataError``."""
        samples: dict[bytes, _Sample] = {}
        suffixes: set[bytes] = set()
        try:
            opened = _Descriptor(shard.path)
            file = tar.Reader(opened.number)
            for name, offset, length in tar.members(file, shard.name):
                start = name.rfind(b"/") + 1
                dot = name.find(b".", start)
                if dot <= start:  # hidden, or without a suffix
                    continue
                key, suffix = name[:dot], name[dot + 1 :].lower()
                suffixes.add(suffix)
                sample = samples.get(key)
                if sample is None:
                    sample = samples[key] = _Sample()
                try:
                    if suffix in self.images:
                        if sample.name:
                            raise ValueError(f"a second image, .{tar.printable(suffix)}")
                        sample.name, sample.offset, sample.length = name, offset, length
                    elif suffix == b"cls":
                        if sample.labels is not None:
                            raise ValueError("two labels, both .cls")
                        sample.labels = self._number(_read_label(file, offset, length))
                    elif suffix == b"json":
                        if sample.json:
                            raise ValueError("two labels, both .json")
                        sample.json = offset, length
                except ValueError as error:
                    raise DataError(f"{shard.name}: {tar.printable(key)}: {error}") from None
            self._take_from_json(shard, file, samples)
        except OSError as error:
            raise DataError(f"{shard.name}: cannot be read: {error.strerror}") from None
        if not any(sample.name for sample in samples.values()):
            found = ", ".join(sorted(tar.printable(suffix) for suffix in suffixes)) or "no files"
            raise DataError(
                f"{shard.name}: no images: expected .jpg, .png, .webp or the like after the first "
                f"dot of a name, as in 0.jpg, found {one_line(found)}"
            )
        for key, sample in samples.items():
            if not sample.name or sample.labels is None:
                missing = "a label, in .cls or .json" if sample.name else "an image"
                raise DataError(f"{shard.name}: {tar.printable(key)}: expected {missing}, got none")
        self._append(list(samples.values()))

    def _take_from_json(
        self, shard: Shard, file: tar.Reader, samples: dict[bytes, _Sample]
    ) -> None:
        """Read the labels of samples without a ``.cls``, which often repeats the ``.json``."""
        for key, sample in samples.items():
            if sample.labels is None and sample.json:
                try:
                    sample.labels = self._in_json(_read_label(file, *sample.json))
                except ValueError as error:
                    raise DataError(f"{shard.name}: {tar.printable(key)}: {error}") from None

    def _number(self, data: bytes) -> tuple[int, ...]:
        if not re.fullmatch(rb"\s*-?\d{1,18}\s*", data):
            raise ValueError(f"label: expected an integer, got {tar.printable(data)!r}")
        return self._labels([int(data)], several=False)

    def _in_json(self, data: bytes) -> tuple[int, ...] | None:
        """Parse the labels of a ``.json``; None if it has neither field."""
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {one_line(error)}") from None
        found = [k for k in ("label", "labels") if isinstance(content, dict) and k in content]
        if len(found) > 1:
            raise ValueError("expected label or labels, got both")
        if not found:
            return None
        several = found == ["labels"]
        labels = content["labels"] if several else [content["label"]]
        if not isinstance(labels, list):
            raise ValueError(f"labels: expected a list, got {one_line(labels)}")
        return self._labels(labels, several=several)

    def _labels(self, values: list[Any], *, several: bool) -> tuple[int, ...]:
        """Number the labels. Raises ValueError if they are invalid or differ in form."""
        kinds = {type(label) for label in values}
        if not kinds <= {int, str} or "" in values:
            got = one_line(values if several else values[0])
            raise ValueError(f"label: expected an integer or a name, got {got}")
        self._check_form("count", "several labels" if several else "one label")
        for kind in kinds:
            self._check_form("kind", "names" if kind is str else "integers")
        if kinds == {str}:
            return tuple(self.names.setdefault(name, len(self.names)) for name in values)
        for number in values:
            check_number(number)
        return tuple(values)

    def _check_form(self, aspect: str, form: str) -> None:
        first = self.forms.setdefault(aspect, form)
        if form != first:
            raise ValueError(f"expected {first}, as in the samples before, got {form}")

    def _append(self, samples: Sequence[_Sample]) -> None:
        labels = [sample.labels or () for sample in samples]
        self.parts.append(
            _Index(
                shard=np.full(len(samples), len(self.parts), np.int32),
                offset=np.array([sample.offset for sample in samples], np.int64),
                length=np.array([sample.length for sample in samples], np.int64),
                names=np.frombuffer(b"".join(sample.name for sample in samples), np.uint8),
                name_lengths=np.array([len(sample.name) for sample in samples], np.int32),
                values=np.fromiter(chain.from_iterable(labels), np.int64),
                counts=np.array([len(some) for some in labels], np.int64),
                several=np.empty(0, np.bool_),
                label_names=np.empty(0, np.str_),
            )
        )

    def index(self) -> _Index:
        """Join the arrays of all shards, and sort the names of labels."""
        fields = zip(*self.parts, strict=True)
        index = _Index(*(np.concatenate(arrays) for arrays in fields))
        several = np.array(self.forms.get("count") == "several labels")
        names = sorted(self.names)
        if names:
            rank = {self.names[name]: i for i, name in enumerate(names)}
            ranks = np.array([rank[i] for i in range(len(names))], np.int64)
            index = index._replace(values=ranks[index.values])
        return index._replace(several=several, label_names=np.array(names, np.str_))
