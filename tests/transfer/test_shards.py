"""Images in tar files."""

import json
import os
import pickle
import re
import resource
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import webdataset

from bitkern.transfer import DataError, hold_out
from bitkern.transfer.data import shards, tar
from bitkern.transfer.data.decoders import read_image
from bitkern.transfer.data.shards import image_shards, is_shards
from tests.transfer.shards import TWO, assert_reads_alike, jpeg, sample, write_shards, write_tar


@pytest.fixture
def scans(monkeypatch):
    """The shards whose headers are read, as it happens."""
    read, members = [], tar.members

    def counting(file, path):
        read.append(os.path.basename(path))
        return members(file, path)

    monkeypatch.setattr(tar, "members", counting)
    return read


def labelled(stated):
    """Members whose labels are those of ``.json`` files."""
    for i, value in enumerate(stated):
        yield f"{i}.png", jpeg(0, i)
        yield f"{i}.json", json.dumps(value).encode()


def error_of(tmp_path, members, **options):
    path = write_tar(tmp_path / "train.tar", members)
    with pytest.raises(DataError) as caught:
        image_shards(path, "train", **options)
    message = str(caught.value)
    assert "\n" not in message and "train.tar" in message
    return message


def test_what_webdataset_writes_and_reads(tmp_path):
    pattern = str(tmp_path / "train-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
        for i in range(10):
            some = {"jpg": jpeg(i % 3, i), "cls": i % 3, "txt": "a caption", "seg.png": b"mask"}
            writer.write({"__key__": f"folder.d/Größe {i}", **some})
    source = str(tmp_path / "train-{000000..000002}.tar")
    found = image_shards(source, "train")
    theirs = list(webdataset.WebDataset(source, shardshuffle=False, empty_check=False))
    assert [m.name for m in found.images] == [f"{s['__key__']}.jpg" for s in theirs]
    assert [m.read() for m in found.images] == [s["jpg"] for s in theirs]
    assert found.labels.tolist() == [int(s["cls"]) for s in theirs]
    assert found.labels.dtype == np.int64 and found.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("name", "shards_named"),
    [
        ("train-{000000..000002}.tar", 3),
        ("train-{000000,000002}.tar", 2),
        ("train-*.tar", 3),
        ("train-00000[01].tar", 2),
        ("train-000001.tar", 1),
    ],
)
def test_shards_named(tmp_path, name, shards_named):
    write_shards(tmp_path)
    found = image_shards(tmp_path / name, "train")
    assert len(found.images) == 4 * shards_named
    assert len({image.shard for image in found.images}) == shards_named
    first = found.images[0]
    assert str(first) == f"{tmp_path}/train-00000{shards_named == 1:d}.tar: {first.name}"


def test_is_shards():
    assert is_shards("a/train-{0..3}.tar") and is_shards("train.tar.gz")
    assert not any(map(is_shards, ("data.tar/train", "cats.target", "digits")))


def test_a_folder_whose_name_is_a_pattern(tmp_path):
    folder = tmp_path / "[a]*"
    folder.mkdir()
    write_shards(folder)
    assert len(image_shards(folder / "train-*.tar", "train").images) == 12


def test_splits(tmp_path):
    source = write_shards(tmp_path)
    with pytest.raises(DataError, match=r"no test shards: .*test-\*.tar, or holdout"):
        image_shards(source, "test")
    write_shards(tmp_path, "test", shards=5)
    found = image_shards(source, "test")
    assert len(found.images) == 20 and found.images[0].name == "test0.jpg"
    assert len(image_shards(tmp_path / "test-{000000..000001}.tar", "test").images) == 8
    assert len(image_shards(tmp_path / "train-*.tar", "test").images) == 20
    with pytest.raises(DataError, match="val-0.tar: no such shard"):
        image_shards(tmp_path / "val-{0..1}.tar", "test")


