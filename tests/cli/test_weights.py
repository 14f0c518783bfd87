"""Weights by name on the command line: fetched once, then used without a server."""

from unittest.mock import Mock

import pytest
import torch

from bitkern.models import create_model, read_checkpoint, save_npz, save_safetensors
from tests.cli.commands import SMALL, call, error_of, json_of, summary_of
from tests.models.weights.server import npz, serving
from tests.transfer.distributed import torchrun
from tests.transfer.images import write_folder

TINY = ["--resize", 40, "--crop", 32, "--batch-size", 2, "--workers", 0, "--steps", 1]


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BITKERN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_list_fetch_path(cache, monkeypatch, capsys):
    with serving({"/distill/R50x1_224.npz": npz(0)}) as server:
        monkeypatch.setenv("BITKERN_WEIGHTS_URL", server.url)
        name, path = "distill/R50x1_224", cache / "distill" / "R50x1_224.npz"
        message = f"{name}: not in the cache; bitkern weights fetch downloads it"
        assert error_of(capsys, "weights", "path", name) == message
        assert not cache.exists()
        assert call("weights", "fetch", name) == 0
        assert capsys.readouterr().out == f"{path}\n"
        for action in ("fetch", "path"):
            assert json_of(capsys, "weights", action, name) == {"name": name, "path": str(path)}
        assert "404 Not Found" in error_of(capsys, "weights", "fetch", "BiT-S-R50x3")
        assert len(server.requests) == 2
    rows = {row.pop("name"): row for row in json_of(capsys, "weights", "list")}
    assert [known for known, row in rows.items() if row["cached"]] == [name]
    assert rows["BiT-M-R101x3"] == {
        "architecture": "R101x3",
        "classes": 21843,
        "source": f"{server.url}/BiT-M-R101x3.npz",
        "cached": False,
    }
    assert call("weights", "list") == 0
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 2
    assert "BiT-L was never released" in error_of(capsys, "weights", "fetch", "BiT-L-R50x1")
    assert "required: list|fetch|path" in error_of(capsys, "weights")


@pytest.mark.sweep
def test_finetune_fetches_once(cache, tmp_path, monkeypatch, capsys):
    data = write_folder(tmp_path / "data")
    torch.manual_seed(1)
    save_npz(create_model("R50x1", 2), tmp_path / "x.npz")
    arguments = ["finetune", "--data", data, "--model", "BiT-M-R50x1", *TINY, "--base-lr", 1e-9]
    served = {"/BiT-M-R50x1.npz": (tmp_path / "x.npz").read_bytes()}
    with serving(served) as server:
        monkeypatch.setenv("BITKERN_WEIGHTS_URL", server.url)
        assert call(*arguments, "--out", tmp_path / "first") == 0
        assert "BiT-M-R50x1 from BiT-M-R50x1: 12 training" in capsys.readouterr().out
        assert len(server.requests) == 1
    assert call(*arguments, "--out", tmp_path / "second", "--weights", "pretrained") == 0
    assert len(server.requests) == 1
    began = read_checkpoint(tmp_path / "x.npz")["stages.0.blocks.0.conv1.weight"]
    for run in (tmp_path / "first", tmp_path / "second"):
        ended = read_checkpoint(run / "model.safetensors")["stages.0.blocks.0.conv1.weight"]
        assert torch.allclose(ended, began, atol=1e-6) and began.std() > 1e-3
        assert summary_of(run)["weights"] == "BiT-M-R50x1"


def test_random_weights_where_none_were_released(run, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BITKERN_WEIGHTS_URL", "http://127.0.0.1:9")  # never asked
    arguments = ["finetune", "--data", run / "data", *SMALL, "--steps", "1"]
    assert call(*arguments, "--out", tmp_path / "out") == 0
    assert "R26x0.5 from random weights: " in capsys.readouterr().out
    error = error_of(capsys, *arguments, "--out", tmp_path / "other", "--weights", "pretrained")
    assert error.startswith("R26x0.5: no such file or folder, nor weights of this name")
    resumed = ["--model", "BiT-M-R50x1", "--resume", "--out", tmp_path / "out"]
    assert "nothing to resume" in error_of(capsys, *arguments, *resumed)
    assert not cache.exists()


def test_resume_fetches_nothing(run, weights, tmp_path, monkeypatch, capsys):
    asked = Mock(side_effect=OSError("asked"))
    arguments = ["finetune", "--data", run / "data", *SMALL, "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr("bitkern.transfer.run.draw_curves", asked)
        assert error_of(capsys, *arguments, "--weights", weights) == "asked"
    monkeypatch.setattr("bitkern.models.registry.fetch", asked)
    assert error_of(capsys, *arguments[:-1], tmp_path, "--weights", "hf-hub:org/x") == "asked"
    assert call(*arguments, "--weights", "hf-hub:org/x", "--resume") == 0


@pytest.mark.sweep
def test_under_torchrun_the_first_process_fetches(tmp_path, monkeypatch):
    data = write_folder(tmp_path / "data")
    save_safetensors(create_model("R26x0.5", 4), tmp_path / "x.safetensors")
    path = "/org/small/resolve/main/model.safetensors"
    with serving({path: (tmp_path / "x.safetensors").read_bytes()}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        arguments = ["--data", data, *SMALL, "--device", "cpu", "--out", tmp_path / "out"]
        process = torchrun(2, "bitkern", "finetune", *arguments, "--weights", "hf-hub:org/small")
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert [asked for asked, _ in server.requests].count(path) == 1
    assert summary_of(tmp_path / "out")["processes"] == 2
