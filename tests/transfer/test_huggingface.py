"""Images in the tables of Hugging Face's ``datasets``."""

import importlib.util
import os
import re
import socket

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, LargeList, List, Value

from bitkern.transfer import DataError, hold_out
from bitkern.transfer.data import check_apart
from bitkern.transfer.data.decoders import read_image
from bitkern.transfer.data.huggingface import image_dataset, is_dataset
from bitkern.transfer.data.shards import image_shards
from tests.transfer.shards import assert_reads_alike, jpeg

NAMES = ["bee", "ant", "cät"]
ANIMAL = ClassLabel(names=NAMES)


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    """A cache of its own, no names of servers, and no progress bars."""

    def refuse(*args, **_):
        raise AssertionError(f"asks for {args}")

    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    datasets.disable_progress_bars()


def table(labels=(0, 1, 2, 0), label=ANIMAL, column="label", /, **columns):
    """A dataset of pictures of the classes 0, 1, 2, 0, … with these labels."""
    encoded = [{"bytes": jpeg(i % 3, i), "path": None} for i in range(len(labels))]
    features = Features({"pixels": Image(), column: label})
    features |= {name: feature for name, (feature, _) in columns.items()}
    values = {name: value for name, (_, value) in columns.items()}
    return Dataset.from_dict({"pixels": encoded, column: list(labels)} | values, features=features)


def saved(path, dataset):
    dataset.save_to_disk(path)
    return f"hfds:{path}"


def write_arrow(dataset, path):
    rows = dataset.with_format("arrow")[:]
    schema = rows.schema.with_metadata(dataset.data.schema.metadata)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_table(rows.cast(schema))


def write_files(root, layout):
    """The files of ``layout``, {path: labels}; returns the source."""
    for name, labels in layout.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            table(labels).to_parquet(path)
        elif path.suffix == ".arrow":
            write_arrow(table(labels), path)
        else:
            path.write_text("train, test")
    return f"hfds:{root}"


def error_of(source, split="train", classes=None):
    with pytest.raises(DataError) as caught:
        image_dataset(source, split, classes)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(source)
    return message


def test_is_dataset(tmp_path):
    assert is_dataset("hfds:a/b") and not is_dataset("a/hfds:b") and not is_dataset(tmp_path)


def test_saved_splits(tmp_path):
    source = saved(tmp_path / "d", DatasetDict(train=table(), validation=table([2, 1])))
    found = image_dataset(source, "train")
    assert [m.read() for m in found.images] == [jpeg(i % 3, i) for i in range(4)]
    assert found.labels.tolist() == [0, 1, 2, 0] and found.labels.dtype == np.int64
    assert found.classes == tuple(NAMES)
    assert str(found.images[1]) == f"{source}: train: row 1"
    assert read_image(found.images[2]).size == (17, 13)
    test_set = image_dataset(source, "test", found.classes)
    assert test_set.labels.tolist() == [2, 1] and "validation: row 0" in str(test_set.images[0])
    check_apart(found, test_set, source)
    both = DatasetDict(train=table(), validation=table([2, 1]), test=table([1]))
    assert image_dataset(saved(tmp_path / "e", both), "test").labels.tolist() == [1]


def test_one_dataset_is_every_split(tmp_path):
    source = saved(tmp_path / "d", table())
    train_set, test_set = (image_dataset(source, split) for split in ("train", "test"))
    assert (train_set.labels == test_set.labels).all()
    with pytest.raises(DataError, match="row 0 is in the training set and in the test set"):
        check_apart(train_set, test_set, source)
    assert str(train_set.images[0]) == f"{source}: row 0"


PARTS = ("train", [0, 1, 2]), ("validation", [1])


@pytest.mark.parametrize(
    ("layout", "splits"),
    [
        ({"train-0.parquet": [0, 1], "train-1.parquet": [2], "test-0.parquet": [1]}, 2),
        ({"train/a.parquet": [0, 1], "train/b.parquet": [2], "test/a.parquet": [1]}, 2),
        ({f"data/{part}-00000-of-00001.parquet": labels for part, labels in PARTS}, 2),
        ({"train-0.arrow": [0, 1], "train-1.arrow": [2], "dev.arrow": [1], "train.md": []}, 2),
        ({"a.parquet": [0, 1, 2], "README.md": []}, 1),
        ({"x.arrow": [0, 1, 2]}, 1),
    ],
)
def test_files(tmp_path, layout, splits):
    source = write_files(tmp_path / "ü d", layout)
    found = image_dataset(source, "train")
    assert found.labels.tolist() == [0, 1, 2] and found.classes == tuple(NAMES)
    assert found.images[1].read() == jpeg(1, 1)
    if splits == 2:
        assert image_dataset(source, "test").labels.tolist() == [1]
    else:
        assert error_of(source, "test").endswith("test or validation, or holdout, found train")


