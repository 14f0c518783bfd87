"""Every user's error is one line with exit code 2."""

import importlib.util
import itertools
from unittest.mock import Mock

import pytest
import torch

import bitkern
from bitkern.models import create_model, save_safetensors
from bitkern.transfer import step
from tests.cli.commands import SMALL, call, digest, error_of, finetune_error, summary_of
from tests.process import python
from tests.transfer.images import write_folder
from tests.transfer.net import FILES

FIRST = "not enough memory on cpu for one image at a time: lower the crop or take a smaller model"
LATER = "out of memory: raise --batch-split or lower --batch-size"


def remove(path):
    path.rename(path.with_name("elsewhere"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "part", "message"),
    [
        (remove, "train", "data/train: no such folder"),
        (remove, "test", "data/test: no such folder"),
        (remove, "test/bee", "data/train; missing: bee; unexpected: elsewhere"),
        (truncate, "test/cat/1.png", "data/test/cat/1.png: not a readable image"),
    ],
)
def test_bad_folders(tmp_path, capsys, damage, part, message):
    folder = write_folder(tmp_path / "data")
    damage(folder / part)
    assert message in finetune_error(capsys, folder, tmp_path / "out")


def test_skip_corrupt_goes_on_with_a_count(run, tmp_path, capsys):
    folder = write_folder(tmp_path / "data")
    truncate(folder / "train" / "bee" / "0.jpg")
    truncate(folder / "test" / "cat" / "1.png")
    out = tmp_path / "out"
    assert call("finetune", "--data", folder, "--out", out, "--skip-corrupt", *SMALL) == 0
    assert capsys.readouterr().err == "skipped 2 corrupt images\n"
    summary = summary_of(out)
    assert (summary["training_images"], summary["evaluation_images"]) == (12, 5)
    assert summary["skipped_images"] == 2
    assert call("evaluate", out, "--data", folder, "--skip-corrupt", "--workers", 0) == 0
    shown = capsys.readouterr()
    assert "on 5 images" in shown.out and shown.err == "skipped 1 corrupt image\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resize", "31"], "resize: expected at least the crop, 32"),
        (["--steps", "0"], "argument --steps: expected a positive whole number, got '0'"),
        (["--seed", "one"], "argument --seed: expected 0 or a positive whole number, got 'one'"),
        (["--base-lr", "-1"], "base_lr: expected a positive finite number, got -1.0"),
        (["--mixup-alpha", "-1"], "mixup_alpha: expected"),
        (["--decay-steps", "3", "2"], "decay_steps: expected ascending steps, got (3, 2)"),
        (["--cuda-graph", "on", "--device", "cpu"], "cuda_graph: expected auto or off on cpu"),
        (["--batch-split", "8"], "batch_split: expected 1 to 7, the batch size, got 8"),
        (["--shots", "5"], "shots: expected at most 4, all of 'ant', got 5"),
        (["--holdout", "1"], "holdout: expected a fraction between 0 and 1, got 1.0"),
        (["--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
        (["--device", "abacus"], "--device abacus: cannot be used here ("),
        (["--device", "cuda:99"], "--device cuda:99: cannot be used here ("),
        (["--model", "R51x1"], "unknown model 'R51x1'; did you mean"),
        (["--weights", "none.npz"], "none.npz: no such file"),
        (["--resume"], "nothing to resume, no last.pt"),
        (["--base-lr", "1e38", "--warmup-steps", "0"], "loss is nan at step"),
    ],
)
def test_bad_options(run, tmp_path, capsys, options, message):
    assert message in finetune_error(capsys, run / "data", tmp_path / "out", *options)


def test_bad_weights(run, weights, tmp_path, capsys):
    options = ["--weights", weights, "--model", "R50x1"]
    other = finetune_error(capsys, run / "data", tmp_path / "out", *options)
    assert str(weights) in other and "stem.conv.weight" in other and "(32, 3, 7, 7)" in other
    broken = tmp_path / "broken.npz"
    broken.write_bytes(weights.read_bytes()[:-1000])
    error = finetune_error(capsys, run / "data", tmp_path / "out", "--weights", broken)
    assert error.startswith(f"{broken}: truncated or not a .npz")


def test_does_not_overwrite_a_run(run, capsys):
    before = digest(run / "out")
    error = error_of(capsys, "finetune", "--data", "digits", "--out", run / "out", *SMALL)
    assert "out: already contains a run (" in error and "use another folder" in error
    resumed = ["--out", run / "out", "--resume"]
    error = error_of(capsys, "finetune", "--data", "digits", *resumed, *SMALL)
    assert error.endswith("nothing to resume, the run is finished")
    assert digest(run / "out") == before


