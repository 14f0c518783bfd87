"""Resized images that are kept: never stale, never lost, whatever happens to files."""

import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
from unittest.mock import Mock

import numpy as np
import pytest

from bitkern.transfer import DataError, HyperRule, train_batches
from bitkern.transfer import data as sources
from bitkern.transfer.data import decoders, disk_cache, open_images
from bitkern.transfer.data.disk_cache import cache_entries
from bitkern.transfer.data.open_images import ImageReadOptions, open_resized
from bitkern.transfer.data.resized import ResizedImages
from tests.transfer.images import image_set, picture, write_folder

RULE = HyperRule(12, 8, steps=6, decay_steps=(), warmup_steps=0, mixup_alpha=0.0, batch_size=10)
DISK = ImageReadOptions("disk")


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


@pytest.fixture
def images(folder):
    return sources.image_folder(folder, "train").images


@pytest.fixture
def decoded(monkeypatch):
    """The images that were decoded."""
    found = []

    def decode(source, size, region=None):
        found.append(str(source))
        return decoders.pillow(source, size)

    monkeypatch.setitem(decoders.DECODERS, "pillow", decode)
    return found


def expected(images, size=12):
    return np.stack([decoders.pillow(image, size) for image in images])


def the_entry():
    (entry,) = cache_entries()
    return entry


def test_later_runs_decode_nothing(images, decoded):
    first = open_resized(images, 12, DISK)
    chosen = first.cache
    assert np.array_equal(first.cached, expected(images)) and sorted(decoded) == images
    assert chosen.startswith("disk, 0.000 GB for 12 images of 12x12, ")
    for reading in (DISK, ImageReadOptions("auto")):
        again = open_resized(images, 12, reading, reused=False)
        assert np.array_equal(again.cached, first.cached) and len(decoded) == 12
        assert again.cache == f"disk, made before, {the_entry().folder}"


def test_nobody_writes_to_the_cache_and_whoever_uses_an_entry_keeps_it(images):
    for mode in ("disk", "ram"):
        resized = open_resized(images, 12, ImageReadOptions(mode))
        resized.cached[:] = 0
    used = open_resized(images, 12, DISK)
    assert the_entry().remove() and not cache_entries()
    assert np.array_equal(used.cached, expected(images))


def touch(path):
    os.utime(path, ns=(1, 1))


def replace(path):
    status = path.stat()
    shutil.copy(path.with_name("2.webp"), path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [touch, replace])
def test_changed_images_are_read_again(folder, images, change, decoded):
    open_resized(images, 12, DISK)
    change(folder / "train" / "bee" / "0.jpg")
    again = open_resized(images, 12, DISK)
    assert len(decoded) == 24 and np.array_equal(again.cached, expected(images))


def test_what_else_decides_the_pixels(images, decoded, monkeypatch):
    open_resized(images, 12, DISK)
    open_resized(images, 13, DISK)
    open_resized(images[::-1], 12, DISK)
    open_resized([picture(0, i) for i in range(3)], 12, DISK)
    open_resized([picture(1, i) for i in range(3)], 12, DISK)
    open_resized(images, 12, ImageReadOptions("disk", "torchvision"))
    monkeypatch.setattr(decoders.importlib.metadata, "version", lambda name: "0.1")
    open_resized(images, 12, DISK)
    assert len(cache_entries()) == 7 and len(decoded) == 12 + 12 + 12 + 3 + 3 + 12


def index_of(**changes):
    def change(entry):
        path = entry.folder / "index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def index_is(content):
    return lambda entry: (entry.folder / "index.json").write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: os.truncate(entry.pixels, 100),
        lambda entry: entry.pixels.unlink(),
        lambda entry: entry.pixels.write_bytes(b"\xff\x00\xff" + entry.pixels.read_bytes()[3:]),
        index_of(format=0),
        index_of(count=None),
        index_of(done="many"),
        index_of(done=13),
        index_of(more=1),
        index_of(notes=[1]),
        index_of(notes=3),
        index_is(b""),
        index_is(b"[1]"),
        index_is(b"\xff\xfe"),
    ],
)
def test_a_damaged_cache_is_made_again(images, damage, decoded):
    open_resized(images, 12, DISK)
    damage(the_entry())
    again = open_resized(images, 12, DISK)
    assert np.array_equal(again.cached, expected(images)) and len(decoded) == 24


