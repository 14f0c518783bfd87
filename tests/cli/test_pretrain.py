"""``bitkern pretrain`` on tar shards, and what comes after it."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from bitkern.models import create_model, read_checkpoint, save_npz, save_safetensors
from bitkern.transfer.run import Journal
from tests.cli.commands import SMALL, call, digest, error_of, json_of, summary_of
from tests.transfer.distributed import torchrun
from tests.transfer.images import write_folder
from tests.transfer.net import FILES
from tests.transfer.shards import jpeg, write_shards, write_tar

TINY = ["--model", "R26x0.5", "--image-size", "32", "--batch-size", "7", "--workers", "0"]
TINY += ["--steps", "6", "--warmup-steps", "2", "--base-lr", "0.5", "--device", "cpu"]


def labelled(folder, labels, split="train"):
    """Shards whose images have these lists of labels."""
    members = []
    for i, some in enumerate(labels):
        members += [(f"{split}{i}.jpg", jpeg(i % 3, i))]
        members += [(f"{split}{i}.json", json.dumps({"labels": some}).encode())]
    return write_tar(folder / f"{split}-000000.tar", members)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, "test", shards=1)
    return write_shards(folder, shards=3)


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A finished pre-training with a softmax."""
    out = tmp_path_factory.mktemp("run") / "out"
    options = ["--preset", "BiT-S", "--batch-split", "2"]
    assert call("pretrain", "--data", shards, "--out", out, *options, *TINY) == 0
    return out


def test_files_of_a_run(run):
    assert sorted(path.name for path in run.iterdir()) == FILES
    summary = summary_of(run)
    assert summary["preset"] == "BiT-S" and summary["weights"] is None
    assert summary["rule"]["decay_steps"] == [2, 4, 5] and summary["steps"] == 6
    assert 0 <= summary["top1"] <= 1 and summary["training_images"] == 12
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [record["lr"] for record in records if "lr" in record]
    peak = 0.5 * 7 / 256
    assert rates == pytest.approx([0, peak / 2, peak / 10, peak / 10, peak / 100, peak / 1000])


def test_finetune_from_it(run, tmp_path):
    data = write_folder(tmp_path / "data")
    options = ["--data", data, "--weights", run, "--out", tmp_path / "out", "--base-lr", "1e-9"]
    assert call("finetune", *options, *SMALL) == 0
    before, after = (read_checkpoint(f / "model.safetensors") for f in (run, tmp_path / "out"))
    for name, tensor in after.items():
        if not name.startswith("head."):
            assert torch.allclose(tensor, before[name], atol=1e-5), name
    assert summary_of(tmp_path / "out")["weights"] == str(run)


@pytest.mark.parametrize("several", [False, True])
def test_sigmoids(shards, several, tmp_path, capsys):
    data = shards
    if several:
        data = labelled(tmp_path, [["ant", "bee"], ["bee"], ["cat"], ["ant"], ["bee", "cat"]])
        labelled(tmp_path, [["ant"], ["bee", "cat"]], "test")
    out = tmp_path / "out"
    assert call("pretrain", "--data", data, "--out", out, "--preset", "BiT-M", *TINY) == 0
    told = capsys.readouterr().out
    summary = summary_of(out)
    assert summary["multi_label"] and summary["rule"]["sigmoid"]
    precision = summary["mean_average_precision"]
    assert 0 <= precision <= 1 and f"mean average precision {100 * precision:.1f} % on" in told
    report = json.loads((out / "report.json").read_text())
    assert report["mean_average_precision"] == pytest.approx(precision)
    # Three classes, so each begins with the chance of one in four.
    assert -2 < read_checkpoint(out / "model.safetensors")["head.fc.bias"].mean() < -0.5
    found = json_of(capsys, "evaluate", out, "--data", data)
    assert found["mean_average_precision"] == pytest.approx(precision)
    assert found["eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-6)
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (predicted,) = json_of(capsys, "predict", out, tmp_path / "a.jpg")
    chances = [each["probability"] for each in predicted["predictions"]]
    assert len(chances) == 3 and sum(chances) != pytest.approx(1)


def test_starts_from_weights_with_their_head(run, shards, tmp_path):
    out = tmp_path / "out"
    options = ["--data", shards, "--preset", "BiT-S", "--weights", run, "--out", out]
    assert call("pretrain", *options, *TINY, "--base-lr", "1e-9") == 0
    before, after = (read_checkpoint(folder / "model.safetensors") for folder in (run, out))
    for name, tensor in after.items():
        assert torch.allclose(tensor, before[name], atol=1e-5), name


def test_resumed_after_an_interrupt(run, shards, tmp_path, monkeypatch, capsys):
    out, add = tmp_path / "out", Journal.add
    arguments = ["--data", shards, "--preset", "BiT-S", "--batch-split", 2, *TINY, "--out", out]

    def interrupted(self, **record):
        add(self, **record)
        if record["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", interrupted)
        assert call("pretrain", *arguments) == 130
    assert f"to continue: bitkern pretrain --resume --out {out}" in capsys.readouterr().err
    assert call("pretrain", "--resume", "--out", out) == 0
    kept, expected = digest(out), digest(run)
    for name in ("metrics.jsonl", "model.safetensors", "predictions.csv"):
        assert kept[name] == expected[name], name


def pretrain_error(capsys, data, out, *options):
    """The message of a call that must leave no file behind."""
    before = sorted(out.parent.iterdir())
    options = ["--data", data, "--preset", "BiT-S", "--out", out, *TINY, *options]
    message = error_of(capsys, "pretrain", *options)
    assert sorted(out.parent.iterdir()) == before
    return message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--warmup-steps", "5000"], "warmup_steps: expected fewer than the 6 steps"),
        (["--steps", "6", "--epochs", "2"], "steps: expected no epochs beside them, got 2.0"),
        (["--min-area", "2"], "min_area: expected a fraction up to 1, got 2.0"),
        (["--base-lr", "nan"], "base_lr: expected a positive finite number, got nan"),
        (["--weights", "none.npz"], "none.npz: no such file"),
        (["--model", "R26"], "name: unknown model 'R26'; did you mean R26x0.5"),
    ],
)
def test_bad_options(shards, tmp_path, capsys, options, message):
    assert message in pretrain_error(capsys, shards, tmp_path / "out", *options)


