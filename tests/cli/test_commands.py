"""The command line end to end."""

import csv
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

import bitkern
from bitkern.models import read_checkpoint
from bitkern.transfer import inference, loop
from bitkern.transfer.run import Journal
from bitkern.transfer.step import TrainStep
from tests.cli.commands import SMALL, call, error_of, json_of, summary_of
from tests.process import python
from tests.transfer.images import CLASSES
from tests.transfer.net import FILES


def test_finetune_evaluate_predict(run, capsys):
    out, folder = run / "out", run / "data"
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert Image.open(out / "curves.png").format == "PNG"
    summary = summary_of(out)
    assert summary["rule"]["steps"] == summary["steps"] == 3
    assert (summary["training_images"], summary["evaluation_images"]) == (12, 6)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3]

    model = out / "model.safetensors"
    for source in (out, model):
        metrics = json_of(capsys, "evaluate", source, "--data", folder, "--workers", 0)
        assert metrics["top1"] == summary["top1"] and metrics["images"] == 6
        assert metrics["eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)

    one = folder / "test" / "bee" / "0.jpg"
    rows = json_of(capsys, "predict", out, one, folder / "test", "--workers", 0)
    assert len(rows) == 1 + 6 and rows[0]["image"] == str(one)
    assert rows[1]["image"].endswith("ant/0.jpg")
    for row in rows:
        probabilities = [p["probability"] for p in row["predictions"]]
        assert {p["class"] for p in row["predictions"]} == set(CLASSES)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert probabilities == sorted(probabilities, reverse=True)
    right = sum(Path(r["image"]).parent.name == r["predictions"][0]["class"] for r in rows[1:])
    assert right / 6 == summary["top1"]

    assert call("predict", model, one, "--top-k", 1, "--workers", 0) == 0
    best = rows[0]["predictions"][0]
    assert capsys.readouterr().out == f"{one}: {best['class']} {best['probability']:.4f}\n"


def test_predictions_are_streamed(run, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(run / "data" / "test" / "bee", folder)
    for name in ("1.png", "2.png", "z.png"):
        (folder / name).write_bytes(b"nothing")
    arguments = ["predict", run / "out", folder, "--batch-size", 2, "--workers", 0]
    capsys.readouterr()
    assert call(*arguments, "--jsonl", "--skip-corrupt") == 0
    shown = capsys.readouterr()
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["0.jpg"]
    assert [line.split(":")[0] for line in shown.err.splitlines()] == [
        *(f"skipped {folder / name}" for name in ("1.png", "2.png", "z.png")),
        "skipped 3 corrupt images",
    ]
    (folder / "1.png").unlink()
    Image.new("RGB", (5, 5)).save(folder / '1, "2".png')
    assert call(*arguments, "--csv", "--top-k", 2) == 2
    shown = capsys.readouterr()
    assert "2.png: not a readable image" in shown.err and shown.err.count("\n") == 1
    rows = list(csv.DictReader(io.StringIO(shown.out)))
    images = [str(folder / name) for name in ("0.jpg", '1, "2".png') for rank in range(2)]
    assert [row["image"] for row in rows] == images, "those before the corrupt one"
    best = lines[0]["predictions"]
    assert [row["class"] for row in rows[:2]] == [p["class"] for p in best[:2]]
    assert float(rows[0]["probability"]) == pytest.approx(best[0]["probability"], abs=1e-6)


def test_a_reader_that_leaves_early_is_no_error(run):
    command = [sys.executable, "-m", "bitkern", "predict", str(run / "out"), "--jsonl"]
    command += [str(run / "data"), "--batch-size", "1", "--workers", "0"]
    done = subprocess.run(
        f"{shlex.join(command)} | head -n 1", shell=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout) and done.stderr == ""


def test_starts_from_the_weights_and_a_zero_head(run, tmp_path):
    """Even where the weights have a head of as many classes."""
    weights = run / "out" / "model.safetensors"
    arguments = ["--data", run / "data", "--weights", weights, "--out", tmp_path, *SMALL]
    arguments += ["--freeze", "--shots", 2, "--base-lr", 1e-9, "--no-flip"]
    assert call("finetune", *arguments) == 0
    before, after = read_checkpoint(weights), read_checkpoint(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    for name in before:
        if not name.startswith("head."):
            assert torch.equal(before[name], after[name]), name
    assert 0 < after["head.fc.weight"].abs().max() < 1e-6 < before["head.fc.weight"].abs().max()
    summary = summary_of(tmp_path)
    assert summary["training_images"] == 6 and not summary["flip"]


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    """A run that is not interrupted, and its options."""
    options = ["--data", run / "data", *SMALL, "--mixup-alpha", 0.2, "--batch-split", 3]
    options += ["--eval-every", 1]
    out = tmp_path_factory.mktemp("straight") / "out"
    assert call("finetune", *options, "--out", out) == 0
    return out, options


@pytest.mark.parametrize(
    ("owner", "name", "number", "step"),
    [
        (TrainStep, "_accumulate", 12, 2),  # after a trial of six the last of a step's three
        (inference, "eval_batches", 2, 2),
        (Journal, "add", 4, 2),
    ],
)
def test_interrupted_run_resumes_by_itself(
    run, straight, tmp_path, monkeypatch, capfd, owner, name, number, step
):
    """To the bits of one that was not interrupted, from its folder alone."""
    (straight, options), out = straight, tmp_path / "a run"
    method, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*arguments, **options):
        if next(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return method(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        capfd.readouterr()
        assert call("finetune", *options, "--out", out) == 130
    stopping, last = capfd.readouterr().err.split("\n")[-3:-1]
    assert stopping.startswith("bitkern: stopping, and saving what is done")
    assert last == f"bitkern: interrupted; to continue: bitkern finetune --resume --out '{out}'"
    assert sorted(path.name for path in out.iterdir()) == ["last.pt", "metrics.jsonl"]
    assert torch.load(out / "last.pt", weights_only=True)["progress"]["step"] == step
    assert error_of(capfd, "predict", out, run / "data").endswith(
        "the run is not finished; continue it with --resume"
    )
    message = error_of(capfd, "pretrain", "--resume", "--out", out)
    assert message.endswith("was started by bitkern finetune; resume it with bitkern finetune")
    assert call("finetune", "--resume", "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (out / name).read_bytes() == (straight / name).read_bytes()


def test_what_a_log_is_told(run, tmp_path, capsys):
    """A line for each evaluation, and in the end all that one wants to know."""
    out = tmp_path / "out"
    arguments = ["--data", run / "data", "--out", out, *SMALL, "--eval-every", 1, "--tensorboard"]
    capsys.readouterr()
    assert call("finetune", *arguments) == 0
    said = capsys.readouterr().out
    number = r"[\d.e+-]+"
    steps = re.findall(
        rf"^step (\d)/3, {number} s: train loss {number}, test loss {number}, "
        r"top-1 \d+\.\d %, balanced \d+\.\d %$",
        said,
        re.M,
    )
    assert steps == ["1", "2", "3"]
    *_, scores, best, last = said.splitlines()
    assert re.fullmatch(
        r"top-1 \d+\.\d %, balanced \d+\.\d % on 6 test images "
        r"\(always naming ant: 33\.3 %, balanced 33\.3 %\)",
        scores,
    )
    assert re.fullmatch(rf"{number} s; best top-1 \d+\.\d % at step [123]", best)
    assert last == f"open {out / 'report.html'}"
    assert len([path for path in out.iterdir() if path.name.startswith("events.out")]) == 1
    command = summary_of(out)["command"]
    assert command == shlex.join(["bitkern", "finetune", *map(str, arguments)])


def test_the_preset_for_small_machines(run, tmp_path):
    out = tmp_path / "out"
    small = ["--model", "R26x0.5", "--workers", 0, "--steps", 1, "--crop", 32]
    arguments = ["--data", run / "data", "--out", out, *small, "--batch-size", 2]
    assert call("finetune", *arguments, "--preset", "quick") == 0
    rule = summary_of(out)["rule"]
    assert (rule["resize"], rule["crop"], rule["steps"], rule["batch_size"]) == (160, 32, 1, 2)


def test_a_long_training_names_a_short_one(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "LONG", 0)
    arguments = ["--data", run / "data", "--out", tmp_path / "a", *SMALL, "--crop", 30]
    capsys.readouterr()
    assert call("finetune", *arguments) == 0
    said = capsys.readouterr().out.splitlines()
    (line,) = (line for line in said if "instead, usually less accurate" in line)
    typed = shlex.join(["bitkern", "finetune", *map(str, arguments)])
    assert line.endswith(f"steps of 7: {typed} --preset quick --out {tmp_path / 'a'}-quick")


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_interrupted_before_there_is_anything_to_resume(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TrainStep, "_accumulate", interrupt)
    capsys.readouterr()
    assert call("finetune", "--data", run / "data", *SMALL, "--out", tmp_path / "out") == 130
    says = "bitkern: interrupted before a step was saved: nothing is left to resume\n"
    assert capsys.readouterr().err == says
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", ["weights fetch BiT-M-R50x1", "evaluate run --data digits", "predict run photo.jpg"]
)
def test_only_an_interrupted_training_continues(monkeypatch, capsys, command):
    monkeypatch.setattr(f"bitkern.cli.{command.split()[0]}.run", interrupt)
    assert call(*command.split()) == 130
    assert capsys.readouterr().err == "bitkern: interrupted\n"


def test_control_c_leaves_a_checkpoint(tmp_path):
    """Images must be loaded on until the step is done."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bitkern", "finetune", "--data", "digits", *SMALL]
    command += ["--out", str(out), "--steps", "100000", "--workers", "2"]
    command += ["--batch-split", "7"]  # more than the threads load ahead
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    try:
        while process.poll() is None:
            if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size:
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, message = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, message
    how = f"bitkern: interrupted; to continue: bitkern finetune --resume --out {out}\n"
    assert message.endswith(how.encode()) and message.count(b"\n") == 3
    step = torch.load(out / "last.pt", weights_only=True)["progress"]["step"]
    assert step == len((out / "metrics.jsonl").read_text().splitlines()) > 0


def test_info_and_demo_are_handed_on(capsys, monkeypatch):
    assert call("info") == 0
    assert "torch" in capsys.readouterr().out
    assert "operators" in json_of(capsys, "info")
    seen = []
    stand_in = types.SimpleNamespace(run=lambda *arguments: seen.append(arguments))
    monkeypatch.setitem(sys.modules, "bitkern.demo", stand_in)
    monkeypatch.setattr(bitkern, "demo", stand_in, raising=False)
    assert call("demo", "--out", "there", "--seed", 3, "--letters", 100) == 0
    assert seen == [("there", 3, 100)]


def test_imports_nothing_heavy_before_it_is_needed():
    script = "import sys, bitkern, bitkern.cli; print(*sys.modules)"
    loaded = set(python("-c", script).stdout.split())
    assert "bitkern.transfer.training" in loaded
    assert not loaded & {"torchvision", "PIL", "matplotlib", "sklearn", "triton", "bitkern._C"}
