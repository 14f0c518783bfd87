"""A cache of resized images on disk: decoded once, used by later runs and other processes.

The folder of an entry is named by a digest of all that decides its content. It holds ``pixels``
uint8 (N, size, size, 3) and ``index.json``, which is replaced each time more of them are on disk.
An entry is complete, or continues where a killed process left it; it never holds stale pixels.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import mmap
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from bitkern import files
from bitkern.transfer.data.decoders import note_once, noted
from bitkern.transfer.data.images import DataError, Pixels, Source
from bitkern.transfer.data.resized import ResizedImages

FORMAT = 2
PIXELS, INDEX = "pixels", "index.json"
LIMIT_GB = 100.0  # default of BITKERN_CACHE_LIMIT
BYTES_PER_SYNC = 256 << 20
SAMPLES = 16  # images whose checksums are compared before an entry is used
NORESERVE = 0x4000  # MAP_NORESERVE of Linux: allows a file larger than memory


@dataclasses.dataclass
class CacheIndex:
    """The content of index.json: ``done`` of ``count`` images are there, but not the ``corrupt``.

    ``data`` names their origin, ``checksums`` are those of a few images spread over the set,
    ``notes`` the messages printed while they were decoded.
    """

    format: int
    decoder: str
    size: int
    count: int
    data: str
    done: int = 0
    corrupt: dict[str, str] = dataclasses.field(default_factory=dict)
    checksums: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


class CacheEntry:
    """A folder of the cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pixels = folder / PIXELS
        self.lock = FileLock(folder.with_name(f".{folder.name}.lock"))  # held while it is filled

    def read(self) -> CacheIndex | None:
        """Read the index; None unless it fits the pixels."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            with files.explain_read_errors(self.folder / INDEX, "an index"):
                index = CacheIndex(**json.loads((self.folder / INDEX).read_text()))
                num_bytes = index.count * index.size * index.size * 3
                fits = self.pixels.stat().st_size == num_bytes and index.done <= index.count
                known = index.notes == [*map(str, index.notes)]
                return index if index.format == FORMAT and fits and known else None
        return None

    def write(self, index: CacheIndex) -> None:
        """Flush the pixels to disk, then replace the index."""
        files.sync(self.pixels)
        with files.atomic_write(self.folder / INDEX) as part:
            part.write_text(json.dumps(dataclasses.asdict(index)))

    def use(self, file: BinaryIO) -> None:
        """Mark the entry as in use until ``file`` is closed."""
        with contextlib.suppress(OSError):  # on a read-only disk
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(self.folder / INDEX)

    def in_use(self) -> bool:
        """Return True if a process has the pixels open."""
        with contextlib.suppress(FileNotFoundError):
            with open(self.pixels, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    return True
        return False

    def bytes(self) -> int:
        """Return the size on disk."""
        with contextlib.suppress(OSError):
            return self.pixels.stat().st_size
        return 0

    def used(self) -> float:
        """Return the time of the last use, in seconds since the epoch."""
        with contextlib.suppress(OSError):
            return (self.folder / INDEX).stat().st_mtime
        return 0.0

    def remove(self) -> bool:
        """Delete the entry unless it is being filled; processes that use it keep their pixels."""
        with contextlib.suppress(Timeout, OSError), self.lock.acquire(timeout=0):
            shutil.rmtree(self.folder, ignore_errors=True)
        return not self.folder.exists()


def images_folder() -> Path:
    return files.cache_folder() / "images"


def cache_entries() -> list[CacheEntry]:
    """List all entries, the most recently used first."""
    try:
        folders = [path for path in images_folder().iterdir() if path.is_dir()]
    except OSError:
        return []
    return sorted(map(CacheEntry, folders), key=CacheEntry.used, reverse=True)


def size_limit() -> int:
    """Return the bytes that all entries may take: ``BITKERN_CACHE_LIMIT``, in GB, else 100 GB."""
    text = os.environ.get("BITKERN_CACHE_LIMIT") or str(LIMIT_GB)
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < float("inf"):
            return int(float(text) * 1e9)
    raise ValueError(f"BITKERN_CACHE_LIMIT: expected a number of GB, got {text!r}")


def _existing_folder() -> Path:
    folder = images_folder()
    return next(path for path in (folder, *folder.parents) if path.exists())


def available_bytes() -> int:
    """Return the bytes that a new entry may take, other entries counted as free.

    They stay within the limit, and leave a twentieth of the disk free.
    """
    if not os.access(_existing_folder(), os.W_OK):
        return 0
    disk = shutil.disk_usage(_existing_folder())
    held = sum(entry.bytes() for entry in cache_entries())
    return max(0, min(disk.free - disk.total // 20 + held, size_limit()))


def evict(needed: int, own: CacheEntry) -> None:
    """Remove the least recently used entries, but none in use, until ``needed`` bytes are free.

    Raises ``DataError`` if the entries in use leave too little within the limit.
    """
    others = [entry for entry in cache_entries() if entry.folder != own.folder]

    def excess() -> int:
        return sum(entry.bytes() for entry in others) + needed - size_limit()

    for entry in reversed(others):
        if excess() <= 0 and shutil.disk_usage(_existing_folder()).free >= needed:
            return
        if needed <= size_limit() and not entry.in_use() and entry.remove():
            print(f"removed {entry.folder}, to make room in the cache", file=sys.stderr)
    if excess() > 0:
        in_use = excess() - needed + size_limit()
        raise DataError(
            f"cache: needs {needed / 1e9:.1f} GB, {in_use / 1e9:.1f} are in use, the limit is "
            f"{size_limit() / 1e9:.1f}: raise BITKERN_CACHE_LIMIT, or choose another"
        )


def num_bytes(resized: ResizedImages) -> int:
    """Return the bytes that the pixels of a set take."""
    return len(resized) * resized.size * resized.size * 3


def map_pixels(file: BinaryIO, resized: ResizedImages, *, writable: bool = False) -> Pixels:
    """Memory-map the pixels in a file; only with ``writable`` do changes reach the file."""
    flags = mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE | NORESERVE
    content = mmap.mmap(file.fileno(), num_bytes(resized), flags)
    return np.frombuffer(content, np.uint8).reshape(-1, resized.size, resized.size, 3)


def _version(source: Source) -> str:
    """Return a text that changes whenever an image may have changed."""
    if isinstance(source, np.ndarray):
        return f"{source.shape} {hashlib.blake2b(source.tobytes()).hexdigest()}"
    if not isinstance(source, str | Path):
        return source.version
    try:
        status = os.stat(source)
    except OSError:  # reading the image will explain it
        return f"{os.path.abspath(source)} missing"
    return f"{os.path.abspath(source)} {status.st_size} {status.st_mtime_ns}"


def _origin(resized: ResizedImages) -> str:
    first, last = resized.images[0], resized.images[len(resized) - 1]
    if isinstance(first, np.ndarray):
        return "arrays"
    if isinstance(first, str | Path):
        return os.path.commonpath([os.path.abspath(str(each)) for each in (first, last)])
    return str(first).partition(": ")[0]


def entry_for(resized: ResizedImages, decoder: str) -> tuple[CacheEntry, CacheIndex]:
    """Return the entry of these images, and the index of an empty one."""
    digest = hashlib.blake2b(digest_size=16)
    name = f"{decoder} {importlib.metadata.version(decoder)}"  # pixels may depend on the version
    head = FORMAT, name, resized.size, len(resized)
    for part in (*map(str, head), *map(_version, resized.images)):
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    index = CacheIndex(FORMAT, name, resized.size, len(resized), _origin(resized))
    return CacheEntry(images_folder() / digest.hexdigest()), index


def open_complete(
    entry: CacheEntry, resized: ResizedImages, recheck: bool = True
) -> tuple[CacheIndex, BinaryIO] | None:
    """Open a complete entry and mark it as used: its index and pixels; else return None.

    A damaged entry counts as incomplete; with ``recheck`` also one whose corrupt images can now be
    read.
    """
    try:
        file = open(entry.pixels, "rb")
    except OSError:
        return None
    # Read after the pixels are opened: if the entry was replaced meanwhile, the checksums differ.
    index = entry.read()
    size = os.fstat(file.fileno()).st_size
    if index is None or index.done < index.count or size != num_bytes(resized):
        return None
    pixels = map_pixels(file, resized)
    if any(zlib.crc32(pixels[int(i)]) != crc for i, crc in index.checksums.items()):
        print(f"{entry.folder}: damaged, rebuilding it", file=sys.stderr)
        with contextlib.suppress(OSError):
            (entry.folder / INDEX).unlink()
        return None
    entry.use(file)
    for message in index.notes:
        note_once(message)
    if recheck and any(_is_readable(resized, int(i)) for i in index.corrupt):
        return None
    return index, file


def _is_readable(resized: ResizedImages, index: int) -> bool:
    try:
        resized.decode(resized.images[index], resized.size)
    except DataError:
        return False
    return True


def fill(
    entry: CacheEntry, fresh: CacheIndex, resized: ResizedImages, skip_corrupt: bool
) -> tuple[CacheIndex, BinaryIO]:
    """Complete an entry, from its current state; waits while another process does.

    Raises ``DataError`` for a corrupt image unless ``skip_corrupt``, and for a full disk.
    """
    try:
        entry.folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(entry):
            found = open_complete(entry, resized)
            if not found:
                _fill(entry, fresh, resized, skip_corrupt)
                found = open_complete(entry, resized, recheck=False)
    except OSError as error:
        raise DataError(
            f"cache: {entry.folder}: cannot be written ({error.strerror or error}): make room, "
            "name another folder in BITKERN_CACHE, or choose another cache"
        ) from None
    if not found:
        raise DataError(f"cache: {entry.folder}: damaged while it was made; choose another cache")
    return found


def _lock(entry: CacheEntry) -> contextlib.AbstractContextManager[object]:
    """Acquire the lock of an entry, which leaving the block releases."""
    try:
        return entry.lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process, which fills {entry.folder}", file=sys.stderr)
        return entry.lock.acquire()


def _fill(entry: CacheEntry, fresh: CacheIndex, resized: ResizedImages, skip_corrupt: bool) -> None:
    index, before = entry.read() or fresh, noted()
    if not index.done:
        _allocate(entry, num_bytes(resized))
    with open(entry.pixels, "r+b") as file:
        pixels = map_pixels(file, resized, writable=True)
    for i, why in index.corrupt.items():
        try:  # again, because a disk error may have been temporary
            pixels[int(i)] = resized.decode(resized.images[int(i)], resized.size)
        except DataError:
            resized.corrupt[int(i)] = why
    every = max(1, BYTES_PER_SYNC // pixels[0].nbytes)

    def progress(done: int) -> None:
        index.done = done
        if done % every == 0:
            write_index()

    def write_index() -> None:
        index.corrupt = {str(i): why for i, why in resized.corrupt.items() if i < index.done}
        index.notes = sorted({*index.notes, *(noted() - before)})
        entry.write(index)

    try:
        resized.decode_all(pixels.__setitem__, skip_corrupt, index.done, progress)
    except (DataError, KeyboardInterrupt):
        write_index()
        raise
    spread = np.unique(np.linspace(0, index.done - 1, SAMPLES).astype(int))
    index.checksums = {str(i): zlib.crc32(pixels[i]) for i in spread}
    write_index()


def _allocate(entry: CacheEntry, size: int) -> None:
    """Create an entry with all of its bytes allocated, so that no later write fills the disk."""
    evict(size, entry)
    shutil.rmtree(entry.folder, ignore_errors=True)
    entry.folder.mkdir()
    try:
        with open(entry.pixels, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError:
        shutil.rmtree(entry.folder, ignore_errors=True)
        raise
