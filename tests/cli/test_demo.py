"""The demo end to end, small; and the letters it renders."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import bitkern
from bitkern import demo
from bitkern.demo.letters import CLASSES, FONTS, HELD_OUT, letters
from bitkern.transfer import data, evaluate
from bitkern.transfer.run import RunError

FILES = ["curves.png", "metrics.jsonl", "model.safetensors", "predictions.png", "summary.json"]


def test_letters_are_a_function_of_seed_and_index():
    few, more = letters(40, 3), letters(45, 3)
    images = np.stack(few.images)
    assert images.shape == (40, 8, 8) and images.dtype == np.uint8
    assert np.array_equal(images, more.images[:40])
    assert np.array_equal(few.labels, np.arange(40) % len(CLASSES))
    assert few.classes == CLASSES and len(set(CLASSES)) == 37
    for other in (letters(40, 4), letters(40, 3, held_out=True)):
        assert (images != np.stack(other.images)).any((1, 2)).all()


def test_letters_have_the_levels_of_the_digits():
    assert set(np.unique(letters(300, 0).images)) == set(np.unique(data.digits("train").images))


def test_letters_are_legible():
    """In unseen fonts 2 of 5 are nearest to the mean of their class; by chance 1 of 37."""
    train, test = letters(3700, 0), letters(370, 0, held_out=True)
    images, others = np.stack(train.images), np.stack(test.images)
    means = np.stack([images[train.labels == i].mean(0) for i in range(len(CLASSES))])
    distances = ((others[:, None] - means) ** 2).sum((2, 3))
    assert (distances.argmin(1) == test.labels).mean() > 0.4
    # The letters of a class differ: they are not one picture over and over.
    assert images[train.labels == 0].std(0).mean() > 20


def test_held_out_fonts_are_among_the_fonts():
    assert len(set(FONTS)) == len(FONTS) == 22
    assert set(HELD_OUT) < set(FONTS)


def test_shortened_rule():
    rule = demo.shortened(898, 150)
    assert (rule.steps, rule.warmup_steps, rule.decay_steps) == (150, 30, (60, 90, 120))
    assert (rule.resize, rule.crop, rule.mixup_alpha) == (36, 32, 0)


@pytest.fixture
def short(monkeypatch):
    for name, steps in (("UPSTREAM_STEPS", 5), ("FULL_STEPS", 3), ("FEW_SHOT_STEPS", 1)):
        monkeypatch.setattr(demo, name, steps)
    monkeypatch.setattr(demo, "HELD_OUT_LETTERS", 37)
    monkeypatch.setattr(demo, "SHOTS", (1,))
    digits = {
        split: data.digits(split).subset(np.arange(0, 800, 10)) for split in ("train", "test")
    }
    monkeypatch.setattr(demo, "digits", digits.get)
    return digits


def call(out, letters, seed=1):
    demo.run(out, seed, letters)
    return json.loads((out / "summary.json").read_text())


def test_demo_writes_results_that_agree(tmp_path, short, monkeypatch, capsys):
    """Also in the place of a demo that failed, whose results were the same."""
    out = tmp_path / "new" / "demo"

    def full(figure, part, **options):
        part.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("matplotlib.figure.Figure.savefig", full)
        call(out, letters=74)
    assert [path.name for path in out.iterdir()] == ["metrics.jsonl"]
    failed = (out / "metrics.jsonl").read_bytes()
    capsys.readouterr()

    summary = call(out, letters=74)
    assert sorted(f.name for f in out.iterdir()) == FILES
    assert (out / "metrics.jsonl").read_bytes() == failed
    assert (summary["upstream"]["letters"], summary["upstream"]["steps"]) == (74, 5)
    assert summary["transfer"]["steps"] == summary["scratch"]["steps"] == 3
    assert summary["training_images"] == summary["evaluation_images"] == 80

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = {line["run"]: line["top1"] for line in lines if "top1" in line}
    steps = {line["run"]: line["step"] for line in lines}
    assert last["letters"] == summary["upstream"]["top1"]
    for how in ("transfer", "scratch"):
        assert last[f"digits, all, {how}"] == summary[how]["top1"]
        assert steps[f"digits, all, {how}"] == 3
        assert last[f"digits, 1, {how}"] == summary["few_shot"]["1"][how]
    assert len(last) == 5

    # The model written is the one that was measured.
    model = bitkern.create_model(demo.MODEL, num_classes=10, weights=out / "model.safetensors")
    assert evaluate(model, short["test"], 32)["top1"] == summary["transfer"]["top1"]

    for name in ("curves.png", "predictions.png"):
        with Image.open(out / name) as image:
            image.load()
            assert min(image.size) > 300

    printed = capsys.readouterr().out
    assert f"{summary['transfer']['top1']:>10.3f}{summary['scratch']['top1']:>10.3f}" in printed


def test_what_an_interrupted_demo_has_is_kept(tmp_path, short, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo, "few_shot", interrupted)
        call(tmp_path, letters=37)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["run"] for line in lines} == {"letters"} and len(lines) == 10
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "letters: 37 images, 5 steps" and len(printed) == 1 + 5
    assert printed[-1].startswith("step 5/5, ") and "top-1" in printed[-1]


def test_transfer_takes_the_body_and_not_the_head(short):
    upstream = bitkern.create_model(demo.MODEL, num_classes=37)
    body = upstream.stages[1].blocks[0].conv2.weight.detach().clone()
    first = demo._fit("few", short["train"], short["test"], 1, 0, upstream)
    # The learning rate of the first step is 0.
    assert torch.equal(first.model.stages[1].blocks[0].conv2.weight, body)
    assert first.model.get_classifier().weight.shape == (10, 1024, 1, 1)


@pytest.mark.parametrize("held", ["summary.json", "last.pt"])
def test_demo_keeps_another_run(tmp_path, held):
    (tmp_path / held).write_text("another run")
    with pytest.raises(RunError, match=f"{tmp_path}.*{held}"):
        call(tmp_path, letters=1)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [(held, "another run")]
