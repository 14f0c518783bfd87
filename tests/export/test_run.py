"""Finished runs for other libraries: each loaded by the library that it was written for."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitForImageClassification,
)

from bitkern.export import ExportError, export, npz, transformers
from bitkern.models import ARCHITECTURES, create_model, save_safetensors
from bitkern.models.resnetv2 import ResNetV2
from bitkern.transfer import load_run
from bitkern.transfer.data.decoders import pillow
from tests.cli.commands import call, error_of

CLASSES = ["ant", "b|e", 'c "at"', "dück"]
CROP = 40


def finished(folder, architecture, multi_label=False):
    """Make a run whose norms matter, with filters so small that eps matters too."""
    torch.manual_seed(0)
    model = create_model(architecture, num_classes=len(CLASSES), zero_head=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.normal_(0.5, 0.5)
            elif ".conv" in name:
                p[::3] *= 1e-3
    folder.mkdir()
    path = folder / "model.safetensors"
    save_safetensors(model, path, classes=CLASSES, crop=CROP, multi_label=multi_label)
    summary = {"model": f"BiT-M-{architecture}", "data": "/home/me/my | photos\n"}
    summary |= {"top1": 0.875, "weights": "hf-hub:ORG/NAME"}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def r50(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("r50") / "run", "R50x1")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("small") / "run", "R26x0.5", multi_label=True)


@pytest.fixture
def images():
    return torch.rand(3, 3, CROP, CROP) * 2 - 1


@torch.inference_mode()
def assert_same_logits(run, images, logits):
    expected = load_run(run).model.eval()(images)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def photograph(tmp_path):
    """Return an image file, and what a run computes from it."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    image = Image.fromarray(pixels).resize((130, 90), Image.Resampling.BICUBIC)
    image.save(tmp_path / "photo.png")
    resized = torch.from_numpy(pillow(tmp_path / "photo.png", CROP))
    return image, resized.permute(2, 0, 1) / 127.5 - 1


def test_timm(r50, tmp_path, images, capsys):
    out = tmp_path / "out"
    assert call("export", r50, "--to", "timm", "--out", out) == 0
    assert capsys.readouterr().out.startswith(f"{out}: for timm; checked: largest relative diff")
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.inference_mode():
        assert_same_logits(r50, images, model(images))
    assert list(model.pretrained_cfg["label_names"]) == CLASSES
    image, expected = photograph(tmp_path)
    config = timm.data.resolve_model_data_config(model)
    x = timm.data.create_transform(**config, is_training=False)(image)
    assert x.shape == expected.shape and (x - expected).abs().max() < 2.1 / 127.5
    card = (out / "README.md").read_text()
    assert "license:" not in card and "license" not in (out / "config.json").read_text()
    assert "is up to its publisher" in card and "| Top-1 | 0.8750 |" in card
    assert "/home" not in card and "| Started from | hf-hub:ORG/NAME |" in card
    assert "| Data | my \\| photos |" in card and "`dück`" in card
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "photo.png"]


@pytest.mark.parametrize("fixture", ["r50", "small"])
def test_transformers(request, fixture, tmp_path, images):
    run, out = request.getfixturevalue(fixture), tmp_path / "out"
    assert export(run, "transformers", out) < 1e-5
    model = AutoModelForImageClassification.from_pretrained(out).eval()
    with torch.inference_mode():
        assert_same_logits(run, images, model(images).logits)
    assert list(model.config.id2label.values()) == CLASSES
    kind = "multi" if fixture == "small" else "single"
    assert AutoConfig.from_pretrained(out).problem_type == f"{kind}_label_classification"
    image, expected = photograph(tmp_path)
    x = AutoImageProcessor.from_pretrained(out)(image, return_tensors="pt")["pixel_values"][0]
    assert x.shape == expected.shape and (x - expected).abs().max() < 2.1 / 127.5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_widths(architecture):
    with torch.device("meta"):
        ours = ResNetV2(*ARCHITECTURES[architecture], 5)
        theirs = BitForImageClassification(transformers.config(architecture))
    names = {transformers.transformers_name(name): t.shape for name, t in ours.state_dict().items()}
    names["classifier.1.weight"] = names["classifier.1.weight"][:2]
    theirs = {name: t.shape for name, t in theirs.state_dict().items()}
    theirs["classifier.1.weight"] = (5, *theirs["classifier.1.weight"][1:])
    theirs["classifier.1.bias"] = (5,)
    assert names == theirs


