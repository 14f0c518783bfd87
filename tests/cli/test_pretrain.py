"""``bitkern pretrain`` on tar shards, and what comes after it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bitkern.models import (
    create_model,
    load_npz,
    read_checkpoint,
    save_npz,
    save_safetensors,
)
from bitkern.transfer import load_run
from tests import ROOT
from tests.cli.commands import RESULTS, SMALL, call, digest, error_of
from tests.transfer.images import write_folder
from tests.transfer.shards import jpeg, sample, write_shards, write_tar

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
    assert sorted(path.name for path in run.iterdir()) == RESULTS
    summary = json.loads((run / "summary.json").read_text())
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
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["weights"] == str(run)


def test_official_keys_and_timm(shards, tmp_path):
    run = tmp_path / "run"  # of a network that timm has as well
    options = [*TINY, "--model", "R50x1", "--steps", "1", "--warmup-steps", "0"]
    assert call("pretrain", "--data", shards, "--out", run, "--preset", "BiT-S", *options) == 0
    for target, out in (("npz", tmp_path / "bit.npz"), ("timm", tmp_path / "timm")):
        assert call("export", run, "--to", target, "--out", out) == 0
    x = torch.randn(2, 3, 32, 32)
    expected = load_run(run).model.eval()(x)
    assert expected.abs().max() > 0
    with np.load(tmp_path / "bit.npz") as arrays:
        assert arrays["resnet/root_block/standardized_conv2d/kernel"].shape == (7, 7, 3, 64)
        assert arrays["resnet/head/conv2d/kernel"].shape == (1, 1, 2048, 3)
    loaded = create_model("R50x1", num_classes=3)
    load_npz(loaded, tmp_path / "bit.npz")
    assert torch.equal(loaded.eval()(x), expected)
    import timm  # not before, since it imports Triton, which tests/backends/triton has to set up

    other = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    torch.testing.assert_close(other(x), expected, atol=1e-4, rtol=1e-3)


def test_evaluate_and_predict(run, shards, tmp_path, capsys):
    assert call("evaluate", run, "--data", shards, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert found["top1"] == summary["top1"]
    assert found["eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("several", [False, True])
def test_sigmoids(shards, several, tmp_path, capsys):
    data = shards
    if several:
        data = labelled(tmp_path, [["ant", "bee"], ["bee"], ["cat"], ["ant"], ["bee", "cat"]])
        labelled(tmp_path, [["ant"], ["bee", "cat"]], "test")
    out = tmp_path / "out"
    assert call("pretrain", "--data", data, "--out", out, "--preset", "BiT-M", *TINY) == 0
    told = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["multi_label"] and summary["rule"]["sigmoid"]
    precision = summary["mean_average_precision"]
    assert 0 <= precision <= 1 and f"mean average precision {100 * precision:.1f} % on" in told
    report = json.loads((out / "report.json").read_text())
    assert report["mean_average_precision"] == pytest.approx(precision)
    # Three classes, so each begins with the chance of one in four.
    assert -2 < read_checkpoint(out / "model.safetensors")["head.fc.bias"].mean() < -0.5
    assert call("evaluate", out, "--data", data, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mean_average_precision"] == pytest.approx(precision)
    assert found["eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-6)
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    assert call("predict", out, tmp_path / "a.jpg", "--json") == 0
    (predicted,) = json.loads(capsys.readouterr().out)
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
    arguments = ["--data", shards, "--preset", "BiT-S", "--batch-split", "2", *TINY]
    arguments = ["pretrain", *arguments, "--out", tmp_path / "out"]

    def interrupt(record):
        if record.get("step") == 3:
            os.kill(os.getpid(), signal.SIGINT)

    from bitkern.transfer.run import Journal

    add = Journal.add

    def added(self, **record):
        add(self, **record)
        interrupt(record)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "add", added)
        assert call(*arguments) == 130
    out = tmp_path / "out"
    assert f"to continue: bitkern pretrain --resume --out {out}" in capsys.readouterr().err
    assert call("pretrain", "--resume", "--out", out) == 0
    kept, expected = digest(tmp_path / "out"), digest(run)
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
        (["--preset", "BiT-XL"], "argument --preset: invalid choice: 'BiT-XL'"),
        (["--warmup-steps", "5000"], "warmup_steps: expected fewer than the 6 steps"),
        (["--steps", "6", "--epochs", "2"], "steps: expected no epochs beside them, got 2.0"),
        (["--image-size", "0"], "argument --image-size: expected a positive whole number"),
        (["--min-area", "2"], "min_area: expected a fraction up to 1, got 2.0"),
        (["--base-lr", "nan"], "base_lr: expected a positive finite number, got nan"),
        (["--batch-split", "8"], "batch_split: expected 1 to 7, the batch size, got 8"),
        (["--weights", "none.npz"], "none.npz: no such file"),
        (["--model", "R26"], "name: unknown model 'R26'; did you mean R26x0.5"),
    ],
)
def test_bad_options(shards, tmp_path, capsys, options, message):
    assert message in pretrain_error(capsys, shards, tmp_path / "out", *options)


def test_set_too_small_for_the_warm_up(shards, tmp_path, capsys):
    options = ["--data", shards, "--preset", "BiT-S", "--model", "R50x1", "--out", tmp_path / "out"]
    message = "warmup_steps: expected fewer than the 1 steps of the training, got 5000"
    assert error_of(capsys, "pretrain", *options) == message


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


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [*sample("a", 0), ("b.jpg", jpeg(1)), ("b.cls", b"3")],
            "b.jpg: label: more classes than names: expected a",
        ),
        (
            [*sample("a", 0), ("b.jpg", jpeg(1)), ("b.cls", b"-1")],
            ": b: label: expected a number from 0 to",
        ),
        ([*sample("a", 0), ("b.jpg", jpeg(0))], "b: expected a label, in .cls or .json, got none"),
    ],
)
def test_bad_labels(tmp_path, capsys, members, message):
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    data = write_tar(tmp_path / "train-0.tar", members)
    assert message in pretrain_error(capsys, data, tmp_path / "out", "--holdout", "0.5")


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
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        command += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        command += ["-m", "bitkern", *map(str, arguments), "--out", str(out), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)

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
