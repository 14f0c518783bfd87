"""Resized images that are kept: never stale, never lost, whatever happens to files."""

import errno
import json
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import torch

from bitkern.transfer import DataError, HyperRule, ImageSet, loop, train_batches
from bitkern.transfer import data as sources
from bitkern.transfer.data import cache, decoders, memory, opening
from bitkern.transfer.data.opening import Reading, open_resized
from tests.transfer.images import CLASSES, image_set, picture, write_folder
from tests.transfer.net import Crash, Net, crash_always

RULE = HyperRule(12, 8, steps=6, decay_steps=(), warmup_steps=0, mixup_alpha=0.0, batch_size=10)
MODES = [("ram", None), ("disk", None), ("off", True), ("off", False)]
DISK = Reading("disk")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The images, apart from the cache."""
    monkeypatch.setenv("BITKERN_CACHE", str(tmp_path / "cache"))
    return write_folder(tmp_path / "data")


@pytest.fixture
def decoded(monkeypatch):
    """The images that were decoded."""
    found = []

    def decode(source, size):
        found.append(str(source))
        return decoders.pillow(source, size)

    monkeypatch.setitem(decoders.DECODERS, "pillow", decode)
    return found


def images_in(folder):
    return sources.image_folder(folder, "train").images


def expected(images, size=12):
    return np.stack([decoders.pillow(image, size) for image in images])


def the_entry():
    (entry,) = cache.entries()
    return entry


def test_later_runs_decode_nothing(folder, decoded):
    images = images_in(folder)
    first, chosen = open_resized(images, 12, DISK)
    assert np.array_equal(first.kept, expected(images)) and sorted(decoded) == images
    assert chosen.startswith("disk, 0.000 GB for 12 images of 12x12, ")
    for reading in (DISK, Reading("auto")):
        again, chosen = open_resized(images, 12, reading, again=False)
        assert np.array_equal(again.kept, first.kept) and len(decoded) == 12
        assert chosen == f"disk, made before, {the_entry().folder}"


def test_nobody_writes_to_the_cache(folder):
    images = images_in(folder)
    for mode in ("disk", "ram"):
        resized, _ = open_resized(images, 12, Reading(mode))
        resized.kept[:] = 0
    assert np.array_equal(open_resized(images, 12, DISK)[0].kept, expected(images))


def touch(path):
    os.utime(path, ns=(1, 1))


def replace(path):
    status = path.stat()
    shutil.copy(path.with_name("2.webp"), path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [touch, replace])
def test_changed_images_are_read_again(folder, change, decoded):
    images = images_in(folder)
    open_resized(images, 12, DISK)
    change(folder / "train" / "bee" / "0.jpg")
    again, _ = open_resized(images, 12, DISK)
    assert len(decoded) == 24 and np.array_equal(again.kept, expected(images))


def test_what_else_decides_the_pixels(folder, decoded, monkeypatch):
    images = images_in(folder)
    open_resized(images, 12, DISK)
    open_resized(images, 13, DISK)
    open_resized(images[::-1], 12, DISK)
    open_resized([picture(0, i) for i in range(3)], 12, DISK)
    open_resized([picture(1, i) for i in range(3)], 12, DISK)
    open_resized(images, 12, Reading("disk", "torchvision"))
    monkeypatch.setattr(decoders.importlib.metadata, "version", lambda name: "0.1")
    open_resized(images, 12, DISK)
    assert len(cache.entries()) == 7 and len(decoded) == 12 + 12 + 12 + 3 + 3 + 12


def truncate(entry):
    os.truncate(entry.pixels, 100)


def lose_pixels(entry):
    entry.pixels.unlink()


def flip_a_byte(entry):
    with open(entry.pixels, "r+b") as file:
        file.write(b"\xff\x00\xff")


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
        truncate,
        lose_pixels,
        flip_a_byte,
        index_of(format=0),
        index_of(count=None),
        index_of(done="many"),
        index_of(done=13),
        index_of(more=1),
        index_is(b""),
        index_is(b"[1]"),
        index_is(b"\xff\xfe"),
    ],
)
def test_a_damaged_cache_is_made_again(folder, damage, decoded):
    images = images_in(folder)
    open_resized(images, 12, DISK)
    damage(the_entry())
    again, _ = open_resized(images, 12, DISK)
    assert np.array_equal(again.kept, expected(images)) and len(decoded) == 24


def fill_and_die(images, killed_at):
    seen = []

    def decode(source, size):
        seen.append(source)
        if len(seen) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return decoders.pillow(source, size)

    cache.BYTES_PER_SYNC = 3 * 12 * 12 * 3
    decoders.DECODERS["pillow"] = decode
    open_resized(images, 12, DISK)


@pytest.mark.parametrize("killed_at", [1, 5, 9, 12])
def test_a_killed_process_is_continued(folder, killed_at, decoded):
    images = images_in(folder)
    process = multiprocessing.get_context("fork").Process(
        target=fill_and_die, args=(images, killed_at)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    index = the_entry().read()
    done = index.done if index else 0
    assert done < 12 and done % 3 == 0
    resized, _ = open_resized(images, 12, DISK)
    assert np.array_equal(resized.kept, expected(images))
    assert len(decoded) == 12 - done


def test_two_runs_at_once_fill_it_once(folder, tmp_path):
    images, log = images_in(folder), tmp_path / "log"

    def run(number):
        def decode(source, size):
            with open(log, "a") as file:
                file.write("x")
            return decoders.pillow(source, size)

        decoders.DECODERS["pillow"] = decode
        resized, _ = open_resized(images, 12, DISK)
        assert np.array_equal(resized.kept, expected(images))

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(number,)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == 12 * "x"


def test_full_disk(folder, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(DataError, match=r"cache: .* \(No space left on device\): make room"):
        open_resized(images_in(folder), 12, DISK)
    assert cache.entries() == []


def test_a_cache_that_cannot_be_made(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITKERN_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cache: .* cannot be written \(Not a directory\)"):
        open_resized(images_in(folder), 12, DISK)


def test_limit(folder, monkeypatch, capsys):
    images = images_in(folder)
    size = 12 * 12 * 12 * 3
    monkeypatch.setenv("BITKERN_CACHE_LIMIT", str(2.5 * size / 1e9))
    first, _ = open_resized(images, 12, DISK)
    oldest = the_entry()
    os.utime(oldest.folder / "index.json", (1, 1))
    open_resized(images[::-1], 12, DISK)
    open_resized(images[:6], 12, DISK)
    assert len(cache.entries()) == 3 and not capsys.readouterr().err
    open_resized(images[:7], 12, DISK)
    assert len(cache.entries()) == 3 and not oldest.folder.exists()
    assert capsys.readouterr().err == f"removed {oldest.folder}, to make room in the cache\n"
    assert np.array_equal(first.kept, expected(images)), "whoever uses it keeps it"
    monkeypatch.setenv("BITKERN_CACHE_LIMIT", str(0.9 * size / 1e9))
    with pytest.raises(DataError, match="cache: needs 0.0 GB, the limit is 0.0: raise"):
        open_resized(images, 12, DISK)
    monkeypatch.setenv("BITKERN_CACHE_LIMIT", "much")
    with pytest.raises(ValueError, match="BITKERN_CACHE_LIMIT: expected a number of GB, got"):
        open_resized(images, 12, DISK)


def batches(data, cache, check, **options):
    rule, options = RULE, {"seed": 0, "workers": 2, **options}
    return train_batches(data, rule, cache=cache, check=check, **options)


@pytest.mark.parametrize("name", ["0.jpg", "1.png", "2.webp"])
@pytest.mark.parametrize(("mode", "check"), MODES)
def test_corrupt_image(folder, name, mode, check):
    broken = folder / "train" / "bee" / name
    broken.write_bytes(broken.read_bytes()[:-40])
    data = sources.image_folder(folder, "train")
    with pytest.raises(DataError, match=f"{broken}: not a readable image .*skip_corrupt=True"):
        list(batches(data, mode, check))
    place, following = data.images.index(str(broken)), f"{int(name[0]) + 1}."
    repaired = [*data.images]
    repaired[place] = next(image for image in data.images if f"bee/{following}" in image)
    loading = batches(data, mode, check, skip_corrupt=True)
    pairs = zip(loading, batches(data._replace(images=repaired), "off", None), strict=True)
    for (x, y), (other_x, other_y) in pairs:
        assert torch.equal(x, other_x) and torch.equal(y, other_y)
    assert list(loading.resized.corrupt) == [place]


@pytest.mark.parametrize(("mode", "check"), MODES)
def test_the_label_goes_with_the_image(mode, check, tmp_path):
    """The last image of the first class is corrupt: the next one is of the second."""
    (tmp_path / "broken").write_bytes(b"nothing")
    images = [picture(0, 0), tmp_path / "broken", picture(1, 0)]
    data = ImageSet(images, np.array([0, 0, 1]), CLASSES[:2])
    labels = torch.cat([y for _, y in batches(data, mode, check, skip_corrupt=True)])
    assert labels.tolist().count(1) == 40 and len(labels) == 60


@pytest.mark.parametrize(("mode", "check"), MODES)
def test_every_image_is_corrupt(folder, mode, check):
    data = sources.image_folder(folder, "train")
    for image in data.images:
        open(image, "w").close()
    with pytest.raises(DataError, match="nor can any other image be read"):
        list(batches(data, mode, check, skip_corrupt=True))


def test_large_sets_are_not_checked(folder, decoded, monkeypatch):
    monkeypatch.setattr(opening, "CHECKED", 11)
    for mode in ("off", "auto"):
        batches(sources.image_folder(folder, "train"), mode, None)
        assert not decoded
    batches(sources.image_folder(folder, "test"), "off", None)
    assert len(decoded) == 6


@pytest.mark.parametrize(
    ("free", "room", "mode"), [(2.0, 0.0, "ram"), (1.9, 1.0, "disk"), (1.9, 0.9, "off")]
)
def test_auto_takes_what_there_is_room_for(free, room, mode, monkeypatch):
    images = image_set().images
    size = len(images) * 12 * 12 * 3
    monkeypatch.setattr(opening, "free_memory", lambda: free * size)
    monkeypatch.setattr(cache, "room", lambda: room * size)
    resized, chosen = open_resized(images, 12, Reading("auto"))
    assert chosen.startswith(f"{mode}, 0.000 GB for 15 images of 12x12, 0.0 GB of memory free")
    assert (resized.kept is None) == (mode == "off")
    _, chosen = open_resized(images, 13, Reading("auto"), again=False)
    assert chosen == "off, images are read once"


def test_ram_that_is_not_there(monkeypatch):
    monkeypatch.setattr(opening, "free_memory", lambda: 100)
    with pytest.raises(DataError, match="cache: expected disk, off or auto, got ram: needs 0.0"):
        open_resized(image_set().images, 12, Reading("ram"))


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 5000 * 1024),
        ({"memory.max": "max", "memory.current": "9"}, 5000 * 1024),
        ({"memory.max": "1000", "memory.current": "900", "memory.stat": "inactive_file 50"}, 150),
        ({"memory.max": "10", "memory.current": "20", "memory.stat": "file 1"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "2000",
                "memory/memory.usage_in_bytes": "500",
                "memory/memory.stat": "cache 1\ntotal_inactive_file 100",
            },
            1600,
        ),
    ],
)
def test_free_memory(tmp_path, monkeypatch, files, free):
    assert 0 < memory.free_memory() < 1 << 50
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:   5000 kB\n")
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free_memory() == free


def test_decoders(folder):
    images = images_in(folder)
    for image in [*images, picture(0, 0, 40, 30), picture(1, 0)[..., 0]]:
        pillow, torchvision = (decode(image, 12) for decode in decoders.DECODERS.values())
        assert torchvision.shape == (12, 12, 3) and torchvision.dtype == np.uint8
        assert np.abs(pillow.astype(int) - torchvision).max() <= 3
    broken = folder / "train" / "bee" / "0.jpg"
    broken.write_bytes(b"nothing")
    with pytest.raises(DataError, match=f"{broken}: torchvision cannot read it"):
        decoders.torchvision(broken, 12)
    with pytest.raises(ValueError, match="decoder: expected pillow or torchvision, got 'PIL'"):
        train_batches(image_set(), RULE, seed=0, decoder="PIL")
    with pytest.raises(ValueError, match="cache: expected auto, ram, disk, off, got 'gpu'"):
        train_batches(image_set(), RULE, seed=0, cache="gpu")


def test_a_class_of_corrupt_images_alone(folder):
    for path in (folder / "train" / "cat").iterdir():
        path.write_bytes(b"nothing")
    data = sources.image_folder(folder, "train")
    for mode in ("ram", "off"):
        with pytest.raises(DataError, match="cat: every image is corrupt; replace them"):
            loop.train(Net(), data, RULE, cache=mode, skip_corrupt=True)


@pytest.mark.parametrize(("mode", "check"), MODES)
def test_resumed_after_the_corrupt_image_was_repaired(folder, tmp_path, mode, check):
    """It is left out as before, so the bits are those of an uninterrupted run."""
    broken = folder / "train" / "bee" / "1.png"
    sound = broken.read_bytes()
    broken.write_bytes(b"nothing")
    data = sources.image_folder(folder, "train")
    options = {"cache": mode, "check": check, "skip_corrupt": True, "progress": False}
    options |= {"eval_set": sources.image_folder(folder, "test"), "checkpoint_every": 2}
    straight, stopped, resumed = Net(), Net(), Net()
    expected = loop.train(straight, data, RULE, **options)
    assert expected.skipped == 1
    out = tmp_path / "run"
    stopped.on_call = lambda call: call == 5 and crash_always()
    with pytest.raises(Crash):
        loop.train(stopped, data, RULE, out=out, **options)
    broken.write_bytes(sound)
    result = loop.train(resumed, data, RULE, out=out, resume=True, **options)
    assert result.history == expected.history and result.skipped == 1
    assert json.loads((out / "summary.json").read_text())["skipped_images"] == 1
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