def test_npz(small, tmp_path, images):
    assert export(small, "npz", tmp_path / "a.npz") == 0
    model = create_model("R26x0.5", weights=tmp_path / "a.npz").eval()
    assert_same_logits(small, images, model(images))


def test_onnx(small, tmp_path, images):
    out = tmp_path / "model.onnx"
    assert export(str(small), "onnx", str(out)) < 1e-5
    model = onnx.load(out)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""}, "ONNX's own operators alone"
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["classes"]) == CLASSES
    assert "40 x 40" in metadata["preprocessing"] and metadata["probabilities"] == "sigmoid"
    session = onnxruntime.InferenceSession(out)
    for batch in (images, images[:1]):
        (logits,) = session.run(["logits"], {"pixel_values": batch.numpy()})
        assert_same_logits(small, batch, torch.from_numpy(logits))


@pytest.mark.sweep
def test_large_onnx_has_its_weights_beside_it(small, tmp_path, monkeypatch, images):
    monkeypatch.setattr("bitkern.export.onnx.LARGEST", 1000)
    out = tmp_path / "model.onnx"
    assert export(small, "onnx", out) < 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    (logits,) = onnxruntime.InferenceSession(out).run(None, {"pixel_values": images.numpy()})
    assert_same_logits(small, images, torch.from_numpy(logits))


@pytest.mark.sweep
def test_aoti(small, tmp_path, images):
    out = tmp_path / "model.pt2"
    assert export(small, "aoti", out) < 1e-5
    package = torch._inductor.aoti_load_package(str(out))
    assert_same_logits(small, images, package(images))


def test_a_wrong_result_is_found_and_deleted(small, tmp_path, monkeypatch):
    monkeypatch.setattr("bitkern.export.common.WEIGHT_FACTOR", 1.0)
    with pytest.raises(ExportError, match=r"out: logits differ by \d.*, expected 0.0001"):
        export(small, "transformers", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_all_zero(tmp_path, monkeypatch):
    model, run = create_model("R26x0.5", num_classes=len(CLASSES)), tmp_path / "run.safetensors"
    save_safetensors(model, run, classes=CLASSES, crop=CROP)
    assert not load_run(run).model.eval()(torch.rand(1, 3, CROP, CROP)).any()
    assert export(run, "npz", tmp_path / "a.npz") == 0
    monkeypatch.setattr(npz, "logits", lambda *arguments: torch.full((2, len(CLASSES)), 1e-3))
    with pytest.raises(ExportError, match="b.npz: logits differ by 1.0e-03, expected 0.0001"):
        export(run, "npz", tmp_path / "b.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "run.safetensors"]


def test_bad_arguments(small, r50, tmp_path, capsys, monkeypatch):
    def error(run, to, out):
        return error_of(capsys, "export", run, "--to", to, "--out", tmp_path / out)

    assert "invalid choice: 'tf'" in error(small, "tf", "a")
    assert error(small, "timm", "a") == "timm has no R26x0.5"
    assert error(small, "npz", "a") == "a: expected a name ending in .npz"
    assert error(small, "onnx", "a.pt").endswith("expected a name ending in .onnx")
    assert error(small, "npz", "none/a.npz").endswith("none: no such folder")
    assert "no such file" in error(tmp_path / "none.safetensors", "npz", "a.npz")
    (tmp_path / "b.npz").touch()
    assert error(small, "npz", "b.npz").endswith(
        "b.npz: already exists; delete it or choose another --out"
    )
    monkeypatch.setitem(sys.modules, "timm", None)
    assert error(r50, "timm", "a") == "timm is not installed: pip install timm"
    assert [p.name for p in tmp_path.iterdir()] == ["b.npz"]