def test_weights_whose_head_does_not_fit(shards, tmp_path, capsys):
    path = tmp_path / "weights.npz"
    save_npz(create_model("R26x0.5", num_classes=5), path)
    message = pretrain_error(capsys, shards, tmp_path / "out", "--weights", path)
    expected = f"weights: expected a head of 3 classes as {shards} has, got {path} with 5"
    assert message == expected
    other = tmp_path / "other.safetensors"
    save_safetensors(create_model("R26x0.5", num_classes=3), other, classes=["ant", "bee", "cow"])
    message = pretrain_error(capsys, shards, tmp_path / "out", "--weights", other)
    assert message.startswith(f"{other}: expected the 3 classes of {shards}; missing: 0, 1, 2")
    (tmp_path / "empty").mkdir()
    message = pretrain_error(capsys, shards, tmp_path / "out", "--weights", tmp_path / "empty")
    assert message.endswith("holds no model.safetensors; expected the folder of a finished run")


def test_images_without_a_label_and_several_for_a_softmax(tmp_path, capsys):
    data = labelled(tmp_path, [["ant"], [], ["bee", "ant"], ["bee"]])
    labelled(tmp_path, [["ant"], ["bee"]], "test")
    message = pretrain_error(capsys, data, tmp_path / "out")
    assert message == "loss: expected sigmoid for several labels per image, got softmax"
    message = pretrain_error(capsys, data, tmp_path / "out", "--loss", "sigmoid")
    assert message == f"{data}: {data}: train1.jpg: expected a label, got none"


def children(pid):
    """The processes that a process started, and theirs."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            yield child
            yield from children(child)


@pytest.mark.sweep
def test_two_processes_killed_ten_times(shards, tmp_path):
    arguments = ["pretrain", "--data", shards, "--preset", "BiT-M", "--batch-split", 2, *TINY]
    arguments += ["--steps", 60, "--batch-size", 8, "--eval-every", 20, "--checkpoint-every", 3]
    moments = random.Random(0)

    def start(out, *options):
        return torchrun(2, "bitkern", *arguments, "--out", out, *options)

    straight = start(tmp_path / "straight")
    _, errors = straight.communicate(timeout=300)
    assert straight.returncode == 0, errors

    out, kills = tmp_path / "killed", 0

    def written():
        path = out / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    while True:
        process = start(out, *(["--resume"] if (out / "last.pt").exists() else []))
        if kills == 10:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            break
        # Within the steps up to the second checkpoint or so; one of the two, or all at once.
        wanted = written() + moments.randrange(1, 6)
        while process.poll() is None and written() < wanted:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        workers = list(children(process.pid))
        assert len(workers) >= 2
        for pid in [workers[kills % 3 % 2]] if kills % 2 else [process.pid, *workers]:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=120)
        kills += 1
        assert not (out / "summary.json").exists()
    kept, expected = digest(out), digest(tmp_path / "straight")
    for results in (kept, expected):
        summary = json.loads(results.pop("summary.json"))
        seconds = summary.pop("seconds")
        assert seconds > 0 and summary["processes"] == 2
    for name in expected:
        if not name.startswith("report"):  # which say how long it took
            assert kept[name] == expected[name], name
