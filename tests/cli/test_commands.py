"""The command line end to end, and every user's error as one line with exit code 2."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from bitkern.cli import main
from bitkern.models import create_model, read_checkpoint, save_npz, save_safetensors
from bitkern.transfer import trainer
from tests.transfer.images import CLASSES, write_folder

SMALL = ["--model", "R26x0.5", "--resize", "40", "--crop", "32", "--batch-size", "7"]
SMALL += ["--workers", "0", "--steps", "3"]
RESULTS = ["curves.png", "metrics.jsonl", "model.safetensors", "summary.json"]


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "BiT-M-R26x0.5.npz"
    torch.manual_seed(0)
    save_npz(create_model("R26x0.5", num_classes=5, zero_head=False), path)
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory, weights):
    """A finished run and its data; not to be changed."""
    root = tmp_path_factory.mktemp("run")
    folder = write_folder(root / "data")
    arguments = ["--data", folder, "--weights", weights, "--out", root / "out"]
    options = ["--batch-split", "2", "--mixup-alpha", "0.1", "--base-lr", "0.01"]
    assert call("finetune", *arguments, *options, *SMALL) == 0
    return root


def call(*arguments):
    return main([str(argument) for argument in arguments])


def digest(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_finetune_evaluate_predict(run, capsys):
    out, folder = run / "out", run / "data"
    assert sorted(path.name for path in out.iterdir()) == RESULTS
    assert Image.open(out / "curves.png").format == "PNG"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rule"]["steps"] == summary["steps"] == 3
    assert (summary["training_images"], summary["evaluation_images"]) == (12, 6)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3]

    model = out / "model.safetensors"
    for source in (out, model):
        assert call("evaluate", source, "--data", folder, "--workers", 0, "--json") == 0
        metrics = json.loads(capsys.readouterr().out)
        assert metrics["top1"] == summary["top1"] and metrics["images"] == 6
        assert metrics["eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)

    one = folder / "test" / "bee" / "0.jpg"
    assert call("predict", out, one, folder / "test", "--workers", 0, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
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


def test_starts_from_the_weights_and_a_zero_head(run, weights, tmp_path):
    arguments = ["--data", run / "data", "--weights", weights, "--out", tmp_path, *SMALL]
    assert call("finetune", *arguments, "--freeze", "--shots", 2) == 0
    before, after = read_checkpoint(weights), read_checkpoint(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    for name in before:
        if not name.startswith("head."):
            assert torch.equal(before[name], after[name]), name
    assert after["head.fc.weight"].shape[0] == 3
    # Random weights of five classes in the checkpoint, a few small steps from zero here.
    assert 0 < after["head.fc.weight"].abs().max() < 0.01 < before["head.fc.weight"].abs().max()
    assert json.loads((tmp_path / "summary.json").read_text())["training_images"] == 6


def test_head_of_as_many_classes_is_replaced_too(run, weights, tmp_path):
    arguments = ["--data", run / "data", "--weights", run / "out" / "model.safetensors"]
    arguments += ["--out", tmp_path, *SMALL, "--steps", "1", "--base-lr", "1e-9"]
    assert call("finetune", *arguments) == 0
    after = read_checkpoint(tmp_path / "model.safetensors")
    assert after["head.fc.weight"].abs().max() < 1e-6


def test_digits_as_a_process(tmp_path):
    command = [sys.executable, "-m", "bitkern", "finetune", "--data", "digits", "--shots", "2"]
    command += [
        "--no-flip",
        "--eval-every",
        "3",
        "--holdout",
        "0.1",
        "--out",
        str(tmp_path / "out"),
        *SMALL,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["classes"], summary["training_images"]) == (10, 20)
    assert summary["evaluated_on"] == "holdout" and summary["evaluation_images"] == 90


def test_holdout_leaves_test_unread(run, tmp_path):
    folder = write_folder(tmp_path / "data", test=0)
    arguments = ["--data", folder, "--out", tmp_path / "out", *SMALL, "--holdout", 0.25]
    assert call("finetune", *arguments) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["training_images"], summary["evaluation_images"]) == (9, 3)


def test_interrupted_run_resumes_to_the_same_bits(run, tmp_path, monkeypatch, capsys):
    arguments = ["--data", run / "data", *SMALL, "--mixup-alpha", 0.2]
    assert call("finetune", *arguments, "--out", tmp_path / "straight") == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        mixup = trainer.mixup

        def interrupted(*batch):
            signal.raise_signal(signal.SIGINT)
            return mixup(*batch)

        patch.setattr(trainer, "mixup", interrupted)
        capsys.readouterr()
        assert call("finetune", *arguments, "--out", out) == 130
    assert capsys.readouterr().err == "bitkern: interrupted; finetune continues with --resume\n"
    assert sorted(path.name for path in out.iterdir()) == ["last.pt", "metrics.jsonl"]
    assert error_of(capsys, "predict", out, run / "data").endswith(
        "the run is not finished; continue it with --resume"
    )
    assert call("finetune", *arguments, "--out", out, "--resume") == 0
    assert sorted(path.name for path in out.iterdir()) == RESULTS
    straight = tmp_path / "straight"
    assert (out / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    resumed = read_checkpoint(out / "model.safetensors")
    for name, tensor in read_checkpoint(straight / "model.safetensors").items():
        assert torch.equal(resumed[name], tensor), name


def test_control_c_reaches_workers_too_and_leaves_a_checkpoint(tmp_path):
    """Ctrl-C goes to the whole process group; the workers must live until the step is done."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bitkern", "finetune", "--data", "digits", *SMALL]
    command += ["--out", str(out), "--steps", "100000", "--workers", "2"]
    command += ["--batch-split", "7"]  # more than the workers fetch ahead
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
    assert message == b"bitkern: interrupted; finetune continues with --resume\n"
    step = torch.load(out / "last.pt", weights_only=True)["progress"]["step"]
    assert step == len((out / "metrics.jsonl").read_text().splitlines()) > 0