@pytest.mark.parametrize(
    ("column", "feature", "values", "labels", "classes"),
    [
        ("animal", ANIMAL, [2, 0, 1], [2, 0, 1], NAMES),
        ("label", Value("int64"), [2, 0, 1], [2, 0, 1], "012"),
        ("labels", Value("uint8"), [1, 0, 1], [1, 0, 1], "01"),
        ("label", Value("string"), ["b", "ä", "b"], [0, 1, 0], "bä"),
        ("label", Value("large_string"), ["b", "a", "b"], [1, 0, 1], "ab"),
        ("tags", List(ANIMAL), [[2, 0], [], [1]], [[1, 0, 1], [0, 0, 0], [0, 1, 0]], NAMES),
        ("tags", LargeList(ANIMAL), [[2], [1, 1], []], [[0, 0, 1], [0, 1, 0], [0, 0, 0]], NAMES),
        ("tags", List(ANIMAL, length=1), [[2], [1], [0]], [[0, 0, 1], [0, 1, 0], [1, 0, 0]], NAMES),
        ("labels", List(Value("int32")), [[1], [], [0]], [[0, 1], [0, 0], [1, 0]], "01"),
        ("labels", List(Value("string")), [["b"], ["a", "b"], []], [[0, 1], [1, 1], [0, 0]], "ab"),
    ],
)
def test_labels(tmp_path, column, feature, values, labels, classes):
    found = image_dataset(saved(tmp_path / "d", table(values, feature, column)), "train")
    assert found.classes == tuple(classes)
    assert found.labels_of(slice(None)).astype(int).tolist() == labels
    assert found.labels.dtype == (np.bool_ if found.multi_label else np.int64)


def test_given_classes(tmp_path):
    source = saved(tmp_path / "d", table([2, 0]))
    found = image_dataset(source, "train", ("ant", "cät", "dog", "bee"))
    assert found.classes == ("ant", "cät", "dog", "bee") and found.labels.tolist() == [1, 3]
    error = error_of(source, classes=("ant", "bee"))
    assert error.endswith("row 0: label: expected one of 2 classes, got 'cät'")
    numbers = saved(tmp_path / "n", table([0, 2], Value("int64")))
    assert image_dataset(numbers, "train", "abc").classes == ("a", "b", "c")
    assert "row 1: label: more classes than names" in error_of(numbers, classes=("x", "y"))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (table([[0], [1, -1]], List(ANIMAL)), "row 1: label: expected a number from 0 to"),
        (table([0, None]), "row 1: label: expected a label, got none"),
        (table([[0], None], List(ANIMAL)), "row 1: label: expected a label, got none"),
        (table([[0], [None]], List(ANIMAL)), "label: expected labels, got none in a list"),
        (table([0, 10**12], Value("int64")), "row 1: label: expected a number from 0 to"),
        (table([0], ClassLabel(names=["a"])), "holds labels of 1 classes, need two"),
        (table([0.5], Value("float32")), "expected one column of labels, found none among"),
        (table([1], Value("int8"), "class"), "found none among pixels, class"),
        (table(fine=(ANIMAL, [0] * 4)), "expected one column of labels, found label, fine"),
        (table(more=(Image(), [None] * 4)), "expected one column of images, found pixels, more"),
        (table().remove_columns("pixels"), "expected one column of images, found none among label"),
        (table().remove_columns("label"), "expected one column of labels, found none among pixels"),
        (table([0], Value("int8"), labels=(Value("string"), ["a"])), "found label, labels"),
    ],
)
def test_bad_tables(tmp_path, dataset, message):
    assert re.search(message, error_of(saved(tmp_path / "d", dataset)))


def write(path, data=b"nothing"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "no such folder; expected hfds:FOLDER"),
        (lambda root: write(root, b""), "no such folder"),
        (lambda root: root.mkdir(), "found none"),
        (lambda root: write_files(root, {"test.parquet": [0, 1]}), "split train, found test"),
        (lambda root: write_files(root, {"train.parquet": []}), "cannot be read: .* no data"),
        (lambda root: write_files(root, {"train.arrow": []}), "train: holds no images"),
        (lambda root: write(root / "train.parquet"), "cannot be read: .*[Pp]arquet"),
        (lambda root: write(root / "train.arrow"), "cannot be read"),
        (lambda root: write_files(root, {"train.parquet": [0], "train.arrow": [1]}), "found both"),
        (lambda root: write(root / "dataset_dict.json"), "cannot be read"),
        (lambda root: write(root / "state.json", b"{}"), "cannot be read"),
        (lambda root: saved(root, DatasetDict(x=table())), "split train, found x"),
    ],
)
def test_bad_folders(tmp_path, make, message):
    make(tmp_path / "d")
    assert re.search(message, error_of(f"hfds:{tmp_path / 'd'}"))