@pytest.mark.parametrize(
    ("stated", "labels", "classes"),
    [
        ([{"label": 2}, {"label": 0}], [2, 0], ("0", "1", "2")),
        ([{"label": "b"}, {"label": "ä", "x": 1}], [0, 1], ("b", "ä")),
        ([{"labels": [1]}, {"labels": []}], [[0, 1], [0, 0]], ("0", "1")),
        ([{"labels": ["b", "a", "b"]}, {"labels": ["c"]}], [[1, 1, 0], [0, 0, 1]], ("a", "b", "c")),
    ],
)
def test_labels(tmp_path, stated, labels, classes):
    found = image_shards(write_tar(tmp_path / "x.tar", labelled(stated)), "train")
    assert found.labels_of(slice(None)).astype(int).tolist() == labels and found.classes == classes
    assert found.labels.dtype == (np.bool_ if found.multi_label else np.int64)
    kept = found.subset(np.array([1]))
    assert [m.name for m in kept.images] == ["1.png"]


def test_names_of_classes(tmp_path):
    path = write_tar(tmp_path / "train.tar", TWO)
    (tmp_path / "classes.txt").write_text("\ufeffant\r\nbee\r\ncät\r\n\r\n", encoding="utf-8")
    assert image_shards(path, "train").classes == ("ant", "bee", "cät")
    assert image_shards(path, "train", ("x", "y")).classes == ("x", "y")
    write_tar(path, labelled([{"label": "bee"}, {"label": "ant"}]))
    assert image_shards(path, "train").labels.tolist() == [1, 0]
    assert image_shards(path, "train", ("bee", "ant")).labels.tolist() == [0, 1]
    with pytest.raises(DataError, match="1.png: label: expected one of 2 classes, got 'ant'"):
        image_shards(path, "train", ("bee", "cat"))


@pytest.mark.parametrize(
    ("text", "message"), [("a\n\nb", "line 2"), ("a\nb\na", "line 3.*'a'"), ("", "line 1")]
)
def test_bad_names_of_classes(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=f"classes.txt: {message}"):
        image_shards(write_tar(tmp_path / "train.tar", TWO), "train")


