"""The order of examples and the transforms: functions of (seed, step, example) alone."""

import collections
import dataclasses
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from bitkern.transfer import HyperRule, ImageSet, train_batches
from bitkern.transfer.data.decoders import pillow
from bitkern.transfer.data.loader import AHEAD, eval_batches, gather_crops
from bitkern.transfer.data.resized import ResizedImages
from bitkern.transfer.data.threads import thread_pool
from bitkern.transfer.device_config import DeviceConfig
from bitkern.transfer.schedule import Schedule
from tests.transfer.images import image_set, picture

RULE = HyperRule(12, 8, steps=5, decay_steps=(), warmup_steps=0, mixup_alpha=0.0, batch_size=10)

CPU = DeviceConfig.create("cpu", "fp32", 0)


def images_of(**arguments):
    return list(train_batches(image_set(), RULE, **{"seed": 3, "batch_split": 3, **arguments}))


def assert_same(left, right):
    assert len(left) == len(right)
    for (x, y), (other_x, other_y) in zip(left, right, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)


@pytest.mark.parametrize("mode", ["ram", "disk", "off"])
@pytest.mark.parametrize("workers", [0, 1, 7])
def test_cache_and_threads_change_nothing(mode, workers):
    assert_same(images_of(cache=mode, workers=workers), images_of(cache="off"))


def test_images_that_stay_on_the_device_are_cut_out_there():
    batches = train_batches(image_set(), RULE, seed=3, batch_split=3, cache="ram")
    batches.on_device = torch.from_numpy(batches.resized.cached)
    assert_same(list(batches), images_of())


def test_images_are_a_view_in_channels_last():
    for x, y in images_of():
        assert x.shape == (len(y), 3, 8, 8) and x.dtype == torch.uint8
        assert x.is_contiguous(memory_format=torch.channels_last)
    images = torch.arange(2 * 3 * 4 * 3, dtype=torch.uint8).reshape(2, 3, 4, 3)
    crops = torch.tensor([[1, 1, 2, 1], [0, 0, 1, 0]])
    mirrored, plain = gather_crops(images, crops, 2)
    assert torch.equal(mirrored, images[1, 1:3, 2:4].flip(1).permute(2, 0, 1))
    assert torch.equal(plain, images[0, 0:2, 1:3].permute(2, 0, 1))


def test_memory_of_batches_is_used_again_once_nobody_holds_them():
    rule = dataclasses.replace(RULE, steps=30)
    expected = [x.clone() for x, _ in train_batches(image_set(), rule, seed=0)]
    addresses, kept = set(), []
    for number, (x, _) in enumerate(train_batches(image_set(), rule, seed=0, workers=1)):
        addresses.add(x.data_ptr())
        if number in (3, 9):
            kept.append((number, x[2:4, 1]))  # a view holds all of it
    assert len(addresses) <= 4 + len(kept)
    for number, part in kept:
        assert torch.equal(part, expected[number][2:4, 1])


@pytest.mark.parametrize("workers", [0, 2])
def test_few_batches_are_made_ahead(workers):
    """And an abandoned loader ends its threads."""
    rule = dataclasses.replace(RULE, steps=50)
    decoded, before = [], threading.active_count()
    batches = train_batches(image_set(), rule, seed=0, workers=workers, cache="off", check=False)
    decode = batches.resized.decode
    batches.resized.decode = lambda *a: decoded.append(a) or decode(*a)
    loading = iter(batches)
    for number in range(1, 4):
        next(loading)
        time.sleep(0.05)
        assert len(decoded) <= 10 * (number + (AHEAD if workers else 0))
    loading.close()
    assert threading.active_count() == before


def test_threads_and_generators_of_pytorch_stay_as_they_are():
    def state():
        return torch.get_num_threads(), torch.get_rng_state().tolist(), [*np.random.get_state()[1]]

    before = state()
    images_of(workers=2)
    assert state() == before
    with thread_pool(2) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1


