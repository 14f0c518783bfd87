"""Images that cannot be read: one rule, with or without a cache, checked before or not."""

import json

import numpy as np
import pytest
import torch

from bitkern.transfer import DataError, HyperRule, train_batches, training
from bitkern.transfer import data as sources
from bitkern.transfer.data import decoders, open_images
from tests.transfer.images import write_folder
from tests.transfer.net import Crash, Net, assert_same_bits, crash_always

RULE = HyperRule(12, 8, steps=6, decay_steps=(), warmup_steps=0, mixup_alpha=0.0, batch_size=10)
MODES = [("ram", None), ("disk", None), ("off", True), ("off", False)]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


def batches(data, cache, check, **options):
    return train_batches(data, RULE, seed=0, workers=2, cache=cache, check=check, **options)


@pytest.mark.parametrize("name", ["0.jpg", "1.png", "2.webp", "3.JPEG"])
@pytest.mark.parametrize(("mode", "check"), MODES)
def test_the_next_image_and_its_label_replace_a_corrupt_one(folder, name, mode, check):
    """After the last of a class comes the first of the next."""
    broken = folder / "train" / "bee" / name
    broken.write_bytes(broken.read_bytes()[:-40])
    data = sources.image_folder(folder, "train")
    with pytest.raises(DataError, match=f"{broken}: not a readable image .*skip_corrupt=True"):
        list(batches(data, mode, check))
    place = data.images.index(str(broken))
    places = np.arange(12) + (np.arange(12) == place)
    loading = batches(data, mode, check, skip_corrupt=True)
    for (x, y), (other_x, other_y) in zip(
        loading, batches(data.subset(places), "off", None), strict=True
    ):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)
    assert list(loading.resized.corrupt) == [place]


@pytest.mark.parametrize(("mode", "check"), MODES)
def test_every_image_is_corrupt(folder, mode, check):
    data = sources.image_folder(folder, "train")
    for image in data.images:
        open(image, "w").close()
    with pytest.raises(DataError, match="cannot be read, and neither can any other image"):
        list(batches(data, mode, check, skip_corrupt=True))


def test_large_sets_are_not_checked(folder, monkeypatch):
    decoded, pillow = [], decoders.pillow
    monkeypatch.setitem(decoders.DECODERS, "pillow", lambda *a: decoded.append(a) or pillow(*a))
    monkeypatch.setattr(open_images, "CHECKED", 11)
    for mode in ("off", "auto"):
        batches(sources.image_folder(folder, "train"), mode, None)
        assert not decoded
    batches(sources.image_folder(folder, "test"), "off", None)
    assert len(decoded) == 6


def test_a_class_of_corrupt_images_alone(folder):
    for path in (folder / "train" / "cat").iterdir():
        path.write_bytes(b"nothing")
    data = sources.image_folder(folder, "train")
    for mode in ("ram", "off"):
        with pytest.raises(DataError, match="cat: every image is corrupt; replace them"):
            training.train(Net(), data, RULE, cache=mode, skip_corrupt=True)


@pytest.mark.parametrize(("mode", "check"), MODES)
def test_resumed_after_the_corrupt_image_was_repaired(folder, tmp_path, mode, check):
    """It is left out as before, so the bits are those of an uninterrupted run."""
    broken = folder / "train" / "bee" / "1.png"
    sound = broken.read_bytes()
    broken.write_bytes(b"nothing")
    data = sources.image_folder(folder, "train")
    options = {"cache": mode, "check": check, "skip_corrupt": True, "progress": False}
    options |= {"eval_set": sources.image_folder(folder, "test"), "checkpoint_every": 2}
    straight, stopped, resumed = Net(), Net(), Net()
    expected = training.train(straight, data, RULE, **options)
    assert expected.skipped == 1
    out = tmp_path / "run"
    stopped.on_call = lambda call: call == 5 and crash_always()
    with pytest.raises(Crash):
        training.train(stopped, data, RULE, out=out, **options)
    broken.write_bytes(sound)
    with pytest.raises(ValueError, match="could not read: resume it with skip_corrupt=True"):
        refused = options | {"skip_corrupt": False}
        training.train(resumed, data, RULE, out=out, resume=True, **refused)
    result = training.train(resumed, data, RULE, out=out, resume=True, **options)
    assert result.history == expected.history and result.skipped == 1
    assert json.loads((out / "summary.json").read_text())["skipped_images"] == 1
    assert_same_bits(resumed, straight.state_dict())
