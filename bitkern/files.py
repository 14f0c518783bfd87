"""Atomic writes (temporary name, fsync, rename), errors that name the file, the cache folder."""

import contextlib
import errno
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitkern.text import one_line

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Find bitkern's cache: ``cache_dir``, else ``BITKERN_CACHE``, else the user's cache folder."""
    folder = cache_dir or os.environ.get("BITKERN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder or Path(base, "bitkern")).expanduser()


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn errors of a full disk into an OSError that names the file and the free space.

    PyTorch and safetensors raise errors of their own, the former without the cause.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        match = re.search(r"\(os error (\d+)\)|PytorchStreamWriter|inline_container", str(error))
        if match and match[1]:
            number = int(match[1])
        if number not in _DISK_FULL and not match:
            raise
        free = shutil.disk_usage(next(p for p in path.absolute().parents if p.exists())).free
        reason = os.strerror(number) if number else "the disk is full, or gone"
        full = OSError(f"{path}: cannot be written: {reason}; {free / 1e9:.3f} GB are free there")
        full.errno = number or errno.ENOSPC
        raise full from None


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which replaces it when the block succeeds."""
    path = Path(path)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        with explain_write_errors(path):
            yield part
            replace_atomically(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: object, **options: Any) -> None:
    """Write an indented JSON file; ``options`` are those of ``json.dumps``."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=2, **options) + "\n")


def replace_atomically(part: Path, path: Path) -> None:
    """Sync a written file and rename it to ``path``, in the same folder."""
    sync(part)
    os.replace(part, path)
    sync(path.parent)


@contextlib.contextmanager
def atomic_create(path: Path) -> Iterator[Path]:
    """Yield a temporary path of the same name for a new file or folder.

    It is moved to ``path`` when the block succeeds, along with files written beside it.
    """
    with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as name:
        folder = Path(name)
        yield folder / path.name
        for part in folder.rglob("*"):
            sync(part)
        for part in sorted(folder.iterdir(), key=lambda part: part.name == path.name):
            os.replace(part, path.with_name(part.name))
        sync(path.parent)


def remove_temporary_files(folder: Path) -> None:
    """Delete the temporary files that a killed process left in a folder."""
    for part in folder.glob(".part-*"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()


@contextlib.contextmanager
def explain_read_errors(path: Path, kind: str) -> Iterator[None]:
    """Turn any error that a damaged file causes into a ValueError that names the file.

    Raises FileNotFoundError if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: damaged, or holds more than tensors (nothing else is unpickled; save the "
            "state dict alone)"
        ) from error
    # A damaged file can raise anything: IndexError, KeyError, MemoryError, …
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        raise ValueError(f"{path}: truncated or not {kind}: {reason}") from error