def test_any_order_and_what_is_no_sample(tmp_path):
    folder = tarfile.TarInfo("d.x")
    folder.type = tarfile.DIRTYPE
    odd = [(folder, None), ("./d.x/b.cls", b" 1\n"), ("d.x/a.CLS", b"0"), ("LICENSE", b"")]
    odd += [("._b.jpg", b"of a Mac"), ("d.x/a.json", b'{"width": 5}'), ("d.x/a.txt", b"")]
    odd += [("d.x/a.JPeG", jpeg(0)), ("./d.x/b.webp", jpeg(1)), ("d.x/a.seg.png", b"mask")]
    found = image_shards(write_tar(tmp_path / "x.tar", odd), "train")
    assert [m.name for m in found.images] == ["./d.x/b.webp", "d.x/a.JPeG"]
    assert found.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*TWO, ("c.jpg", b"")], "train.tar: c: expected a label, in .cls or .json, got none"),
        ([*TWO, ("c.jpg", b""), ("c.json", b"{}")], "c: expected a label"),
        ([*TWO, ("c.cls", b"0")], "train.tar: c: expected an image, got none"),
        ([*TWO, ("c.txt", b"")], "train.tar: c: expected an image, got none"),
        ([*TWO, ("ü/a.png", b""), ("ü/a.jpg", b"")], "train.tar: ü/a: a second image, .jpg"),
        ([*TWO, *sample("a", 0)], "train.tar: a: a second image"),
        ([*TWO, ("a.cls", b"0")], "train.tar: a: two labels, both .cls"),
        ([*TWO, *[("c.json", b"{}")] * 2], "train.tar: c: two labels, both .json"),
        ([("a.cls", b"0"), ("a.exr", b"")], "no images: .* found cls, exr"),
        ([], "no images: .* found no files"),
        ([("a.jpg", b""), ("a.cls", b"-1")], "a: label: expected a number from 0 to .*, got -1"),
        ([("a.jpg", b""), ("a.cls", b"cat")], "a: label: expected an integer, got 'cat'"),
        ([("a.jpg", b""), ("a.cls", b"1_0")], "a: label: expected an integer"),
        ([("a.jpg", b""), ("a.cls", b"\xff\n\n")], "a: label: expected an integer"),
        ([("a.jpg", b""), ("a.cls", b"9" * 5000)], "a: label: expected an integer"),
        ([("a.jpg", b""), ("a.cls", b"9" * 12)], "a: label: expected a number from 0 to"),
        ([("a.jpg", b""), ("a.cls", b" " * (1 << 20) + b"1")], "expected a short file"),
        ([("a.jpg", b""), ("a.json", b"\xff")], "a: not JSON"),
        ([("a.jpg", b""), ("a.json", b"[" * 100_000)], "a: not JSON"),
        (labelled([{"label": True}]), "0: label: expected an integer or a name, got True"),
        (labelled([{"label": ""}]), "expected an integer or a name"),
        (labelled([{"label": 1.0}]), "expected an integer or a name"),
        (labelled([{"label": -1}]), "expected a number from 0"),
        (labelled([{"labels": 3}]), "labels: expected a list, got 3"),
        (labelled([{"label": 3, "labels": []}]), "expected label or labels, got both"),
        (labelled([{"labels": [1, "a"]}]), "expected (names|integers), as in"),
        (labelled([{"label": 1}, {"labels": [1]}]), "1: expected one label, .* several labels"),
        (labelled([{"labels": []}, {"label": 1}]), "1: expected several labels, .* one label"),
        (labelled([{"label": 1}, {"label": "a"}]), "1: expected integers, .* got names"),
        ([*TWO, *labelled([{"labels": [1]}])], "train.tar: 0: expected one label"),
        (sample("a", 0), "holds labels of 1 classes, need two"),
        (labelled([{"labels": []}]), "holds labels of 0 classes, need two"),
    ],
)
def test_bad_samples(tmp_path, members, message):
    assert re.search(message, error_of(tmp_path, members))


def test_no_index_of_bad_shards(tmp_path, cache):
    error_of(tmp_path, [*TWO, ("c.jpg", b"")])
    assert not (cache / "shards").exists()


def test_more_classes_than_names(tmp_path):
    error = error_of(tmp_path, [*TWO, *sample("c", 2)], classes=("x", "y"))
    assert error.endswith("c.jpg: label: more classes than names: expected a number below 2, got 2")
    error = error_of(tmp_path, labelled([{"labels": []}, {"labels": [0, 5]}]), classes=("x", "y"))
    assert "1.png: label: more classes than names" in error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.tar", "none.tar: no such shard"),
        ("none-{0..2}.tar", "none-0.tar: no such shard"),
        ("none-*.tar", r"none-\*.tar: no such shards"),
        ("none-{0..2.tar", "Unbalanced"),
        ("folder.tar", "folder.tar: expected a tar file, got a folder"),
    ],
)
def test_missing_shards(tmp_path, name, message):
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(DataError, match=message):
        image_shards(tmp_path / name, "train")


def overwrite(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(jpeg(0), jpeg(0)[::-1]))
    os.utime(path, ns=(0, 5))


def replace(path):
    write_tar(path.with_name("new"), [*TWO, *sample("c", 2)])
    os.replace(path.with_name("new"), path)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    "change", [overwrite, replace, lambda path: os.truncate(path, 600), lambda path: path.unlink()]
)
def test_changed_since_it_was_indexed(tmp_path, change, opened):
    path = write_tar(tmp_path / "x.tar", TWO)
    image = image_shards(path, "train").images[0]
    if opened:
        image.read()
    change(path)
    try:
        assert image.read() == jpeg(0) and opened, "from the file that is open still"
    except OSError:
        with pytest.raises(DataError, match=f"{path}: a.jpg: not a readable image"):
            read_image(image)


