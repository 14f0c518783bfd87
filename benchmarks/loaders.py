"""Image loaders: ours and others. Each is measured in a process of its own.

``python -m benchmarks.loaders NAME FOLDER RESIZE CROP BATCH SECONDS`` prints what it measured.
Crops are cut out of images resized to (RESIZE, RESIZE); where that is 0, they are inception crops.
"""

import glob
import json
import os
import sys
import tarfile
import threading
import time

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from bitkern import transfer
from bitkern.transfer.data.decoders import read_image

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


MIN_AREA, RATIOS = 0.05, (3 / 4, 4 / 3)  # of an inception crop


def rule(resize, crop, batch, steps=10**6):
    """The recipe whose batches are measured."""
    if resize:
        return transfer.HyperRule(resize, crop, steps, (), 0, 0.0, batch_size=batch)
    return transfer.Pretraining(steps, (), 0, batch_size=batch, crop=crop, min_area=MIN_AREA)


def _ours(cache):
    def load(folder, resize, crop, batch):
        data = transfer.image_folder(folder, "train")
        how = {"seed": 0, "workers": CORES, "cache": cache, "check": False}
        return transfer.train_batches(data, rule(resize, crop, batch), **how)

    return load


def _whole(*arguments):
    """Ours, but decoding all pixels of an image at full scale before it is cropped."""

    def decode(source, size, region):
        image = read_image(source)
        top, left, height, width = region(image.height, image.width)
        box = left, top, left + width, top + height
        return np.array(image.resize((size, size), Image.Resampling.BILINEAR, box))

    batches = _ours("off")(*arguments)
    batches.resized.decode = decode
    return batches


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

    cut = [v2.Resize((resize, resize)), v2.RandomCrop(crop)]
    if not resize:
        cut = [v2.RandomResizedCrop(crop, (MIN_AREA, 1), RATIOS)]
    return v2.Compose([*cut, v2.RandomHorizontalFlip()])


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
    if not resize:
        steps = [transforms.RandomResizedCrop(crop, (MIN_AREA, 1), RATIOS)]
    steps += [transforms.RandomHorizontalFlip(), ToNumpy()]
    dataset = ImageDataset(f"{folder}/train", transform=transforms.Compose(steps))
    return _loader(dataset, batch, collate_fn=fast_collate)


def _webdataset(folder, resize, crop, batch):
    import webdataset

    transform = _v2(resize, crop)
    shards = sorted(glob.glob(f"{folder}/*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=SHARDS, nodesplitter=None)
    decoded = dataset.shuffle(100).decode("torchrgb8", only="jpg").to_tuple("jpg", "cls")
    endless = decoded.map_tuple(transform, int).repeat()
    return DataLoader(endless, batch, num_workers=CORES)


PEERS = {"torchvision": _torchvision, "timm": _timm, "webdataset": _webdataset}
RESIZED = {"ours": _ours("ram"), "uncached": _ours("off"), **PEERS}
INCEPTION = {"ours": _ours("off"), "whole": _whole, **PEERS}


def of(resize):
    """The loaders that are compared."""
    return RESIZED if resize else INCEPTION


def _tree(pid):
    """A process and those that it started."""
    yield pid
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        with open(path) as file:
            for child in file.read().split():
                yield from _tree(int(child))


def memory_mb():
    """Memory of this process and its workers, shared pages counted once."""
    total = 0
    for pid in _tree(os.getpid()):
        try:
            with open(f"/proc/{pid}/smaps_rollup") as file:
                (line,) = (line for line in file if line.startswith("Pss:"))
        except (OSError, ValueError):  # it has ended
            continue
        total += int(line.split()[1])
    return total / 1e3


class Memory(threading.Thread):
    """The most memory held during the block, beyond that before it."""

    def __enter__(self):
        self.before, self.peak, self.ended = memory_mb(), 0.0, threading.Event()
        self.start()
        return self

    def run(self):
        while not self.ended.wait(0.2):
            self.peak = max(self.peak, memory_mb() - self.before)

    def __exit__(self, *_):
        self.ended.set()
        self.join()


def cpu_seconds():
    """Processor time of this process and those that it started, ended ones included."""
    total = 0
    for pid in _tree(os.getpid()):
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15]))
    return total / os.sysconf("SC_CLK_TCK")


class Spent:
    """Seconds of wall and of processor time in the block."""

    def __enter__(self):
        self.began = time.perf_counter(), cpu_seconds()
        return self

    def __exit__(self, *_):
        wall, cores = self.began
        self.wall, self.cores = time.perf_counter() - wall, cpu_seconds() - cores


def measured(name, folder, resize, crop, batch, seconds):
    """Milliseconds an image, of wall and of core time, in the first epoch and in later ones.

    The first begins with what the loader does before its first batch. And the MB it held at most.
    """
    images = len(glob.glob(f"{folder}/train/*/*.jpg"))
    with Memory() as memory:
        with Spent() as first:
            batches = iter(of(resize)[name](folder, resize, crop, batch))
            for _ in range(-(-images // batch)):
                next(batches)
        count, end = 0, time.perf_counter() + seconds
        with Spent() as later:
            while time.perf_counter() < end:
                next(batches)
                count += batch
    spent = {"first": (first, images), "later": (later, count)}
    ms = {f"{epoch}/wall": 1e3 * s.wall / n for epoch, (s, n) in spent.items()}
    ms |= {f"{epoch}/core": 1e3 * s.cores / n for epoch, (s, n) in spent.items()}
    return {"ms": ms, "peak_mb": memory.peak}


if __name__ == "__main__":
    name, folder, *numbers, seconds = sys.argv[1:]
    print(json.dumps(measured(name, folder, *map(int, numbers), float(seconds))))
