"""Resized images in files that later runs and other processes find: decoded once.

An entry of the cache is a folder, named by a digest of all that decides its content: ``pixels``
uint8 (N, size, size, 3), and ``index.json``, replaced whenever more of it has been written for
good. So it is complete or goes on where a killed process left it, and never holds stale pixels.
"""

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from bitkern import files
from bitkern.models.weights import cache_folder
from bitkern.transfer.data.decoders import decoder_version
from bitkern.transfer.data.images import DataError, Pixels, Source
from bitkern.transfer.data.resized import Resized

FORMAT = 1
PIXELS, INDEX = "pixels", "index.json"
BYTES_PER_SYNC = 256 << 20
LIMIT_GB = 100.0  # of all entries, unless BITKERN_CACHE_LIMIT says otherwise
SAMPLES = 16  # images whose checksum is compared when an entry is used


def images_folder() -> Path:
    """Where the entries are."""
    return cache_folder() / "images"


def limit() -> int:
    """The bytes that all entries may take: ``BITKERN_CACHE_LIMIT``, in GB, else 100 GB."""
    text = os.environ.get("BITKERN_CACHE_LIMIT") or str(LIMIT_GB)
    try:
        if 0 <= float(text) < float("inf"):
            return int(float(text) * 1e9)
    except ValueError:
        pass
    raise ValueError(f"BITKERN_CACHE_LIMIT: expected a number of GB, got {text!r}")


