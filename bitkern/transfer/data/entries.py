"""The folders of the cache of images on disk, and the room that they take.

One is named by a digest of all that decides its content: ``pixels`` uint8 (N, size, size, 3), and
``index.json``, which is replaced whenever more of it has been written for good.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from bitkern import files
from bitkern.models.weights import cache_folder
from bitkern.transfer.data.images import DataError

FORMAT = 1
PIXELS, INDEX = "pixels", "index.json"
LIMIT_GB = 100.0  # of all entries, unless BITKERN_CACHE_LIMIT says otherwise


@dataclasses.dataclass
class Index:
    """What index.json holds: ``done`` images of ``count`` are there, the ``corrupt`` ones apart.

    ``data`` says where they come from, ``checksums`` are those of some, spread over them all.
    """

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
        self.lock = FileLock(folder.with_name(f".{folder.name}.lock"))  # of whoever fills it

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

    def use(self, file: BinaryIO) -> None:
        """Note that its pixels are used, now and for as long as ``file`` is open."""
        with contextlib.suppress(OSError):  # where one may only read
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(self.folder / INDEX)

    def in_use(self) -> bool:
        """Whether a process has its pixels open."""
        with contextlib.suppress(FileNotFoundError):
            with open(self.pixels, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    return True
        return False

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
        """Delete it, if possible and not being filled. Those that use it keep what they have."""
        try:
            with self.lock.acquire(timeout=0):
                shutil.rmtree(self.folder, ignore_errors=True)
        except (Timeout, OSError):
            pass
        return not self.folder.exists()


def images_folder() -> Path:
    """Where the entries are."""
    return cache_folder() / "images"


def entries() -> list[Entry]:
    """All entries, the last used first."""
    try:
        folders = [path for path in images_folder().iterdir() if path.is_dir()]
    except OSError:
        return []
    return sorted(map(Entry, folders), key=Entry.used, reverse=True)


def limit() -> int:
    """The bytes that all entries may take: ``BITKERN_CACHE_LIMIT``, in GB, else 100 GB."""
    text = os.environ.get("BITKERN_CACHE_LIMIT") or str(LIMIT_GB)
    try:
        if 0 <= float(text) < float("inf"):
            return int(float(text) * 1e9)
    except ValueError:
        pass
    raise ValueError(f"BITKERN_CACHE_LIMIT: expected a number of GB, got {text!r}")


def _disk() -> Path:
    """The folder of the entries, or where it would be made."""
    folder = images_folder()
    while not folder.exists():
        folder = folder.parent
    return folder


def room() -> int:
    """The bytes that an entry may take: within the limit, and a twentieth of the disk stays free.

    What others take is counted as free, since they give way to it.
    """
    if not os.access(_disk(), os.W_OK):
        return 0
    disk = shutil.disk_usage(_disk())
    held = sum(entry.bytes() for entry in entries())
    return max(0, min(disk.free - disk.total // 20 + held, limit()))


def make_room(needed: int, own: Entry) -> None:
    """Remove the entries used longest ago, but none in use, until ``needed`` bytes have room.

    Raises ``DataError`` if they are beyond the limit.
    """
    others = [entry for entry in entries() if entry.folder != own.folder]

    def excess() -> int:
        return sum(entry.bytes() for entry in others) + needed - limit()

    for entry in reversed(others):
        if excess() <= 0 and shutil.disk_usage(_disk()).free >= needed:
            return
        if needed <= limit() and not entry.in_use() and entry.remove():
            print(f"removed {entry.folder}, to make room in the cache", file=sys.stderr)
    if excess() > 0:
        raise DataError(
            f"cache: needs {needed / 1e9:.1f} GB, {(excess() - needed + limit()) / 1e9:.1f} are in "
            f"use, the limit is {limit() / 1e9:.1f}: raise BITKERN_CACHE_LIMIT, or choose another"
        )
