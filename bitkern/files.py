"""Files that are whole or not there: written under another name, synced, and renamed."""

import contextlib
import errno
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sync(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what is raised on a full disk into an OSError that names the file and what is free.

    PyTorch and safetensors raise errors of their own, the former without the cause.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        said = re.search(r"\(os error (\d+)\)|PytorchStreamWriter|inline_container", str(error))
        if said and said[1]:
            number = int(said[1])
        if number not in _FULL and not said:
            raise
        free = shutil.disk_usage(next(p for p in path.absolute().parents if p.exists())).free
        reason = os.strerror(number) if number else "the disk is full, or gone"
        full = OSError(f"{path}: cannot be written: {reason}; {free / 1e9:.3f} GB are free there")
        full.errno = number or errno.ENOSPC
        raise full from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place when the block succeeds."""
    path = Path(path)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        with writing(path):
            yield part
            put_in_place(part, path)
    finally:
        part.unlink(missing_ok=True)


def put_in_place(part: Path, path: Path) -> None:
    """Sync a written file and rename it to ``path``, in the same folder."""
    sync(part)
    os.replace(part, path)
    sync(path.parent)


@contextlib.contextmanager
def part_folder(part: Path) -> Iterator[Path]:
    """A folder beside a temporary path, for whoever makes temporary files of its own."""
    folder = part.with_name(f"{part.name}.d")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def made(path: Path) -> Iterator[Path]:
    """A temporary path of the same name, for a file or folder that is not there yet.

    It takes the place of ``path`` when the block succeeds, and what lies beside it likewise.
    """
    with part_folder(path.with_name(f".part-{os.getpid()}-{path.name}")) as folder:
        yield folder / path.name
        for part in folder.rglob("*"):
            sync(part)
        for part in sorted(folder.iterdir(), key=lambda part: part.name == path.name):
            os.replace(part, path.with_name(part.name))
        sync(path.parent)


def remove_parts(folder: Path) -> None:
    """Delete what a killed process left of ``replacing`` in a folder."""
    for part in folder.glob(".part-*"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def in_a_line(text: object, limit: int = 160) -> str:
    """What an error says, in one short printable line."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn the many ways in which a file can be damaged into one ValueError that names it.

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
    # Readers of damaged files raise whatever they come upon: IndexError, KeyError, MemoryError, …
    except Exception as error:
        reason = in_a_line(error) or type(error).__name__
        raise ValueError(f"{path}: truncated or not {kind}: {reason}") from error