def test_resume_with_other_options(run, tmp_path, monkeypatch, capsys):
    arguments = ["finetune", "--data", run / "data", "--out", tmp_path, *SMALL]
    error = OSError("no space left on device")
    with monkeypatch.context() as patch:
        patch.setattr("bitkern.transfer.run.draw_curves", Mock(side_effect=error))
        assert "no space left" in error_of(capsys, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "metrics.jsonl"]
    error = error_of(capsys, *arguments, "--resume", "--base-lr", 0.5)
    assert "started with --base-lr 0.003, now 0.5" in error
    assert call(*arguments, "--resume") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_bad_runs(run, weights, tmp_path, capsys):
    data = run / "data"
    assert "no such file" in error_of(capsys, "predict", tmp_path, data)
    assert "expected the folder of a run" in error_of(capsys, "predict", weights, data)
    bare = tmp_path / "bare.safetensors"
    save_safetensors(create_model("R26x0.5", num_classes=3), bare)
    assert "holds no class names" in error_of(capsys, "evaluate", bare, "--data", data)
    save_safetensors(create_model("R26x0.5", num_classes=3), bare, classes=["a", "b"], crop=32)
    assert "names 2 classes, its head has 3" in error_of(capsys, "predict", bare, data)
    truncate(bare)
    assert f"{bare}: truncated" in error_of(capsys, "predict", bare, data)
    error = error_of(capsys, "evaluate", run / "out", "--data", "digits")
    assert "digits: expected the 3 classes of" in error
    error = error_of(capsys, "evaluate", run / "out", "--data", data / "test")
    assert "name the folder above it" in error


def test_bad_images(run, tmp_path, capsys):
    out = run / "out"
    missing = tmp_path / "none.jpg"
    assert f"{missing}: no such file or folder" in error_of(capsys, "predict", out, missing)
    assert f"{tmp_path}: holds no images" in error_of(capsys, "predict", out, tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("not an image")
    assert f"{text}: not a readable image" in error_of(capsys, "predict", out, text)
    capsys.readouterr()
    assert call("predict", out, text, "--skip-corrupt") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "bitkern: error: images: expected one that can be read, got none"


def test_missing_arguments_and_packages(run, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="^0$"):
        call()
    assert "fine-tune a BiT model on a folder of images" in capsys.readouterr().out
    assert "invalid choice: 'fintune'" in error_of(capsys, "fintune")
    assert "required: --data, --model, --out" in error_of(capsys, "finetune")
    found = importlib.util.find_spec
    absent = {"matplotlib": None}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: absent.get(name, found(name)))
    error = finetune_error(capsys, run / "data", tmp_path / "out")
    assert error == "matplotlib is not installed: pip install 'bitkern[train]'"


@pytest.mark.parametrize(
    ("error", "before", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB"), 0, FIRST),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] can't allocate memory"), 0, FIRST),
        (MemoryError(), 6, LATER),
    ],
)
def test_out_of_memory_says_what_to_do(run, tmp_path, capsys, monkeypatch, error, before, message):
    """In the trial of the memory, and after its six micro-batches."""
    accumulate, calls = step.TrainStep._accumulate, itertools.count()

    def exhausted(*arguments):
        if next(calls) >= before:
            raise error
        return accumulate(*arguments)

    monkeypatch.setattr(step.TrainStep, "_accumulate", exhausted)
    assert finetune_error(capsys, run / "data", tmp_path / "out") == message


def test_the_nearest_option_is_named(capsys):
    needed = ["finetune", "--data", "digits", "--model", "R26x0.5", "--out", "out"]
    for given, meant in (("--lr", "--base-lr"), ("--epochs", "--steps"), ("--sed", "--seed")):
        message = error_of(capsys, *needed, given, 1)
        assert message == f"unrecognized arguments: {given} 1; did you mean {meant}?"
    message = error_of(capsys, "finetune", "--resume", "--out", "nowhere")
    assert message == "nowhere: nothing to resume, no last.pt"
    assert "did you mean" not in error_of(capsys, *needed, "more")
    with pytest.raises(SystemExit, match="^0$"):
        call("--version")
    assert capsys.readouterr().out == f"bitkern {bitkern.__version__}\n"


def test_traceback_free_as_a_process(tmp_path):
    arguments = ["--data", tmp_path / "none", "--out", tmp_path / "out", *SMALL]
    done = python("-m", "bitkern", "finetune", *arguments, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith(f"bitkern: error: {tmp_path}/none/train: no such folder")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
