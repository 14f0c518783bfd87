"""The published transfers, from end to end on stand-ins: no network, no GPU."""

import json

import pytest

from benchmarks import published
from bitkern.models import read_checkpoint


@pytest.mark.sweep
def test_stand_in(tmp_path, capsys, monkeypatch):
    arguments = ["--out", str(tmp_path), "--stand-in", "--models", "R50x1", "--data", "CIFAR10"]
    published.main([*arguments, "--seeds", "1"])
    told = capsys.readouterr().out.splitlines()
    runs = [f"R50x1-CIFAR10-{shots}-0" for shots in (1, 5, "all")]
    assert [line.partition(":")[0] for line in told if line.startswith("R50x1-")] == runs
    *_, row, warning = (tmp_path / "stand-in" / "published.txt").read_text().splitlines()
    assert row.startswith("R50x1 CIFAR10") and row.endswith("/ 97.4") and "nothing" in warning
    images = set()
    for name in runs:
        summary = json.loads((tmp_path / "stand-in" / name / "summary.json").read_text())
        assert f"{name}: {100 * summary['top1']:.2f}" in told
        images.add(summary["training_images"])
        weights = read_checkpoint(tmp_path / "stand-in" / name / "model.safetensors")
        assert (weights["stem.conv.weight"] != 0).all()
    assert images == {10, 50, 899}

    # What is there is not done again.
    monkeypatch.setattr(published.transfer, "train", None)
    published.main([*arguments, "--seeds", "1"])
    again = capsys.readouterr().out.splitlines()
    assert again == [line for line in told if line.startswith(("R50x1", "top-1, ours", "a stand"))]


def test_data_and_weights_are_those_that_were_published(tmp_path, monkeypatch):
    asked = []

    def create_model(name, num_classes, pretrained):
        asked.append((name, num_classes, pretrained))

    monkeypatch.setattr(published, "create_model", create_model)
    for model, _ in published.PUBLISHED:
        published.Real(tmp_path).model(model, 10)
    assert set(asked) == {(f"BiT-M-{m}", 10, True) for m in ("R50x1", "R101x3", "R152x2")}