def test_info_and_demo_are_handed_on(capsys, monkeypatch):
    assert call("info") == 0
    assert "torch" in capsys.readouterr().out
    assert call("info", "--json") == 0
    assert "operators" in json.loads(capsys.readouterr().out)
    seen = []
    stand_in = types.SimpleNamespace(run=seen.append)
    monkeypatch.setitem(sys.modules, "bitkern.demo", stand_in)
    assert call("demo", "--out", "there", "--seed", 3, "--letters", 100) == 0
    assert (seen[0].out, seen[0].seed, seen[0].letters) == ("there", 3, 100)


def error_of(capsys, *arguments):
    """The message of a call that must fail with exit code 2 and one line on stderr."""
    capsys.readouterr()
    try:
        code = call(*arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.startswith("bitkern: error: ") and message.count("\n") == 1, message
    return message.strip().removeprefix("bitkern: error: ")


def finetune_error(capsys, folder, out, *options):
    """As :func:`error_of`, of ``finetune``, which must leave no file behind."""
    before = sorted(out.parent.iterdir())
    message = error_of(capsys, "finetune", "--data", folder, "--out", out, *SMALL, *options)
    assert sorted(out.parent.iterdir()) == before
    return message


def remove(path):
    path.rename(path.with_name("elsewhere"))


def empty(path):
    for file in path.iterdir():
        file.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "part", "message"),
    [
        (remove, "", "data/train: no such folder"),
        (remove, "train", "data/train: no such folder"),
        (remove, "test", "data/test: no such folder"),
        (remove, "test/bee", "data/train, found 1 missing, such as 'bee' and 1 more"),
        (empty, "train/bee", "data/train/bee: no images; add some or remove the folder"),
        (truncate, "train/bee/0.jpg", "data/train/bee/0.jpg: not a readable image"),
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
    assert json.loads((out / "summary.json").read_text())["training_images"] == 11
    assert call("evaluate", out, "--data", folder, "--skip-corrupt", "--workers", 0) == 0
    shown = capsys.readouterr()
    assert "on 5 images" in shown.out and shown.err == "skipped 1 corrupt image\n"
    assert call("predict", out, folder / "test", "--skip-corrupt", "--json", "--workers", 0) == 0
    shown = capsys.readouterr()
    assert len(json.loads(shown.out)) == 5 and shown.err == "skipped 1 corrupt image\n"
    assert "1.png: not a readable image" in error_of(capsys, "predict", out, folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resize", "31"], "resize: expected at least the crop, 32"),
        (["--crop", "41"], "resize: expected at least the crop, 41"),
        (["--steps", "0"], "argument --steps: expected a positive whole number, got '0'"),
        (["--workers", "-1"], "argument --workers: expected 0 or a positive whole number"),
        (["--seed", "one"], "argument --seed: expected 0 or a positive whole number, got 'one'"),
        (["--base-lr", "-1"], "base_lr: expected a positive finite number, got -1.0"),
        (["--base-lr", "fast"], "argument --base-lr: invalid float value: 'fast'"),
        (["--mixup-alpha", "-1"], "mixup_alpha: expected"),
        (["--decay-steps", "3", "2"], "decay_steps: expected ascending steps, got (3, 2)"),
        (["--batch-split", "8"], "batch_split: expected 1 to 7, the batch size, got 8"),
        (["--shots", "5"], "shots: expected at most 4, all of 'ant', got 5"),
        (["--holdout", "1"], "holdout: expected a fraction between 0 and 1, got 1.0"),
        (["--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
        (["--device", "abacus"], "--device abacus: cannot be used here"),
        (["--model", "R51x1"], "unknown model 'R51x1', nearest"),
        (["--weights", "none.npz"], "none.npz: no such file"),
        (["--resume"], "nothing to resume, no last.pt"),
        (["--base-lr", "1e38", "--warmup-steps", "0"], "loss is nan at step"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_options(run, tmp_path, capsys, options, message):
    assert message in finetune_error(capsys, run / "data", tmp_path / "out", *options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_absent_gpu(run, tmp_path, capsys):
    error = finetune_error(capsys, run / "data", tmp_path / "out", "--device", "cuda")
    assert error.startswith("--device cuda: cannot be used here (")


def test_bad_weights(run, weights, tmp_path, capsys):
    other = finetune_error(
        capsys, run / "data", tmp_path / "out", "--weights", weights, "--model", "R50x1"
    )
    assert str(weights) in other and "stem.conv.weight" in other and "(32, 3, 7, 7)" in other
    broken = tmp_path / "broken.npz"
    broken.write_bytes(weights.read_bytes()[:-1000])
    error = finetune_error(capsys, run / "data", tmp_path / "out", "--weights", broken)
    assert error.startswith(f"{broken}: truncated or not a .npz")


def test_does_not_overwrite_a_run(run, capsys):
    before = digest(run / "out")
    error = error_of(capsys, "finetune", "--data", "digits", "--out", run / "out", *SMALL)
    assert "out: holds a run (" in error and "use another --out" in error
    resumed = ["--out", run / "out", "--resume"]
    error = error_of(capsys, "finetune", "--data", "digits", *resumed, *SMALL)
    assert error.endswith("nothing to resume, the run is finished")
    assert digest(run / "out") == before


def test_resume_with_other_options(run, tmp_path, monkeypatch, capsys):
    arguments = ["finetune", "--data", run / "data", "--out", tmp_path, *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr("bitkern.transfer.runs.draw_curves", fail)
        assert "no space left" in error_of(capsys, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "metrics.jsonl"]
    error = error_of(capsys, *arguments, "--resume", "--base-lr", 0.5)
    assert "the run has base_lr 0.003, got 0.5" in error
    assert call(*arguments, "--resume") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == RESULTS


def fail(*arguments):
    raise OSError("no space left on device")


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


def test_bad_images(run, tmp_path, capsys):
    out = run / "out"
    missing = tmp_path / "none.jpg"
    assert f"{missing}: no such file or folder" in error_of(capsys, "predict", out, missing)
    assert f"{tmp_path}: holds no images" in error_of(capsys, "predict", out, tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("not an image")
    assert f"{text}: not a readable image" in error_of(capsys, "predict", out, text)
    error = error_of(capsys, "predict", out, text, "--skip-corrupt")
    assert error == "images: expected at least one, got none"


def test_missing_arguments_and_packages(run, tmp_path, capsys, monkeypatch):
    assert "required: command" in error_of(capsys)
    assert "invalid choice: 'fintune'" in error_of(capsys, "fintune")
    assert "required: --data, --model, --out" in error_of(capsys, "finetune")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    error = finetune_error(capsys, run / "data", tmp_path / "out")
    assert error == "matplotlib is not installed: pip install 'bitkern[train]'"


def test_out_of_gpu_memory_says_what_to_do(run, tmp_path, capsys, monkeypatch):
    def exhausted(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB")

    monkeypatch.setattr(trainer, "_accumulate", exhausted)
    error = finetune_error(capsys, run / "data", tmp_path / "out")
    assert error == "out of GPU memory: raise --batch-split or lower --batch-size"


def test_traceback_free_as_a_process(tmp_path):
    command = [sys.executable, "-m", "bitkern", "finetune", "--data", str(tmp_path / "none")]
    command += ["--out", str(tmp_path / "out"), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"bitkern: error: {tmp_path}/none/train: no such folder")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_imports_nothing_heavy_before_it_is_needed():
    script = "import sys, bitkern, bitkern.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "bitkern.transfer.trainer" in loaded
    assert not loaded & {"torchvision", "PIL", "matplotlib", "sklearn", "triton", "bitkern._C"}