def test_later_start_gives_the_tail():
    assert_same(images_of(start=2), images_of()[2 * 3 :])


def test_batch_split_only_cuts_the_batches():
    whole = images_of(batch_split=1)
    split = images_of(batch_split=4)
    assert [len(y) for _, y in split[:4]] == [3, 3, 2, 2]
    for step, (x, y) in enumerate(whole):
        parts = split[4 * step : 4 * step + 4]
        joined = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        assert_same([joined], [(x, y)])


def test_seed_decides_order_and_crops():
    labels, others = (torch.cat([y for _, y in images_of(seed=seed)]) for seed in (3, 4))
    assert not torch.equal(labels, others)


@pytest.mark.parametrize("num_examples", [1, 3, 10, 15, 50])
def test_epochs_are_permutations_without_gaps(num_examples):
    rule = dataclasses.replace(RULE, steps=15)
    batches = Schedule(num_examples, rule, seed=0, batch_split=3).micro_batches()
    pairs = [pair for batch in batches for pair in batch]
    assert [position for _, position in pairs] == list(range(150))
    epochs = collections.defaultdict(list)
    for index, position in pairs:
        epochs[position // num_examples].append(index)
    assert all(sorted(epochs[e]) == list(range(num_examples)) for e in range(150 // num_examples))
    if num_examples > 3:
        assert epochs[0] != epochs[1]


def test_train_transform_crops_and_flips_the_resized_image():
    image = picture(0, 0, 31, 23)
    resized = np.asarray(Image.fromarray(image).resize((12, 12), Image.Resampling.BILINEAR))
    crops = {}
    for top in range(5):
        for left in range(5):
            crop = resized[top : top + 8, left : left + 8]
            crops[crop.tobytes()] = (top, left, False)
            crops[np.ascontiguousarray(crop[:, ::-1]).tobytes()] = (top, left, True)
    data = ImageSet([image], np.zeros(1, np.int64), ("a",))
    rule = dataclasses.replace(RULE, steps=4, batch_size=100)
    seen = collections.Counter()
    for x, _ in train_batches(data, rule, seed=0):
        for crop in x:
            seen[crops[crop.permute(1, 2, 0).contiguous().numpy().tobytes()]] += 1
    assert len(seen) > 45, "all 50 crops and flips are equally likely"
    assert 150 < sum(n for (_, _, flipped), n in seen.items() if flipped) < 250
    for x, _ in train_batches(data, rule, seed=0, flip=False):
        for crop in x:
            assert not crops[crop.permute(1, 2, 0).contiguous().numpy().tobytes()][2]


def test_eval_transform_resizes_straight_to_the_crop():
    data = image_set(per_class=3)
    resized = ResizedImages(data.images, 8, pillow)
    batches = list(eval_batches(resized, range(9), CPU, batch_size=4))
    assert [len(x) for x, _ in batches] == [4, 4, 1]
    x = torch.cat([x for x, _ in batches])
    assert x.is_contiguous(memory_format=torch.channels_last)
    for image, ours in zip(data.images, x, strict=True):
        expected = np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BILINEAR))
        assert np.array_equal(ours.permute(1, 2, 0).numpy(), expected)


def test_input_is_in_minus_one_to_one():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    x = CPU.to_input(images)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.dtype == torch.float32 and (x.min(), x.max()) == (-1, 1)
    torch.testing.assert_close(x[0, 0].flatten(), torch.linspace(-1, 1, 256))


class _NoBlockingCopies(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_device = any(isinstance(a, torch.device) for a in args[1:])
        if function is torch.Tensor.to and to_device:
            assert kwargs.get("non_blocking"), "a copy to the device that waits for it"
        return function(*args, **kwargs)


def test_crops_are_copied_without_waiting():
    images = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    with _NoBlockingCopies():
        assert gather_crops(images, torch.zeros(2, 4, dtype=torch.int64), 4).shape == (2, 3, 4, 4)