def fill_and_die(images, killed_at):
    calls = itertools.count(1)

    def decode(source, size, region=None):
        if next(calls) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return decoders.pillow(source, size)

    disk_cache.BYTES_PER_SYNC = 3 * 12 * 12 * 3
    decoders.DECODERS["pillow"] = decode
    open_resized(images, 12, DISK)


@pytest.mark.parametrize("killed_at", [1, 5, 9, 12])
def test_a_killed_process_is_continued(images, killed_at, decoded):
    process = multiprocessing.get_context("fork").Process(
        target=fill_and_die, args=(images, killed_at)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    index = the_entry().read()
    done = index.done if index else 0
    assert done < 12 and done % 3 == 0
    resized = open_resized(images, 12, DISK)
    assert np.array_equal(resized.cached, expected(images))
    assert len(decoded) == 12 - done


def test_two_runs_at_once_fill_it_once(images, tmp_path):
    log = tmp_path / "log"

    def run():
        def decode(source, size, region=None):
            with open(log, "a") as file:
                file.write("x")
            return decoders.pillow(source, size)

        decoders.DECODERS["pillow"] = decode
        resized = open_resized(images, 12, DISK)
        assert np.array_equal(resized.cached, expected(images))

    processes = [multiprocessing.get_context("fork").Process(target=run) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert log.read_text() == 12 * "x"


def test_full_disk(images, monkeypatch):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=error))
    with pytest.raises(DataError, match=r"cache: .* \(No space left on device\): make room"):
        open_resized(images, 12, DISK)
    assert cache_entries() == []


