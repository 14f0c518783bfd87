"""The pre-training against an oracle of the published recipe, and its crops."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bitkern.transfer import (
    DataError,
    ImageSet,
    Pretraining,
    TrainingError,
    pretraining,
    train_batches,
)
from bitkern.transfer.data import decoders
from bitkern.transfer.data.decoders import DECODERS, pillow
from tests.transfer.images import image_set, picture
from tests.transfer.net import PLAIN, Net, assert_same_bits, state_of, stopped, train

# arXiv 1912.11370, section 3.3: epochs, and those at which the learning rate falls.
PUBLISHED = {
    "BiT-S": (90, (30, 60, 80)),
    "BiT-M": (90, (30, 60, 80)),
    "BiT-L": (40, (10, 23, 30, 37)),
}
RULE = Pretraining(6, (4,), warmup_steps=2, base_lr=2.56, batch_size=10, crop=8)


def published_lr(preset, num_examples, batch_size, step):
    """By the number of images that were seen before the step, in exact integers."""
    _, decay_epochs = PUBLISHED[preset]
    peak = 0.03 * batch_size / 256
    # An epoch that ends within a step counts from the nearest start of one.
    falls = [(2 * epoch * num_examples + batch_size) // (2 * batch_size) for epoch in decay_epochs]
    return peak * min(step, 5000) / 5000 * 0.1 ** sum(fall <= step for fall in falls)


@pytest.mark.parametrize("preset", PUBLISHED)
@pytest.mark.parametrize("num_examples", [1_281_167, 14_212_971, 300_000_000])
@pytest.mark.parametrize("batch_size", [1000, 4096])
def test_schedule(preset, num_examples, batch_size):
    rule = pretraining(preset, num_examples, batch_size)
    epochs, decay_epochs = PUBLISHED[preset]
    assert abs(rule.steps - epochs * num_examples / batch_size) <= 0.5
    for decay, epoch in zip(rule.decay_steps, decay_epochs, strict=True):
        assert abs(decay - epoch * num_examples / batch_size) <= 0.5
    edges = [0, 1, 4999, 5000, 5001, rule.steps - 1]
    edges += [decay + i for decay in rule.decay_steps for i in (-1, 0, 1)]
    for step in (*edges, *np.linspace(0, rule.steps - 1, 200).astype(int).tolist()):
        expected = published_lr(preset, num_examples, batch_size, step)
        assert math.isclose(rule.lr(step), expected, rel_tol=1e-12), step
    assert (rule.weight_decay, rule.crop, rule.mixup_alpha) == (1e-4, 224, 0)
    assert rule.sigmoid == (preset != "BiT-S")


def test_figures_of_the_paper():
    assert pretraining("BiT-S", 1_281_167).steps == 28_151
    assert pretraining("BiT-M", 14_212_971).decay_steps == (104_099, 208_198, 277_597)
    rule = pretraining("BiT-L", 300_000_000)
    assert (rule.steps, rule.lr(5000)) == (2_929_688, 0.48)


@pytest.mark.parametrize(
    ("values", "steps", "decays"),
    [
        ({}, 900, (300, 600, 800)),
        ({"epochs": 9}, 90, (30, 60, 80)),
        ({"steps": 450}, 450, (150, 300, 400)),
        ({"decay_epochs": (45,)}, 900, (450,)),
        ({"decay_epochs": ()}, 900, ()),
        ({"steps": 50, "decay_epochs": (3,)}, 50, (30,)),
        ({"batch_size": 50}, 1800, (600, 1200, 1600)),
    ],
)
def test_values_in_place(values, steps, decays):
    rule = pretraining("BiT-S", 1000, **{"batch_size": 100, "warmup_steps": 10, **values})
    assert (rule.steps, rule.decay_steps, rule.warmup_steps) == (steps, decays, 10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "BiT-XL"}, "preset: expected BiT-S, BiT-M, BiT-L, got 'BiT-XL'"),
        ({}, "warmup_steps: expected fewer than the 90 steps of the training, got 5000"),
        ({"warmup_steps": 90}, "warmup_steps: expected fewer than the 90 steps .*, got 90"),
        ({"warmup_steps": -1}, "warmup_steps: expected 0 or more, got -1"),
        ({"num_examples": 0}, "num_examples: expected a positive number, got 0"),
        ({"batch_size": 0}, "batch_size: expected a positive number, got 0"),
        ({"steps": 0}, "steps: expected a positive number, got 0"),
        ({"epochs": math.inf}, "epochs: expected a positive number, got inf"),
        ({"steps": 5, "epochs": 1}, "steps: expected no epochs beside them, got 1"),
        ({"image_size": 0}, "image_size: expected a positive number of pixels, got 0"),
        ({"warmup_steps": 1, "base_lr": math.nan}, "base_lr: expected a positive finite number"),
        ({"warmup_steps": 1, "weight_decay": -1}, "weight_decay: expected a finite number, 0"),
        ({"warmup_steps": 1, "min_area": 0}, "min_area: expected a fraction up to 1, got 0"),
        ({"decay_epochs": (30, -1)}, "decay_epochs: expected positive numbers, got -1"),
        ({"decay_epochs": (math.inf,)}, "decay_epochs: expected positive numbers, got inf"),
        ({"warmup_steps": 1, "decay_epochs": (60, 30)}, "decay_steps: expected ascending steps"),
    ],
)
def test_rejects(values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        pretraining(**{"preset": "BiT-S", "num_examples": 1000, "batch_size": 1000, **values})


def test_loss_is_summed_over_classes_and_a_mean_over_images():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=random, dtype=torch.float64)
    labels = torch.randint(7, (5,), generator=random)
    softmax = dataclasses.replace(RULE, sigmoid=False)
    sigmoid = dataclasses.replace(RULE, sigmoid=True)
    torch.testing.assert_close(softmax.loss(logits, labels), F.cross_entropy(logits, labels))
    several = torch.rand(5, 7, generator=random) < 0.4
    for given, truth in ((several, several), (labels, F.one_hot(labels, 7).bool())):
        chances = logits.sigmoid()
        expected = -torch.where(truth, chances, 1 - chances).log().sum(1).mean()
        torch.testing.assert_close(sigmoid.loss(logits, given), expected)
    with pytest.raises(ValueError, match="^labels: expected one per image for a softmax"):
        softmax.loss(logits, several)


def test_head_begins_with_the_chance_of_a_class():
    rule = pretraining("BiT-M", 14_212_971)
    assert round(rule.head_bias(21_843), 2) == -9.99  # -10 in configs/bit_i21k.py
    chances = torch.tensor(rule.head_bias(8)).sigmoid()
    torch.testing.assert_close(chances, torch.tensor(1 / 9))
    assert pretraining("BiT-S", 1_281_167).head_bias(1000) == 0


@pytest.mark.parametrize(
    "height, width", [(375, 500), (500, 375), (33, 31), (224, 224), (1080, 1920), (2, 3)]
)
@pytest.mark.parametrize("min_area", [0.05, 0.5])
def test_regions_are_inception_crops(height, width, min_area):
    rule = dataclasses.replace(RULE, min_area=min_area)
    chance = np.random.default_rng(0).random((4000, 4))
    sizes = np.broadcast_to([height, width], (4000, 2))
    top, left, tall, wide = rule.regions(chance, sizes).T
    assert (top >= 0).all() and (left >= 0).all() and (tall >= 1).all() and (wide >= 1).all()
    assert (top + tall <= height).all() and (left + wide <= width).all()
    area = tall * wide / (height * width)
    assert (area >= min_area).all()
    assert ((wide - 1 < tall * 4 / 3) & (wide > tall * 3 / 4 - 1e-9)).all()
    if min(height, width) > 100:
        # The ends of all ranges are met, and the corners are everywhere.
        ratio, low, high = wide / tall, 3 / 4, 4 / 3
        low, high = max(low, min_area * width / height), min(high, width / height / min_area)
        assert ratio.min() < low + 0.01 and ratio.max() > high - 0.01
        assert abs(ratio.mean() - (low + high) / 2) < 0.01
        assert area.min() < min_area + 0.01 and area.max() > 0.73
        assert (top == 0).any() and (top + tall == height).any()
        assert (left == 0).any() and (left + wide == width).any()


def test_region_of_an_image_too_long_for_any_is_the_whole():
    chance = np.random.default_rng(0).random((50, 4))
    for size in ([1000, 7], [7, 1000]):
        regions = RULE.regions(chance, np.broadcast_to(size, (50, 2)))
        assert (regions == [0, 0, *size]).all()


class Encoded:
    """An image that is decoded as a file is; ``cut`` bytes are missing."""

    def __init__(self, pixels, format="JPEG", cut=0, **options):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format, **options)
        self.data = file.getvalue()[: file.tell() - cut]

    def read(self):
        return self.data


def smooth(height, width):
    """An image that changes slowly, so that scales can be compared."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(y / 31), np.cos(x / 29), np.sin((x + y) / 37)]
    return (127 + 100 * np.stack(waves, 2)).astype(np.uint8)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("scale", [1, 2, 9])
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 7, 8])
def test_region_of_a_jpeg(name, scale, orientation):
    pixels = smooth(60 * scale + 3, 80 * scale + 5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = Encoded(pixels, quality=95, exif=exif)
    upright = np.asarray(decoders.read_image(source))
    told = []

    def region(height, width):
        told.append((height, width))
        return 7 * scale, 11 * scale, 33 * scale, 35 * scale

    got = DECODERS[name](source, 16, region)
    assert told == [upright.shape[:2]]
    # But for its edges, where Pillow's filter sees what is outside the box.
    box = (11 * scale, 7 * scale, 46 * scale, 40 * scale)
    expected = np.asarray(Image.fromarray(upright).resize((16, 16), Image.Resampling.BILINEAR, box))
    assert np.abs(got.astype(int) - expected)[1:-1, 1:-1].max() <= 3
    assert got.dtype == np.uint8 and got.flags.writeable


@pytest.mark.parametrize("wide, scale", [(15, 1), (31, 1), (32, 2), (64, 4), (127, 4), (128, 8)])
def test_fewer_pixels_of_a_large_jpeg_are_decoded(wide, scale):
    source = Encoded(smooth(200, 200))
    image, box = decoders.read_region(source, 16, lambda height, width: (3, 5, wide, wide))
    assert image.size == (-(-200 // scale), -(-200 // scale))
    assert box == (5 / scale, 3 / scale, (5 + wide) / scale, (3 + wide) / scale)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF"])
def test_region_of_what_is_no_jpeg(format):
    source = Encoded(picture(1, 2, 64, 50), format, lossless=True)
    whole = np.asarray(decoders.read_image(source))
    got = pillow(source, 8, lambda height, width: (10, 20, 30, 25))
    box = (20, 10, 45, 40)
    expected = Image.fromarray(whole).resize((8, 8), Image.Resampling.BILINEAR, box)
    assert np.array_equal(got, np.asarray(expected))


def batches_of(data, **options):
    return list(train_batches(data, RULE, **{"seed": 3, "batch_split": 3, **options}))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_regions_of_whole_images(workers):
    data = image_set()
    found = batches_of(data, workers=workers)
    again = batches_of(data, cache="ram")
    assert [len(y) for _, y in found] == [4, 3, 3] * RULE.steps
    for (x, y), (other_x, other_y) in zip(found, again, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)
        assert x.shape == (len(y), 3, 8, 8) and x.dtype == torch.uint8
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_every_position_has_a_region_and_a_side_of_its_own():
    # Of an image whose pixels tell where they are.
    y, x = np.mgrid[:64, :64]
    image = np.stack([4 * y, 4 * x, 0 * x], 2).astype(np.uint8)
    data = ImageSet([image] * 2, np.array([0, 1]), ("a", "b"))
    seen = torch.cat([x for x, _ in batches_of(data)]).float()
    rows, columns = seen[:, 0].mean(2), seen[:, 1].mean(1)
    starts = torch.stack([rows[:, 0], rows[:, -1], columns[:, 0], columns[:, -1]], 1)
    assert len(starts.unique(dim=0)) == len(seen)
    flipped = columns[:, 0] > columns[:, -1]
    assert 0.2 < flipped.float().mean() < 0.8
    unflipped = torch.cat([x for x, _ in batches_of(data, flip=False)]).float()
    assert (unflipped[:, 1, 0, 0] < unflipped[:, 1, 0, -1]).all()
    expected = torch.where(flipped[:, None, None, None], seen.flip(3), seen)
    assert torch.equal(expected, unflipped)


def test_next_image_stands_in_for_a_corrupt_one():
    good, bad = (Encoded(picture(0, 1, 30, 40), cut=cut) for cut in (0, 200))
    data = ImageSet([good, bad, good], np.array([0, 1, 2]), ("a", "b", "c"))
    with pytest.raises(DataError, match="not a readable image"):
        batches_of(data, check=False)
    labels = torch.cat([y for _, y in batches_of(data, check=False, skip_corrupt=True)])
    assert set(labels.tolist()) == {0, 2}


@pytest.mark.parametrize("sigmoid", [False, True])
def test_training_and_resuming(tmp_path, sigmoid):
    rule = dataclasses.replace(RULE, sigmoid=sigmoid, steps=20, base_lr=1.0)
    options = {"rule": rule, "eval_set": image_set(2)}
    straight, resumed = Net(), Net()
    result = train(straight, **options)
    losses = [record["loss"] for record in result.history if "loss" in record]
    assert losses[-1] < losses[0]
    assert ("mean_average_precision" in result.metrics) == sigmoid
    stopped(tmp_path, **options)
    again = train(resumed, out=tmp_path, resume=True, **options)
    assert_same_bits(resumed, state_of(straight))
    assert again.history == result.history


def test_sigmoids_that_diverge():
    model = Net()
    model.on_call = lambda call: call == 6 and model.head.bias.data.fill_(torch.nan)
    rule = dataclasses.replace(RULE, sigmoid=True)
    with pytest.raises(TrainingError, match="loss is nan at step 6: try a lower base_lr"):
        train(model, rule, eval_set=image_set(2), eval_every=6)


def test_balanced_sigmoids_weigh_rare_positives():
    data = image_set()
    rule = dataclasses.replace(RULE, sigmoid=True)
    models = Net(), Net()
    for model, labels in zip(models, (data, data.as_multi_label()), strict=True):
        train(model, rule, labels, balance="loss")
    assert_same_bits(models[0], state_of(models[1]))
    _, y = next(iter(train_batches(data.as_multi_label(), rule, seed=0)))
    assert y.dtype == torch.bool and y.shape == (10, 3)
    plain = Net()
    train(plain, rule, data)
    assert not torch.equal(plain.head.weight, models[0].head.weight)


def test_labels_to_evaluate_on_are_as_those_to_train_on():
    data = image_set()
    rule = dataclasses.replace(PLAIN, steps=2)
    one, several = (
        train(Net(), rule, data.as_multi_label(), eval_set=some).metrics
        for some in (data, data.as_multi_label())
    )
    assert one == several and "mean_average_precision" in one
    with pytest.raises(ValueError, match="^eval_set: expected one label per image as train_set"):
        train(Net(), rule, data, eval_set=data.as_multi_label())
