"""Resized images in files that later runs and other processes find: decoded once.

An entry is complete, or goes on where a killed process left it; it never holds stale pixels.
"""

import contextlib
import hashlib
import mmap
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import Timeout

from bitkern.transfer.data.decoders import decoder_version
from bitkern.transfer.data.entries import FORMAT, INDEX, Entry, Index, images_folder, make_room
from bitkern.transfer.data.images import DataError, Pixels, Source
from bitkern.transfer.data.resized import Resized

BYTES_PER_SYNC = 256 << 20
SAMPLES = 16  # images whose checksum is compared when an entry is used
NORESERVE = 0x4000  # MAP_NORESERVE of Linux: a file may be larger than memory


def bytes_of(resized: Resized) -> int:
    """What the pixels of a set take."""
    return len(resized) * resized.size * resized.size * 3


def mapped(file: BinaryIO, resized: Resized, *, writable: bool = False) -> Pixels:
    """The pixels in a file, shared with all who map it; only the ``writable`` ones write to it."""
    flags = mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE | NORESERVE
    content = mmap.mmap(file.fileno(), bytes_of(resized), flags)
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


def _origin(resized: Resized) -> str:
    """Where the images come from, for people."""
    first, last = resized.images[0], resized.images[len(resized) - 1]
    if isinstance(first, np.ndarray):
        return "arrays"
    if isinstance(first, str | Path):
        return os.path.commonpath([os.path.abspath(str(each)) for each in (first, last)])
    return str(first).partition(": ")[0]


def entry_of(resized: Resized, decoder: str) -> tuple[Entry, Index]:
    """The entry of these images, and the index with which it begins."""
    digest = hashlib.blake2b(digest_size=16)
    name = decoder_version(decoder)
    head = FORMAT, name, resized.size, len(resized)
    for part in (*map(str, head), *map(_version, resized.images)):
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    index = Index(FORMAT, name, resized.size, len(resized), _origin(resized))
    return Entry(images_folder() / digest.hexdigest()), index


def ready(entry: Entry, resized: Resized) -> tuple[Index, BinaryIO] | None:
    """The index of an entry and its pixels, open, which counts as a use of it.

    None if it is not complete, or damaged, or if images that could not be read by now can be.
    """
    found = _complete(entry, resized)
    if found and not any(_readable(resized, int(i)) for i in found[0].corrupt):
        return found
    return None


def _complete(entry: Entry, resized: Resized) -> tuple[Index, BinaryIO] | None:
    try:
        file = open(entry.pixels, "rb")
    except OSError:
        return None
    # Read when the pixels are open: it is theirs, or that of an entry made since, and then the
    # checksums show it.
    index = entry.read()
    size = os.fstat(file.fileno()).st_size
    if index is None or index.done < index.count or size != bytes_of(resized):
        return None
    pixels = mapped(file, resized)
    if any(zlib.crc32(pixels[int(i)]) != crc for i, crc in index.checksums.items()):
        print(f"{entry.folder}: damaged, made again", file=sys.stderr)
        with contextlib.suppress(OSError):
            (entry.folder / INDEX).unlink()
        return None
    entry.use(file)
    return index, file


def _readable(resized: Resized, index: int) -> bool:
    try:
        resized.decode(resized.images[index], resized.size)
    except DataError:
        return False
    return True


def fill(
    entry: Entry, fresh: Index, resized: Resized, skip_corrupt: bool
) -> tuple[Index, BinaryIO]:
    """Complete an entry, from where it is; waits while another process does.

    Raises ``DataError`` for a corrupt image unless ``skip_corrupt``, and for a full disk.
    """
    try:
        entry.folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(entry):
            found = ready(entry, resized)
            if not found:
                _fill(entry, fresh, resized, skip_corrupt)
                found = _complete(entry, resized)
    except OSError as error:
        raise DataError(
            f"cache: {entry.folder}: cannot be written ({error.strerror or error}): make room, "
            "name another folder in BITKERN_CACHE, or choose another cache"
        ) from None
    if not found:
        raise DataError(f"cache: {entry.folder}: damaged while it was made; choose another cache")
    return found


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


def _fill(entry: Entry, fresh: Index, resized: Resized, skip_corrupt: bool) -> None:
    index = entry.read() or fresh
    if not index.done:
        _allocate(entry, bytes_of(resized))
    with open(entry.pixels, "r+b") as file:
        pixels = mapped(file, resized, writable=True)
    for i, why in index.corrupt.items():
        try:  # again: it may have been the fault of a disk
            pixels[int(i)] = resized.decode(resized.images[int(i)], resized.size)
        except DataError:
            resized.corrupt[int(i)] = why
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