def room() -> int:
    """The bytes that may be added: within the limit, and a twentieth of the disk stays free."""
    folder = images_folder()
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    held = sum(entry.bytes() for entry in entries())
    return max(0, min(disk.free - disk.total // 20, limit() - held))


def bytes_of(resized: Resized) -> int:
    """What the pixels of a set take."""
    return len(resized) * resized.size * resized.size * 3


def mapped(path: str | Path, resized: Resized, *, writable: bool = False) -> Pixels:
    """The pixels in a file, shared with all who map it; only the ``writable`` ones write to it."""
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY
    with open(path, "r+b" if writable else "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=access)
    return np.frombuffer(content, np.uint8).reshape(-1, resized.size, resized.size, 3)


def _version(source: Source) -> str:
    """What changes whenever an image may have changed."""
    if isinstance(source, np.ndarray):
        return f"{source.shape} {hashlib.blake2b(source.tobytes()).hexdigest()}"
    if not isinstance(source, str | Path):
        return source.version
    try:
        status = os.stat(source)
    except OSError:  # and reading it will say why
        return f"{os.path.abspath(source)} missing"
    return f"{os.path.abspath(source)} {status.st_size} {status.st_mtime_ns}"


@dataclasses.dataclass
class Index:
    """What index.json holds: ``done`` images of ``count`` are there, the corrupt ones apart."""

    format: int
    decoder: str
    size: int
    count: int
    data: str
    done: int = 0
    corrupt: dict[str, str] = dataclasses.field(default_factory=dict)
    checksums: dict[str, int] = dataclasses.field(default_factory=dict)


class Entry:
    """A folder of the cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pixels = folder / PIXELS
        self.lock = FileLock(folder.with_name(f".{folder.name}.lock"))

    def read(self) -> Index | None:
        """Its index; None if there is none that fits the pixels."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            with files.reading(self.folder / INDEX, "an index"):
                index = Index(**json.loads((self.folder / INDEX).read_text()))
                whole = index.count * index.size * index.size * 3
                fits = self.pixels.stat().st_size == whole and index.done <= index.count
                return index if index.format == FORMAT and fits else None
        return None

    def write(self, index: Index) -> None:
        """Replace its index; what it counts as done outlives a power cut."""
        files.sync(self.pixels)
        with files.replacing(self.folder / INDEX) as part:
            part.write_text(json.dumps(dataclasses.asdict(index)))

    def bytes(self) -> int:
        """What it takes on the disk."""
        with contextlib.suppress(OSError):
            return self.pixels.stat().st_size
        return 0

    def used(self) -> float:
        """When it was used last, in seconds since the epoch."""
        with contextlib.suppress(OSError):
            return (self.folder / INDEX).stat().st_mtime
        return 0.0

    def remove(self) -> bool:
        """Delete it, unless a process is filling it. Those that use it keep what they have."""
        try:
            with self.lock.acquire(timeout=0):
                shutil.rmtree(self.folder, ignore_errors=True)
        except Timeout:
            return False
        return True


def entries() -> list[Entry]:
    """All entries, the last used first."""
    root = images_folder()
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return sorted(map(Entry, folders), key=Entry.used, reverse=True)


def entry_of(resized: Resized, decoder: str) -> tuple[Entry, Index]:
    """The entry of these images, and the index with which it begins."""
    digest = hashlib.blake2b(digest_size=16)
    name = decoder_version(decoder)
    head = FORMAT, name, resized.size, len(resized)
    for part in (*map(str, head), *map(_version, resized.images)):
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    first = resized.images[0]
    data = "arrays" if isinstance(first, np.ndarray) else os.path.dirname(str(first))
    index = Index(FORMAT, name, resized.size, len(resized), data)
    return Entry(images_folder() / digest.hexdigest()), index


def usable(entry: Entry, resized: Resized) -> Index | None:
    """The index of an entry that is complete, which counts as a use of it; None if it is not."""
    index = entry.read()
    if index is None or index.done < index.count:
        return None
    pixels = mapped(entry.pixels, resized)
    if any(zlib.crc32(pixels[int(i)]) != crc for i, crc in index.checksums.items()):
        print(f"{entry.folder}: damaged, made again", file=sys.stderr)
        (entry.folder / INDEX).unlink(missing_ok=True)
        return None
    os.utime(entry.folder / INDEX)
    return index


def fill(entry: Entry, fresh: Index, resized: Resized, skip_corrupt: bool) -> Index:
    """Complete an entry, from where it is; waits while another process does.

    Raises :class:`DataError` for a corrupt image unless ``skip_corrupt``, and for a full disk.
    """
    try:
        entry.folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(entry):
            return usable(entry, resized) or _fill(entry, fresh, resized, skip_corrupt)
    except OSError as error:
        raise DataError(
            f"cache: {entry.folder}: cannot be written ({error.strerror or error}): make room, "
            "name another folder in BITKERN_CACHE, or choose another cache"
        ) from None


@contextlib.contextmanager
def _locked(entry: Entry) -> Iterator[None]:
    try:
        entry.lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process, which fills {entry.folder}", file=sys.stderr)
        entry.lock.acquire()
    try:
        yield
    finally:
        entry.lock.release()


def _fill(entry: Entry, fresh: Index, resized: Resized, skip_corrupt: bool) -> Index:
    index = entry.read() or fresh
    if not index.done:
        _allocate(entry, bytes_of(resized))
    resized.corrupt.update((int(i), why) for i, why in index.corrupt.items())
    pixels = mapped(entry.pixels, resized, writable=True)
    every = max(1, BYTES_PER_SYNC // pixels[0].nbytes)
    done = index.done

    def progress(count: int) -> None:
        nonlocal done
        done = count
        if done % every == 0:
            note()

    def note() -> None:
        index.done = done
        index.corrupt = {str(i): why for i, why in resized.corrupt.items() if i < done}
        entry.write(index)

    try:
        resized.read_all(pixels.__setitem__, skip_corrupt, done, progress)
    except (DataError, KeyboardInterrupt):
        note()
        raise
    spread = np.unique(np.linspace(0, done - 1, SAMPLES).astype(int))
    index.checksums = {str(i): zlib.crc32(pixels[i]) for i in spread}
    note()
    return index


def _allocate(entry: Entry, size: int) -> None:
    """Begin an entry with all of its bytes, so that no later write finds the disk full."""
    make_room(size, entry)
    shutil.rmtree(entry.folder, ignore_errors=True)
    entry.folder.mkdir()
    try:
        with open(entry.pixels, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError:
        shutil.rmtree(entry.folder, ignore_errors=True)
        raise


def make_room(needed: int, keep: Entry) -> None:
    """Remove the entries used longest ago until ``needed`` bytes are within the limit.

    Raises :class:`DataError` if they never are.
    """
    if needed > limit():
        raise DataError(
            f"cache: needs {needed / 1e9:.1f} GB, the limit is {limit() / 1e9:.1f}: raise "
            "BITKERN_CACHE_LIMIT, or choose another cache"
        )
    others = [entry for entry in entries() if entry.folder != keep.folder]
    held = sum(entry.bytes() for entry in others)
    for entry in reversed(others):
        if held + needed <= limit():
            return
        size = entry.bytes()
        if entry.remove():
            print(f"removed {entry.folder}, to make room in the cache", file=sys.stderr)
            held -= size
