"""A file from a web server: resumed after a break, verified, and fetched once.

What has arrived is in a part beside the file. The part's name holds the ETag of the server, so that
no piece of another object is appended.
"""

import base64
import contextlib
import errno
import hashlib
import http.client
import importlib.util
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from glob import escape
from pathlib import Path
from typing import IO
from urllib.parse import quote, unquote

import filelock

from bitkern import files
from bitkern.text import one_line

TIMEOUT = 30  # seconds without a byte
RETRY_WAITS = (1, 2, 4)  # seconds before the second attempt, the third, …
# HTTP statuses after which a retry may succeed.
RETRYABLE = (408, 416, 425, 429, 500, 502, 503, 504)
CHUNK = 1 << 20  # bytes


class _ConnectionBrokenError(Exception):
    """The connection broke: the part is good, and a retry may succeed."""


class _BadFileError(Exception):
    """The server has no such file or a wrong one: a retry would not help."""


def download(url: str, path: Path) -> None:
    """Download the ``.npz`` at ``url`` to ``path``; a file that exists is left as it is.

    Of several threads and processes one downloads, the others wait for it. A broken connection is
    retried; if that fails, the part is kept and the next call resumes it. A wrong file, or one that
    does not fit on the disk, is not kept.

    Raises OSError naming the address, what happened, what is kept, and where the file belongs.
    """
    if path.is_file():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(f"{path.name}.lock")):
            if not path.is_file():
                _download_with_retries(url, path)
    except _ConnectionBrokenError as error:
        reason = f"{error} (attempt {len(RETRY_WAITS) + 1}, the last)"
    except _BadFileError as error:
        _drop_parts(path)
        reason = str(error)
    except OSError as error:  # of the disk; those of the network are _ConnectionBrokenError
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _drop_parts(path)
        raise OSError(
            f"{path.parent}: cannot hold {path.name}: {error.strerror or error}; "
            "BITKERN_CACHE or cache_dir names another folder"
        ) from error
    else:
        return
    size = sum(part.stat().st_size for part in _parts(path))
    kept = f"{_mb(size)} are kept, the next call goes on from there" if size else "nothing is kept"
    ways = ways_out(f"put the file at {path} by hand", "BITKERN_WEIGHTS_URL")
    raise OSError(f"{url}: {one_line(reason)}; {kept}; {ways}")


def ways_out(by_hand: str, mirror: str) -> str:
    """Advice for the message that weights cannot be downloaded."""
    return (
        f"or {by_hand}, name a mirror in {mirror}, or start from random weights (--weights none), "
        "which takes far more images and steps for the same accuracy"
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{escape(path.name)}.*.part"))


def _part(path: Path, etag: str) -> Path:
    return path.with_name(f"{path.name}.{quote(etag, safe='')}.part")


def _drop_parts(path: Path) -> None:
    for part in _parts(path):
        part.unlink()


def _download_with_retries(url: str, path: Path) -> None:
    for number, wait in enumerate(RETRY_WAITS, 1):
        try:
            return _download(url, path)
        except _ConnectionBrokenError as error:
            said = f"attempt {number} of {len(RETRY_WAITS) + 1}: {one_line(error)}"
            print(f"{path.name}: {said}; again in {wait} s", file=sys.stderr, flush=True)
            time.sleep(wait)
    _download(url, path)


def _download(url: str, path: Path) -> None:
    """Resume the part if there is one and the server still has the same file."""
    start, asked, headers = 0, "", {}
    for part in _parts(path):
        start, asked = part.stat().st_size, unquote(part.name[len(path.name) + 1 : -len(".part")])
    if asked:
        headers = {"Range": f"bytes={start}-", "If-Range": asked}
    with _open(url, headers, path) as response:
        etag = response.headers.get("ETag", "")
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers["Content-Range"] or "")
            if not asked or etag != asked or not span or int(span[1]) != start:
                _drop_parts(path)
                raise _ConnectionBrokenError("the server sent another piece than asked for")
            total: int | None = int(span[2])
        else:
            _drop_parts(path)
            start, total = 0, response.length
        free = shutil.disk_usage(path.parent).free
        if total is not None and total - start > free:
            raise OSError(errno.ENOSPC, f"{_mb(total - start)} to come, {_mb(free)} free")
        # Only a strong ETag, "…" and not W/"…", promises the same bytes.
        resumable = re.fullmatch(r'"[^"]{1,64}"', etag) is not None
        part = _part(path, etag if resumable else "")
        try:
            with open(part, "ab") as file, _progress(path.name, start, total) as advance:
                _receive(response, file, advance)
            size = part.stat().st_size
            if total not in (None, size):
                raise _ConnectionBrokenError(f"the server closed after {size} of {total} bytes")
            _verify(part, response.headers.get_all("x-goog-hash", []))
            files.replace_atomically(part, path)
        finally:
            if not resumable:
                part.unlink(missing_ok=True)


def _open(url: str, headers: dict[str, str], path: Path) -> http.client.HTTPResponse:
    try:
        request = urllib.request.Request(url, headers=headers)
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
        return response
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # the part is whole already, or was never of this file
            _drop_parts(path)
        says = f"the server says {error.code} {error.reason}"
        raise (_ConnectionBrokenError if error.code in RETRYABLE else _BadFileError)(says) from None
    except urllib.error.URLError as error:
        raise _ConnectionBrokenError(f"no connection: {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _ConnectionBrokenError(f"no answer: {error}") from None


def _receive(
    response: http.client.HTTPResponse, file: IO[bytes], advance: Callable[[int], object]
) -> None:
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _ConnectionBrokenError(f"the connection broke: {error}") from None
        if not chunk:
            return
        file.write(chunk)
        advance(len(chunk))


def _verify(part: Path, hashes: list[str]) -> None:
    """Check the MD5 that Google's servers send, and that it is a ``.npz``."""
    if md5 := re.search(r"\bmd5=([\w+/=]+)", ",".join(hashes)):
        with open(part, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).digest()
        if (found := base64.b64encode(digest).decode()) != md5[1]:
            raise _BadFileError(f"damaged on the way: expected MD5 {md5[1]}, got {found}")
    if not zipfile.is_zipfile(part):
        raise _BadFileError("what the server sent is no .npz")


@contextlib.contextmanager
def _progress(name: str, start: int, total: int | None) -> Iterator[Callable[[int], object]]:
    """A progress bar on a terminal, if tqdm is installed."""
    if importlib.util.find_spec("tqdm") is None:
        yield lambda size: None
        return
    from tqdm import tqdm

    shown = {"unit": "B", "unit_scale": True, "disable": None}
    with tqdm(desc=name, initial=start, total=total, **shown) as bar:
        yield bar.update
