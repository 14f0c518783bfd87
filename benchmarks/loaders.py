"""What loads images: ours and others. Each is measured in a process of its own.

``python -m benchmarks.loaders NAME FOLDER RESIZE CROP BATCH SECONDS`` prints what it measured.
"""

import glob
import json
import os
import resource
import sys
import tarfile
import threading
import time
from itertools import count, cycle, islice

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from bitkern import transfer
from bitkern.transfer.data.decoders import pillow

CORES = len(os.sched_getaffinity(0))
SHARDS = 4


def write_images(folder, width, height, number):
    """``folder/train/{a,b}/*.jpg``, as detailed as photographs, and the same in tar shards."""
    random = np.random.default_rng(0)
    shards = [tarfile.open(folder / f"train-{i:06}.tar", "w") for i in range(SHARDS)]
    for i in range(number):
        coarse = random.integers(0, 256, (height // 20, width // 20, 3), np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noisy = np.asarray(image) + random.normal(0, 6, (height, width, 3))
        path = folder / "train" / "ab"[i % 2] / f"{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        path.with_suffix(".cls").write_text(str(i % 2))
        for name in (path, path.with_suffix(".cls")):
            shards[i % SHARDS].add(name, name.name)
    for shard in shards:
        shard.close()


def _ours(cache):
    def load(folder, resize, crop, batch):
        data = transfer.image_folder(folder, "train")
        rule = transfer.HyperRule(resize, crop, 10**6, (), 0, 0.0, batch_size=batch)
        options = {"seed": 0, "workers": CORES, "check": False}
        batches = transfer.train_batches(data, rule, cache=cache, **options)
        plain = transfer.train_batches(data, rule, seed=0, cache="off", check=False)
        (x, y), (expected, labels) = next(iter(batches)), next(iter(plain))
        assert torch.equal(x, expected) and torch.equal(y, labels)
        assert x.shape == (batch, 3, crop, crop) and x.dtype == torch.uint8
        return batches

    return load


class _Files(Dataset):
    def __init__(self, folder, transform):
        self.paths = glob.glob(f"{folder}/train/*/*.jpg")
        self.transform = transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(self.paths[index]), 0


def _v2(resize, crop):
    from torchvision.transforms import v2

    return v2.Compose(
        [v2.Resize((resize, resize)), v2.RandomCrop(crop), v2.RandomHorizontalFlip()]
    )


def _endless(loader):
    while True:
        yield from loader


def _loader(dataset, batch, **options):
    options |= {"num_workers": CORES, "persistent_workers": True}
    return _endless(DataLoader(dataset, batch, shuffle=True, drop_last=True, **options))


def _torchvision(folder, resize, crop, batch):
    from torchvision.io import decode_jpeg, read_file

    transform = _v2(resize, crop)
    return _loader(_Files(folder, lambda path: transform(decode_jpeg(read_file(path)))), batch)


def _timm(folder, resize, crop, batch):
    """Its folders, its transforms on Pillow's images and its collation into uint8."""
    from timm.data import ImageDataset
    from timm.data.loader import fast_collate
    from timm.data.transforms import ToNumpy
    from torchvision import transforms

    steps = [transforms.Resize((resize, resize)), transforms.RandomCrop(crop)]
    steps += [transforms.RandomHorizontalFlip(), ToNumpy()]
    dataset = ImageDataset(f"{folder}/train", transform=transforms.Compose(steps))
    return _loader(dataset, batch, collate_fn=fast_collate)


def _webdataset(folder, resize, crop, batch):
    import webdataset

    transform = _v2(resize, crop)
    shards = sorted(glob.glob(f"{folder}/*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=SHARDS, nodesplitter=None)
    decoded = dataset.shuffle(100).decode("torchrgb8").to_tuple("jpg", "cls")
    return _endless(DataLoader(decoded.map_tuple(transform), batch, num_workers=CORES))


LOADERS = {
    "ours": _ours("ram"),
    "uncached": _ours("off"),
    "torchvision": _torchvision,
    "timm": _timm,
    "webdataset": _webdataset,
}