def test_a_cache_that_cannot_be_made(images, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITKERN_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cache: .* cannot be written \(Not a directory\)"):
        open_resized(images, 12, DISK)


def test_limit(images, monkeypatch, capsys):
    size = 12 * 12 * 12 * 3
    monkeypatch.setenv("BITKERN_CACHE_LIMIT", str(2.5 * size / 1e9))
    open_resized(images, 12, DISK)
    oldest = the_entry()
    os.utime(oldest.folder / "index.json", (1, 1))
    used = open_resized(images[::-1], 12, DISK)
    open_resized(images[:6], 12, DISK)
    assert len(cache_entries()) == 3 and not capsys.readouterr().err
    open_resized(images[:7], 12, DISK)
    assert len(cache_entries()) == 3 and not oldest.folder.exists()
    assert capsys.readouterr().err == f"removed {oldest.folder}, to make room in the cache\n"
    monkeypatch.setenv("BITKERN_CACHE_LIMIT", str(1.6 * size / 1e9))
    with pytest.raises(DataError, match="cache: needs 0.0 GB, 0.0 are in use, the limit is 0.0:"):
        open_resized(images, 12, DISK)
    assert [entry.bytes() for entry in cache_entries()] == [size], "the one in use stays"
    del used
    open_resized(images, 12, DISK)
    monkeypatch.setenv("BITKERN_CACHE_LIMIT", "much")
    with pytest.raises(ValueError, match="BITKERN_CACHE_LIMIT: expected a number of GB, got"):
        open_resized(images[1:], 12, DISK)


def test_auto_continues_what_was_begun_though_it_fills_the_cache(images, monkeypatch):
    size = 12 * 12 * 12 * 3
    monkeypatch.setenv("BITKERN_CACHE_LIMIT", str(1.5 * size / 1e9))
    monkeypatch.setattr(open_images, "free_memory", lambda: 0)
    begun = ResizedImages(images, 12, decoders.pillow)
    entry, index = disk_cache.entry_for(begun, "pillow")
    entry.folder.parent.mkdir(parents=True)
    disk_cache._allocate(entry, size)
    entry.write(index)
    assert open_resized(images[::-1], 12, ImageReadOptions("auto")).cache.startswith("disk")
    assert len(cache_entries()) == 1, "the other one made room"
    disk_cache._allocate(entry, size)
    entry.write(index)
    found = open_resized(images, 12, ImageReadOptions("auto"))
    assert found.cache.startswith("disk") and np.array_equal(found.cached, expected(images))


@pytest.mark.parametrize(
    ("free", "room", "mode"), [(2.0, 0.0, "ram"), (1.9, 1.0, "disk"), (1.9, 0.9, "off")]
)
def test_auto_takes_what_there_is_room_for(free, room, mode, monkeypatch):
    images = image_set().images
    size = len(images) * 12 * 12 * 3
    monkeypatch.setattr(open_images, "free_memory", lambda: free * size)
    monkeypatch.setattr(open_images, "available_bytes", lambda: room * size)
    resized = open_resized(images, 12, ImageReadOptions("auto"))
    chosen = resized.cache
    assert chosen.startswith(f"{mode}, 0.000 GB for 15 images of 12x12, 0.0 GB of memory free")
    assert (resized.cached is None) == (mode == "off")
    chosen = open_resized(images, 13, ImageReadOptions("auto"), reused=False).cache
    assert chosen == "not needed, images are read once"


def test_ram_that_is_not_there(monkeypatch):
    monkeypatch.setattr(open_images, "free_memory", lambda: 100)
    with pytest.raises(DataError, match="cache: expected disk, off or auto, got ram: needs 0.0"):
        open_resized(image_set().images, 12, ImageReadOptions("ram"))


def test_a_file_larger_than_memory(tmp_path):
    resized = ResizedImages(range(1 << 20), 1 << 10, decoders.pillow)
    with open(tmp_path / "pixels", "w+b") as file:
        file.truncate(3 << 40)
        assert not disk_cache.map_pixels(file, resized)[-1].any()


def test_an_entry_that_is_made_again_while_it_is_opened(images, monkeypatch):
    """By another process, between its choice and its use: its pixels are not there yet."""
    open_resized(images, 12, DISK)
    open_complete = disk_cache.open_complete

    def then_begun_again(entry, resized):
        found = open_complete(entry, resized)
        disk_cache._allocate(entry, disk_cache.num_bytes(resized))
        return found

    monkeypatch.setattr(disk_cache, "open_complete", then_begun_again)
    assert np.array_equal(open_resized(images, 12, DISK).cached, expected(images))


def test_what_a_disk_did_not_give_is_asked_for_again(images, monkeypatch):
    def fails(source, size, region=None):
        if source == images[5]:
            raise DataError(f"{source}: not a readable image (Input/output error)")
        return decoders.pillow(source, size)

    skipping = ImageReadOptions("disk", skip_corrupt=True)
    monkeypatch.setitem(decoders.DECODERS, "pillow", fails)
    for _ in range(2):
        assert list(open_resized(images, 12, skipping).corrupt) == [5]
    with pytest.raises(DataError, match="Input/output error"):
        open_resized(images, 12, DISK)
    monkeypatch.setitem(decoders.DECODERS, "pillow", decoders.pillow)
    found = open_resized(images, 12, DISK)
    assert np.array_equal(found.cached, expected(images)) and not found.corrupt


def test_a_cache_that_one_may_only_read(images, monkeypatch):
    open_resized(images, 12, DISK)

    monkeypatch.setattr(os, "utime", Mock(side_effect=PermissionError))
    found = open_resized(images, 12, ImageReadOptions("auto"))
    assert np.array_equal(found.cached, expected(images))
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(open_images, "free_memory", lambda: 0)
    assert open_resized(images, 13, ImageReadOptions("auto")).cache.startswith("off, ")


def test_decoders(folder, images, monkeypatch):
    for image in [*images, picture(0, 0, 40, 30), picture(1, 0)[..., 0]]:
        pillow, torchvision = (decode(image, 12) for decode in decoders.DECODERS.values())
        assert torchvision.shape == (12, 12, 3) and torchvision.dtype == np.uint8
        assert np.abs(pillow.astype(int) - torchvision).max() <= 3
    broken = folder / "train" / "bee" / "0.jpg"
    broken.write_bytes(b"nothing")
    with pytest.raises(DataError, match=f"{broken}: torchvision cannot read it"):
        decoders.torchvision(broken, 12)
    with monkeypatch.context() as without:
        without.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match="torchvision is not installed: pip install 'torch"):
            decoders.find_decoder("torchvision")
    with pytest.raises(ValueError, match="decoder: expected pillow or torchvision, got 'PIL'"):
        train_batches(image_set(), RULE, seed=0, decoder="PIL")
    with pytest.raises(ValueError, match="cache: expected auto, ram, disk, off, got 'gpu'"):
        train_batches(image_set(), RULE, seed=0, cache="gpu")