def test_index_is_made_once(tmp_path, cache, scans):
    source = write_shards(tmp_path)
    first = image_shards(source, "train")
    assert len(scans) == 3
    again = image_shards(source, "train")
    assert len(scans) == 3
    assert list(first.images) == list(again.images) and (first.labels == again.labels).all()
    assert [m.version for m in first.images] == [m.version for m in again.images]
    assert len({m.version for m in again.images}) == 12
    (index,) = (cache / "shards").iterdir()
    assert index.suffix == ".npz"
    os.utime(tmp_path / "train-000001.tar", ns=(0, 0))
    changed = image_shards(source, "train")
    same = [a.version == b.version for a, b in zip(first.images, changed.images, strict=True)]
    assert len(scans) == 6 and same == [True] * 4 + [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:200] + bytes(100) + data[300:],
        lambda data: pickle.dumps({}),
    ],
)
def test_damaged_index_is_made_again(tmp_path, cache, scans, damage):
    source = write_shards(tmp_path)
    image_shards(source, "train")
    (index,) = (cache / "shards").iterdir()
    whole = index.read_bytes()
    index.write_bytes(damage(whole))
    assert len(image_shards(source, "train").images) == 12 and len(scans) == 6
    assert len(index.read_bytes()) == len(whole)
    image_shards(source, "train")
    assert len(scans) == 6


@pytest.mark.parametrize("full", [False, True])
def test_without_a_cache(tmp_path, cache, monkeypatch, capfd, full):
    if full:
        monkeypatch.setattr(np, "savez", lambda *_, **__: os.write(os.open("/dev/full", 1), b"x"))
    else:
        (cache / "shards").write_text("a file")
    assert len(image_shards(write_shards(tmp_path), "train").images) == 12
    (line,) = capfd.readouterr().err.splitlines()
    assert "cannot keep the index" in line


def test_threads_processes_and_copies(tmp_path):
    found = image_shards(write_shards(tmp_path, shards=4, per_shard=30), "train")
    assert_reads_alike(found, [jpeg(i % 3) for i in range(120)])


def test_more_shards_than_files_may_be_open_and_all_are_closed(tmp_path):
    base = write_tar(tmp_path / "0.tar", TWO)
    for i in range(1, 1000):
        os.link(base, tmp_path / f"{i}.tar")
    shards._opened.cache_clear()
    before = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        found = image_shards(tmp_path / "{0..999}.tar", "train")
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda m: m.read(), list(found.images) * 2))
        assert read == [jpeg(0), jpeg(1)] * 2000
        assert shards._opened.cache_info().currsize <= shards.OPEN_SHARDS
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    shards._opened.cache_clear()
    assert len(os.listdir("/proc/self/fd")) == before


def test_parts_of_a_set(tmp_path):
    found = image_shards(write_shards(tmp_path), "train")
    assert [m.name for m in found.images] == [f"train{i}.jpg" for i in range(12)]
    with pytest.raises(IndexError):
        found.images[12]
    kept, held = hold_out(found, 0.25, seed=0)
    assert (len(kept.images), len(held.images)) == (9, 3)
    for part in (kept, held):
        assert [m.read() for m in part.images] == [jpeg(label) for label in part.labels.tolist()]


def test_moved_by_a_link(tmp_path):
    path = write_tar(tmp_path / "blob", TWO)
    (tmp_path / "train.tar").symlink_to(path)
    image = image_shards(tmp_path / "train.tar", "train").images[0]
    assert str(image) == f"{tmp_path}/train.tar: a.jpg" and image.version.startswith(f"{path}:")
    shutil.copy(write_tar(tmp_path / "other", sample("c", 2)), tmp_path / "new.tar")
    (tmp_path / "train.tar").unlink()
    assert image.read() == jpeg(0)
