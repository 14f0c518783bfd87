"""Fine-tuning on shards and on Hugging Face datasets; ``bitkern cache``, and what uses it."""

import datasets
import pytest

from bitkern.transfer.data import decoders
from bitkern.transfer.data.disk_cache import cache_entries
from tests.cli.commands import SMALL, call, digest, error_of, finetune_error, json_of, summary_of
from tests.transfer.images import CLASSES, write_folder
from tests.transfer.shards import jpeg, write_shards


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITKERN_CACHE", str(tmp_path / "cache"))


def shards(folder):
    write_shards(folder, "test", shards=2, per_shard=3)
    return write_shards(folder), folder / "test-*.tar"


def dataset(folder):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    splits = {}
    for split, count in (("train", 12), ("test", 6)):
        labels = [i % 3 for i in range(count)]
        images = [{"bytes": jpeg(label)} for label in labels]
        columns = {"image": images, "label": labels}
        splits[split] = datasets.Dataset.from_dict(columns, datasets.Features(features))
    datasets.DatasetDict(splits).save_to_disk(str(folder / "saved"))
    return f"hfds:{folder / 'saved'}", f"hfds:{folder / 'saved'}"


@pytest.mark.parametrize("make", [shards, dataset])
def test_finetune_and_evaluate(make, tmp_path, capsys):
    train, test = make(tmp_path)
    for name, options in (("off", ["--cache", "off", "--no-check"]), ("disk", ["--cache", "disk"])):
        out = tmp_path / name
        assert call("finetune", "--data", train, "--out", out, *SMALL, *options) == 0
    assert len({digest(tmp_path / name)["model.safetensors"] for name in ("off", "disk")}) == 1
    summary = summary_of(out)
    assert (summary["training_images"], summary["evaluation_images"]) == (12, 6)
    found = json_of(capsys, "evaluate", out, "--data", test, "--workers", 2)
    assert found["top1"] == summary["top1"]


def test_the_same_shards_to_train_on_and_to_test_with(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    out = tmp_path / "runs" / "out"
    both = write_shards(tmp_path, shards=1, per_shard=6).with_name("train-000000.tar")
    both = both.rename(tmp_path / "all.tar")
    message = finetune_error(capsys, both, out)
    assert "is in the training set and in the test set: name the split" in message
    options = [*SMALL, "--holdout", "0.4", "--steps", "1"]
    assert call("finetune", "--data", both, "--out", out, *options) == 0
    assert summary_of(out)["evaluated_on"] == "holdout"


def test_list_and_clear(tmp_path, capsys):
    folder = write_folder(tmp_path / "data")
    assert call("cache", "list") == 0
    assert f"0 entries, 0.00 GB in {tmp_path}/cache/images" in capsys.readouterr().out
    finetune = ["finetune", "--data", folder, *SMALL, "--steps", 1, "--out"]
    assert call(*finetune, tmp_path / "first", "--cache", "disk") == 0
    shown = capsys.readouterr().out
    assert "image cache, training: disk, 0.000 GB for 12 images of 40x40, " in shown
    assert "image cache, evaluation: disk, 0.000 GB for 6 images of 32x32, " in shown
    assert call(*finetune, tmp_path / "second") == 0
    assert "image cache, training: disk, made before, " in capsys.readouterr().out

    # The last used first, but two within a tick of the clock in any order.
    rows = sorted(json_of(capsys, "cache", "list"), key=lambda row: row["images"])
    assert [(row["images"], row["done"], row["size"]) for row in rows] == [(6, 6, 32), (12, 12, 40)]
    assert rows[1]["bytes"] == 12 * 40 * 40 * 3 and rows[1]["data"] == f"{folder}/train"
    (tmp_path / "cache" / "images" / rows[0]["key"] / "index.json").write_text("{")
    assert call("cache", "list") == 0
    table = capsys.readouterr().out.splitlines()
    assert any(f"12  100%    40     0.00  {rows[1]['used']}" in line for line in table), table
    assert any(line.startswith(rows[0]["key"]) and "damaged" in line for line in table), table
    assert table[-1].startswith("2 entries, 0.00 GB in ")

    missing = error_of(capsys, "cache", "clear", rows[0]["key"], "0123")
    assert missing == f"0123: no such entry in {tmp_path}/cache/images"
    assert call("cache", "clear", rows[0]["key"]) == 0
    assert capsys.readouterr().out == "deleted 1 of 2 entries, 0.0 GB\n"
    (entry,) = cache_entries()
    with entry.lock:
        busy = error_of(capsys, "cache", "clear")
    assert busy.startswith(f"{entry.folder}: cannot be deleted: another process is filling it")
    assert call("cache", "clear") == 0 and not cache_entries()


def test_decoder_is_kept_to(tmp_path, monkeypatch):
    folder, out = write_folder(tmp_path / "data"), tmp_path / "out"
    options = ["--decoder", "torchvision", "--steps", 1]
    assert call("finetune", "--data", folder, "--out", out, *SMALL, *options) == 0
    assert summary_of(out)["decoder"] == "torchvision"
    monkeypatch.setitem(decoders.DECODERS, "pillow", None)
    assert call("evaluate", out, "--data", folder, "--workers", 0) == 0
    assert call("predict", out, folder / "test", "--workers", 0) == 0
