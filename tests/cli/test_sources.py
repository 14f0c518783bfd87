"""Fine-tuning on shards and on Hugging Face datasets, with and without a cache."""

import io
import json

import datasets
import pytest
from PIL import Image

from tests.cli.commands import SMALL, call, digest, finetune_error
from tests.transfer.images import CLASSES, picture, write_folder
from tests.transfer.shards import write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITKERN_CACHE", str(tmp_path / "cache"))


def encoded(label, number):
    buffer = io.BytesIO()
    Image.fromarray(picture(label, number)).save(buffer, "PNG")
    return buffer.getvalue()


def shards(folder):
    for split, count in (("train", 4), ("test", 2)):
        for part in range(2):
            members = []
            for label, name in enumerate(CLASSES):
                for i in range(part, count, 2):
                    key, number = f"{name}/{split}{i}", 100 * (split == "test") + i
                    members += [(f"{key}.png", encoded(label, number))]
                    members += [(f"{key}.cls", str(label).encode())]
            write_tar(folder / f"{split}-{part:06}.tar", members)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    return folder / "train-{000000..000001}.tar", folder / "test-*.tar"


def dataset(folder):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    splits = {}
    for split, count in (("train", 4), ("test", 2)):
        rows = [(label, i) for label in range(3) for i in range(count)]
        offset = 100 * (split == "test")
        images = [{"bytes": encoded(label, offset + i)} for label, i in rows]
        columns = {"image": images, "label": [label for label, _ in rows]}
        splits[split] = datasets.Dataset.from_dict(columns, datasets.Features(features))
    datasets.DatasetDict(splits).save_to_disk(str(folder / "saved"))
    return f"hfds:{folder / 'saved'}", f"hfds:{folder / 'saved'}"


@pytest.mark.parametrize("make", [shards, dataset])
def test_finetune_and_evaluate(make, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    train, test = make(folder)
    runs = []
    for number, options in enumerate((["--cache", "off", "--no-check"], ["--cache", "disk"], [])):
        out = tmp_path / f"run{number}"
        assert call("finetune", "--data", train, "--out", out, *SMALL, *options) == 0
        runs.append(digest(out)["model.safetensors"])
    assert runs[0] == runs[1] == runs[2]
    assert "image cache, training: disk, made before, " in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["training_images"], summary["evaluation_images"]) == (12, 6)
    assert call("evaluate", out, "--data", test, "--json", "--workers", 2) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == summary["top1"]


def test_the_same_shards_to_train_on_and_to_test_with(tmp_path, capsys):
    folder, out = tmp_path / "data", tmp_path / "runs" / "out"
    folder.mkdir()
    out.parent.mkdir()
    shards(folder)
    both = (folder / "train-000000.tar").rename(folder / "all.tar")
    message = finetune_error(capsys, both, out)
    assert "is in the training set and in the test set: name the split" in message
    assert call("finetune", "--data", both, "--out", out, *SMALL, "--holdout", "0.4") == 0


def test_a_folder_whose_name_has_tar_in_it(tmp_path):
    folder = write_folder(tmp_path / "a.target")
    assert call("finetune", "--data", folder, "--out", tmp_path / "out", *SMALL) == 0
