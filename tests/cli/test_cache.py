"""``bitkern cache``, and commands that use it."""

import json

import pytest

from bitkern.transfer.data import decoders
from bitkern.transfer.data.disk_cache import cache_entries
from tests.cli.commands import SMALL, call, digest, error_of
from tests.transfer.images import write_folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BITKERN_CACHE", str(tmp_path / "cache"))
    return write_folder(tmp_path / "data")


def test_list_and_clear(folder, tmp_path, capsys):
    assert call("cache", "list") == 0
    assert f"0 entries, 0.00 GB in {tmp_path}/cache/images" in capsys.readouterr().out
    finetune = ["finetune", "--data", folder, *SMALL, "--out"]
    assert call(*finetune, tmp_path / "first", "--cache", "disk") == 0
    shown = capsys.readouterr().out
    assert "image cache, training: disk, 0.000 GB for 12 images of 40x40, " in shown
    assert "image cache, evaluation: disk, 0.000 GB for 6 images of 32x32, " in shown
    assert call(*finetune, tmp_path / "second") == 0
    assert "image cache, training: disk, made before, " in capsys.readouterr().out
    assert call(*finetune, tmp_path / "third", "--cache", "off", "--no-check") == 0
    weights = {
        digest(tmp_path / name)["model.safetensors"] for name in ("first", "second", "third")
    }
    assert len(weights) == 1

    capsys.readouterr()
    assert call("cache", "list", "--json") == 0
    # The last used first, but two within a tick of the clock in any order.
    rows = sorted(json.loads(capsys.readouterr().out), key=lambda row: row["images"])
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
    assert busy == f"{entry.folder}: a process is filling it, or it may not be deleted"
    assert call("cache", "clear") == 0 and not cache_entries()


def test_decoder_is_kept_to(folder, tmp_path, capsys, monkeypatch):
    finetune = ["finetune", "--data", folder, *SMALL, "--out"]
    out = tmp_path / "out"
    assert call(*finetune, out, "--decoder", "torchvision") == 0
    assert json.loads((out / "summary.json").read_text())["decoder"] == "torchvision"

    def never(source, size, region=None):
        raise AssertionError("expected the decoder of the training")

    monkeypatch.setitem(decoders.DECODERS, "pillow", never)
    assert call("evaluate", out, "--data", folder, "--workers", 0) == 0
    assert call("predict", out, folder / "test", "--workers", 0) == 0
