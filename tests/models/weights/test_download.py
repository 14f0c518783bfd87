"""Downloads against a server that breaks, stalls, lies and changes its mind."""

import errno
import io
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import pytest

from bitkern.models import download as module
from bitkern.models.download import download
from tests.models.weights.server import npz, serving

BODY, OTHER = npz(0), npz(1)


@pytest.fixture(autouse=True)
def without_waits(monkeypatch):
    monkeypatch.setattr(module, "RETRY_WAITS", (0, 0, 0))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "x.npz"


@pytest.fixture
def server():
    with serving({"/x.npz": BODY}) as server:
        yield server


def get(server, path, *plan):
    server.plan[:] = plan
    server.requests.clear()
    download(f"{server.url}/x.npz", path)


def error_of(server, path, *plan):
    with pytest.raises(OSError) as error:
        get(server, path, *plan)
    message = str(error.value)
    assert "\n" not in message
    assert not path.exists()
    return message


def parts(path):
    """Return the sizes of the files beside the lock."""
    return [p.stat().st_size for p in path.parent.iterdir() if p.suffix != ".lock"]


def ranges(server):
    return [headers.get("Range") for _, headers in server.requests]


def test_fetches_once_and_needs_no_server_then(server, path):
    get(server, path)
    assert path.read_bytes() == BODY and parts(path) == [len(BODY)]
    assert len(server.requests) == 1
    server.stop()
    get(server, path)
    assert server.requests == []


def test_a_file_put_there_by_hand_is_taken(server, path):
    path.parent.mkdir()
    path.write_bytes(b"mine")
    get(server, path)
    assert server.requests == [] and path.read_bytes() == b"mine"


@pytest.fixture
def impatient_of_stalls(monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 1)


@pytest.mark.parametrize("break_", ["close", "stall", 503, 429])
def test_goes_on_after_a_break(server, path, break_, impatient_of_stalls):
    get(server, path, break_)
    assert path.read_bytes() == BODY and parts(path) == [len(BODY)]
    half = len(BODY) // 2
    assert ranges(server) == [None, None if isinstance(break_, int) else f"bytes={half}-"]


def test_goes_on_in_the_next_call(server, path, impatient_of_stalls):
    message = error_of(server, path, "close", 503, "stall", "close")
    assert "closed after" in message and "attempt 4, the last" in message
    size = 0
    for _ in ("close", "stall", "close"):
        size += (len(BODY) - size) // 2
    assert parts(path) == [size]
    assert f"{size / 1e6:.1f} MB are kept, the next call goes on from there" in message
    assert f"put the file at {path} by hand" in message and server.url in message
    get(server, path)
    assert ranges(server) == [f"bytes={size}-"]
    assert path.read_bytes() == BODY and parts(path) == [len(BODY)]


@pytest.mark.parametrize("how", ["ignore range", "other piece", "bare"])
def test_a_server_without_ranges_or_with_wrong_ones_starts_over(server, path, how):
    get(server, path, "close", how)
    assert path.read_bytes() == BODY and parts(path) == [len(BODY)]
    again = [None] if how == "other piece" else []
    assert ranges(server) == [None, f"bytes={len(BODY) // 2}-", *again]


@pytest.mark.parametrize("how", ["", "ignore if-range"])
def test_pieces_of_two_objects_never_mix(server, path, how):
    error_of(server, path, *["close"] * 4)
    server.files["/x.npz"] = OTHER
    get(server, path, how)
    assert path.read_bytes() == OTHER and parts(path) == [len(OTHER)]
    assert server.requests[0][1]["If-Range"].startswith('"')


def test_a_part_that_is_whole_is_no_obstacle(server, path):
    error_of(server, path, *["close"] * 4)
    (part,) = path.parent.glob("*.part")
    part.write_bytes(BODY)  # as when killed before the renaming
    get(server, path)
    assert path.read_bytes() == BODY and parts(path) == [len(BODY)]