@pytest.mark.parametrize("keep", [0, 200])
def test_truncated(tmp_path, keep):
    source = saved(tmp_path / "d", table())
    (data,) = (tmp_path / "d").glob("*.arrow")
    os.truncate(data, keep)
    assert "cannot be read" in error_of(source)


def test_an_image_may_be_missing(tmp_path):
    images = [None, {"bytes": b"no image", "path": None}]
    dataset = table([0, 1]).remove_columns("pixels").add_column("pixels", images, feature=Image())
    found = image_dataset(saved(tmp_path / "d", dataset), "train")
    with pytest.raises(DataError, match=r"row 0: not a readable image \(no image in the row\)"):
        read_image(found.images[0])
    with pytest.raises(DataError, match="row 1: not a readable image"):
        read_image(found.images[1])


def test_images_in_files_of_their_own(tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(2)]
    for i, path in enumerate(paths):
        path.write_bytes(jpeg(i))
    features = Features({"image": Image(), "label": ANIMAL})
    # Not as save_to_disk would write it, which takes the files in.
    rows = {"image": [str(path) for path in paths], "label": [0, 1]}
    (tmp_path / "d").mkdir()
    write_arrow(Dataset.from_dict(rows, features=features), tmp_path / "d" / "train.arrow")
    found = image_dataset(f"hfds:{tmp_path / 'd'}", "train")
    assert [m.read() for m in found.images] == [jpeg(0), jpeg(1)]
    before = [m.version for m in found.images]
    paths[1].write_bytes(jpeg(2))
    os.utime(paths[1], ns=(0, 7))
    after = [m.version for m in found.images]
    assert after[0] == before[0] and after[1] != before[1]
    paths[0].unlink()
    assert found.images[0].version
    with pytest.raises(DataError, match="row 0: not a readable image"):
        read_image(found.images[0])


@pytest.mark.parametrize("kind", ["saved", "train.parquet", "train.arrow"])
def test_versions(tmp_path, kind):
    def versions(labels):
        if kind == "saved":
            saved(tmp_path / "d", DatasetDict(train=table(labels), test=table(labels)))
        else:
            layout = {kind: labels, kind.replace("train", "test"): labels}
            write_files(tmp_path / "d", layout)
        found = [image_dataset(f"hfds:{tmp_path / 'd'}", split) for split in ("train", "test")]
        return [m.version for part in found for m in part.images]

    first = versions([0, 1, 2])
    assert len(set(first)) == 6 and all(isinstance(version, str) for version in first)
    (tmp_path / "d").rename(tmp_path / "old")
    assert not set(first) & set(versions([0, 1, 2, 0]))


def test_what_it_was_saved_with(tmp_path):
    shuffled = table([0, 1, 2, 0]).select([3, 1]).with_format("numpy")
    found = image_dataset(saved(tmp_path / "d", shuffled), "train")
    assert [m.read() for m in found.images] == [jpeg(0, 3), jpeg(1, 1)]
    assert found.labels.tolist() == [0, 1]


def test_threads_processes_and_copies(tmp_path):
    found = image_dataset(saved(tmp_path / "d", table([i % 3 for i in range(40)])), "train")
    assert_reads_alike(found, [jpeg(i % 3, i) for i in range(40)])
    kept, held = hold_out(found, 0.25, seed=0)
    assert {m.row for m in kept.images} | {m.row for m in held.images} == set(range(40))


def test_the_environment_stays(tmp_path):
    before = dict(os.environ), datasets.config.HF_HUB_OFFLINE
    image_dataset(write_files(tmp_path / "d", {"train.parquet": [0, 1]}), "train")
    assert (dict(os.environ), datasets.config.HF_HUB_OFFLINE) == before


def test_without_the_libraries(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"datasets is not .*: pip install 'bitkern\[large\]'"):
        image_dataset(f"hfds:{tmp_path}", "train")
    with pytest.raises(ValueError, match=r"webdataset is not .*: pip install 'bitkern\[large\]'"):
        image_shards(tmp_path / "train-{0..1}.tar", "train")
