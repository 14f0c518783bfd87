"""The files of a run: exact resumption, and what is left behind when it fails."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bitkern.models import read_metadata
from bitkern.transfer import RunError, TrainingError, device_config
from tests.transfer.images import CLASSES, image_set
from tests.transfer.net import (
    FILES,
    PLAIN,
    REPORT,
    RULE,
    Crash,
    Net,
    assert_same_bits,
    crash_always,
    state_of,
    stopped,
    train,
)


def interrupt(call):
    if call == 3 * 10 - 1:  # within the tenth step of three micro-batches, which is broken off
        signal.raise_signal(signal.SIGINT)


def crash(call):
    if call == 3 * 13 - 1:
        raise Crash


@pytest.mark.parametrize(
    ("stop", "error", "resumed_at"), [(interrupt, KeyboardInterrupt, 9), (crash, Crash, 10)]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues_with_the_same_bits(tmp_path, stop, error, resumed_at, workers):
    options = dict(eval_set=image_set(2), batch_split=3, seed=5, eval_every=4, checkpoint_every=5)
    straight = Net()
    expected = train(straight, out=tmp_path / "straight", **options)

    out = tmp_path / "stopped"
    stopped = Net()
    stopped.on_call = stop
    with pytest.raises(error):
        train(stopped, out=out, workers=workers, **options)
    assert sorted(p.name for p in out.iterdir()) == ["last.pt", "metrics.jsonl"]
    assert torch.load(out / "last.pt", weights_only=True)["progress"]["step"] == resumed_at

    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 11}\n' * 1000 + b'{"step')  # steps after the checkpoint, one cut off

    resumed = Net()
    nn.init.zeros_(resumed.head.weight)  # whatever it was, the checkpoint decides
    result = train(resumed, out=out, resume=True, workers=workers, **options)
    assert resumed.calls == 3 * (RULE.steps - resumed_at)
    assert_same_bits(resumed, straight.state_dict())
    assert result.history == expected.history and result.metrics == expected.metrics
    written = (out / "metrics.jsonl").read_bytes()
    assert written == (tmp_path / "straight" / "metrics.jsonl").read_bytes()
    assert [json.loads(line) for line in written.splitlines()] == expected.history


def test_resumes_what_an_earlier_version_wrote(tmp_path):
    """Its learning rate was a number, and its optimizer another implementation of SGD."""
    straight, resumed = Net(), Net()
    train(straight)
    stopped(tmp_path)
    checkpoint = torch.load(tmp_path / "last.pt", weights_only=True)
    for group in checkpoint["optimizer"]["param_groups"]:
        assert group["fused"] and torch.is_tensor(group["lr"])
        group.update(fused=None, lr=0.1)
    torch.save(checkpoint, tmp_path / "last.pt")
    train(resumed, out=tmp_path, checkpoint_every=5, resume=True)
    assert_same_bits(resumed, straight.state_dict())


@pytest.mark.parametrize("every", [1, 2, 7])
@pytest.mark.parametrize("also_interrupted", [False, True])
def test_no_checkpoint_holds_a_step_that_diverged(tmp_path, every, also_interrupted):
    """Its loss is read when the next step is under way, but before anything is written."""
    model, resumed, straight = Net(), Net(), Net()

    def diverge(call):
        if call == 14:
            model.head.bias.data.fill_(torch.nan)
            if also_interrupted:
                signal.raise_signal(signal.SIGINT)

    model.on_call = diverge
    options = dict(eval_set=image_set(2), checkpoint_every=every, eval_every=every)
    with pytest.raises(TrainingError, match="the loss is nan at step 14: try a lower"):
        train(model, out=tmp_path, **options)
    due = also_interrupted or 14 % every == 0
    assert model.calls == (14 if due else 15)
    done = torch.load(tmp_path / "last.pt", weights_only=True)["progress"]["step"]
    assert done == 13 // every * every
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [line for line in map(json.loads, lines) if "loss" in line]
    assert [line["step"] for line in losses] == list(range(1, 14))
    expected = train(straight, **options)
    assert train(resumed, out=tmp_path, resume=True, **options).history == expected.history
    assert_same_bits(resumed, straight.state_dict())


@pytest.mark.parametrize(
    ("broken", "left"),
    [
        ("run.draw_curves", []),
        ("trainer.write_report", ["curves.png", "model.safetensors"]),
        ("run.Run.finish", ["curves.png", "model.safetensors", *REPORT]),
    ],
)
def test_resuming_a_complete_run_trains_no_further(tmp_path, monkeypatch, broken, left):
    options = dict(eval_set=image_set(2), out=tmp_path)
    model = Net()
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(f"bitkern.transfer.{broken}", crash_always)
        train(model, **options)
    found = sorted(p.name for p in tmp_path.iterdir())
    assert found == sorted(["last.pt", "metrics.jsonl", *left])
    again = Net()
    result = train(again, **options, resume=True)
    assert again.calls == 0
    assert_same_bits(again, model.state_dict())
    assert {"step": 20, **result.metrics} == result.history[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES
    with pytest.raises(RunError, match="nothing to resume, the run is finished"):
        train(Net(), **options, resume=True)


def test_finished_run_from_python(tmp_path):
    about = {"model": "a net", "data": "three classes"}
    out, model = tmp_path / "out", Net()
    result = train(model, out=out, eval_set=image_set(2), batch_split=2, about=about)
    assert sorted(p.name for p in out.iterdir()) == FILES
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seconds"] == round(result.seconds, 1)
    assert list(summary)[:5] == ["model", "data", "top1", "top5", "eval_loss"]
    assert summary["top1"] == result.metrics["top1"] and summary["precision"] == "fp32"
    assert_same_bits(model, load_file(out / "model.safetensors"))
    assert read_metadata(out / "model.safetensors")["classes"] == list(CLASSES)
    (tmp_path / "usual").touch()
    assert {p.stat().st_mode for p in out.iterdir()} == {(tmp_path / "usual").stat().st_mode}


def test_precision_of_the_run_is_kept(tmp_path, monkeypatch):
    """Whatever the machine it is resumed on would choose, unless another is asked for."""

    def this_machine_is_for(precision):
        monkeypatch.setattr(device_config, "default_precision", lambda _: (precision, "it is said"))

    this_machine_is_for("bf16")
    stopped(tmp_path / "out", precision="auto")
    this_machine_is_for("fp32")
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    for out, given, kept in (("out", "auto", "bf16"), ("other", "fp32", "fp32")):
        train(Net(), out=tmp_path / out, resume=True, precision=given)
        assert json.loads((tmp_path / out / "summary.json").read_text())["precision"] == kept


class Counted(nn.Linear):
    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"about": {"data": Path("here")}}, "about: expected JSON values, got data: .*Path"),
        ({"model": nn.Sequential(nn.Flatten(), Counted(192, 3))}, "model: expected tensors in its"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_training(tmp_path, change, message):
    arguments = {"model": Net(), **change}
    with pytest.raises(TypeError, match=f"^{message}"):
        train(**arguments, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """The folder of a run, not to be changed."""
    out = tmp_path_factory.mktemp("unfinished")
    stopped(out)
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": dataclasses.replace(RULE, base_lr=0.2)}, "started with base_lr=0.1, now 0.2"),
        ({"seed": 1}, "started with seed=0, now 1"),
        ({"batch_split": 2}, "started with batch_split=1, now 2"),
        ({"rule": dataclasses.replace(RULE, weight_decay=0.1)}, "started with weight_decay=0.0"),
        ({"flip": False}, "started with flip=True, now False"),
        ({"train_set": image_set(4)}, "started with training images 15, now 12"),
        ({"train_set": image_set()._replace(classes=("x", "y", "z"))}, "started with classes"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 3))}, "started with parameters"),
    ],
)
def test_resume_needs_the_settings_of_the_run(unfinished, change, message):
    metrics = (unfinished / "metrics.jsonl").read_bytes()
    changed = {"model": Net(), **change}
    before = state_of(changed["model"])
    with pytest.raises(RunError, match=message):
        train(**changed, out=unfinished, resume=True)
    assert_same_bits(changed["model"], before)
    assert (unfinished / "metrics.jsonl").read_bytes() == metrics


def test_damaged_run_folders(tmp_path):
    stopped(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(RunError, match=r"metrics.jsonl: shorter than when last.pt"):
        train(Net(), out=tmp_path, resume=True)
    whole = (tmp_path / "last.pt").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"nothing"):
        (tmp_path / "last.pt").write_bytes(broken)
        with pytest.raises(RunError, match=r"last.pt: (truncated|damaged)"):
            train(Net(), out=tmp_path, resume=True)


def test_does_not_overwrite_a_run(tmp_path):
    stopped(tmp_path)
    with pytest.raises(
        RunError, match="already contains a run .*continue it with resume=True or use another"
    ):
        train(Net(), PLAIN, out=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="expected a folder, found a file"):
        train(Net(), PLAIN, out=tmp_path / "file")
    with pytest.raises(RunError, match="nothing to resume, no last.pt"):
        train(Net(), PLAIN, out=tmp_path / "new", resume=True)