@pytest.mark.parametrize("how", ["bare", "endless"])
def test_without_etag_and_length(server, path, how):
    path.parent.mkdir()
    path.with_name("x.npz..part").write_bytes(b"of a killed process")
    get(server, path, how)
    assert path.read_bytes() == BODY and parts(path) == [len(BODY)]


def test_without_etag_nothing_is_kept(server, path):
    assert "nothing is kept" in error_of(server, path, *["bare close"] * 4)
    assert parts(path) == [] and set(ranges(server)) == {None}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (404, "the server says 404 Not Found; nothing is kept"),
        (403, "the server says 403 Forbidden; nothing is kept"),
        ("lie", "damaged on the way: expected MD5"),
        ("page", "what the server sent is no .npz; nothing is kept"),
    ],
)
def test_nothing_stays_of_what_is_wrong(server, path, how, message):
    error_of(server, path, *["close"] * 4)
    assert parts(path) != []
    error = error_of(server, path, how)
    assert message in error and "nothing is kept" in error
    assert parts(path) == [] and len(server.requests) == 1


@pytest.mark.parametrize("how", [503, "vanish"])
def test_a_server_that_does_not_come_back(path, how):
    with serving({"/x.npz": BODY}) as server:
        message = error_of(server, path, *[how] * 4)
        kept = len(BODY) // 2
        if how == "vanish":
            assert "no connection: " in message and "refused" in message
            assert parts(path) == [kept] and "0.1 MB are kept" in message
        else:
            assert "503 Service Unavailable (attempt 4, the last); nothing is kept" in message
            assert parts(path) == [] and len(server.requests) == 4
    with serving({"/x.npz": BODY}) as server:
        get(server, path)
        assert ranges(server) == [f"bytes={kept}-" if how == "vanish" else None]
    assert path.read_bytes() == BODY


def test_too_little_space_is_noticed_before_writing(server, path, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=len(BODY) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    message = error_of(server, path)
    assert f"{path.parent}: cannot hold x.npz: 0.2 MB to come, 0.2 MB free; " in message
    assert parts(path) == [] and len(server.requests) == 1


def test_full_disk(server, path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            super().write(data[:1000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def limited(name, mode="r"):
        return (Full if mode == "ab" else open)(name, mode)

    monkeypatch.setattr(module, "open", limited, raising=False)
    message = error_of(server, path)
    assert "cannot hold x.npz: No space left on device; BITKERN_CACHE or cache_dir" in message
    assert parts(path) == [] and len(server.requests) == 1


def test_cache_that_cannot_be_written(server, tmp_path, path, monkeypatch):
    (tmp_path / "file").touch()
    message = error_of(server, tmp_path / "file" / "x.npz")
    assert f"{tmp_path / 'file'}: cannot hold x.npz: " in message

    def read_only(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert "Read-only file system; BITKERN_CACHE" in error_of(server, path)
    assert server.requests == []


@pytest.mark.parametrize("kind", [threading.Thread, multiprocessing.get_context("fork").Process])
def test_one_of_several_downloads(server, path, kind):
    server.plan[:] = ["slow"]
    four = [kind(target=download, args=(f"{server.url}/x.npz", path)) for _ in range(4)]
    for each in four:
        each.start()
    for each in four:
        each.join()
    assert path.read_bytes() == BODY and parts(path) == [len(BODY)]
    assert len(server.requests) == 1


def test_says_that_it_tries_again_and_what_else_there_is(server, path, capsys):
    message = error_of(server, path, *["close"] * 4)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("; again in ")[2] for line in said] == [
        f"{w} s" for w in module.RETRY_WAITS
    ]
    assert all(f"x.npz: attempt {i} of 4: " in line for i, line in enumerate(said, 1))
    for way in (f"put the file at {path} by hand", "BITKERN_WEIGHTS_URL", "--weights none"):
        assert way in message
