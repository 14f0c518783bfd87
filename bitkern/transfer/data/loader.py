"""Batches: which examples each optimizer step takes, and BiT's image transforms.

Images leave here as uint8 (N, 3, crop, crop) and are scaled to [-1, 1] on the device.
"""

import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bitkern.transfer.data import AUGMENT, MIXUP, ORDER, ImageSet, random_stream, read_image
from bitkern.transfer.hyperrule import HyperRule


def _resized(source, size: int) -> np.ndarray:
    """The image as a (size, size, 3) uint8 array, resized without keeping its aspect ratio."""
    from PIL import Image

    return np.asarray(read_image(source).resize((size, size), Image.Resampling.BILINEAR))


def _to_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


class TrainView(Dataset):
    """Resize, random crop, horizontal flip. Items are asked for as (index, position).

    ``position`` counts the examples since the start of training; with the seed it decides the crop
    and the flip.
    """

    def __init__(self, data: ImageSet, rule: HyperRule, seed: int, flip: bool):
        self.data = data
        self.resize, self.crop = rule.resize, rule.crop
        self.seed = seed
        self.flip = flip

    def __getitem__(self, key):
        index, position = key
        pixels = _resized(self.data.images[index], self.resize)
        random = random_stream(AUGMENT, position, self.seed)
        top, left = random.integers(self.resize - self.crop, size=2, endpoint=True)
        pixels = pixels[top : top + self.crop, left : left + self.crop]
        if self.flip and random.integers(2):
            pixels = pixels[:, ::-1]
        return _to_tensor(pixels), int(self.data.labels[index])


class EvalView(Dataset):
    """Resize straight to (crop, crop)."""

    def __init__(self, data: ImageSet, crop: int):
        self.data = data
        self.crop = crop

    def __len__(self):
        return len(self.data.images)

    def __getitem__(self, index):
        pixels = _resized(self.data.images[index], self.crop)
        return _to_tensor(pixels), int(self.data.labels[index])


class Part(NamedTuple):
    """What one process does of a micro-batch.

    ``rows`` int64 (M,) are the examples it loads, as positions in the step's batch. It computes the
    first ``own`` of them; the rest are there to be mixed in. ``permutation`` int64 (M,) is MixUp's,
    of these rows; None without MixUp.
    """

    rows: np.ndarray
    own: int
    permutation: np.ndarray | None


def _along_cycles(permutation: np.ndarray) -> np.ndarray:
    """0 … N-1 in an order in which the image of each under ``permutation`` tends to follow it."""
    order = {}  # as an ordered set
    for row in range(len(permutation)):
        while row not in order:
            order[row] = None
            row = int(permutation[row])
    return np.array(list(order))


def _part(rows: np.ndarray, permutation: np.ndarray | None, rank: int, world_size: int) -> Part:
    order = np.arange(len(rows))
    if permutation is not None and world_size > 1:
        order = _along_cycles(permutation)  # so that few partners are another process's
    own = np.array_split(order, world_size)[rank]
    if permutation is None:
        return Part(rows[own], len(own), None)
    partners = permutation[own]
    loaded = np.concatenate([own, np.setdiff1d(partners, own)])
    place = {row: i for i, row in enumerate(loaded)}
    local = [place[row] for row in partners]
    # The rows mixed in take the partners that are left, whatever they are.
    local += sorted(set(range(len(loaded))) - set(local))
    return Part(rows[loaded], len(own), np.array(local))


def plan(
    rule: HyperRule, step: int, seed: int, batch_split: int, rank: int = 0, world_size: int = 1
) -> tuple[float | None, list[Part]]:
    """MixUp's lambda in a step, None without MixUp, and the process's part of each micro-batch.

    The parts of all processes make up the micro-batch, mixed as a single process mixes it.
    """
    random = random_stream(MIXUP, step, seed)
    lam = random.beta(rule.mixup_alpha, rule.mixup_alpha) if rule.mixup_alpha else None
    parts = []
    for rows in np.array_split(np.arange(rule.batch_size), batch_split):
        permutation = None if lam is None else random.permutation(len(rows))
        parts.append(_part(rows, permutation, rank, world_size))
    return lam, parts


class MicroBatches:
    """The (index, position) pairs of each micro-batch, from optimizer step ``start`` on.

    The examples come in one endless stream of epochs, each a permutation drawn from (seed, epoch),
    and a step takes the next ``batch_size`` of it: also from sets smaller than a batch. Of several
    processes each loads the part that :func:`plan` gives it.
    """

    def __init__(
        self,
        num_examples,
        rule: HyperRule,
        seed: int,
        batch_split: int,
        start: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.num_examples = num_examples
        self.rule = rule
        self.seed = seed
        self.batch_split = batch_split
        self.start = start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = None, None
        for step in range(self.start, self.rule.steps):
            batch = []
            first = step * self.rule.batch_size
            for position in range(first, first + self.rule.batch_size):
                if position // self.num_examples != epoch:
                    epoch = position // self.num_examples
                    order = random_stream(ORDER, epoch, self.seed).permutation(self.num_examples)
                batch.append((int(order[position % self.num_examples]), position))
            share = self.seed, self.batch_split, self.rank, self.world_size
            for part in plan(self.rule, step, *share)[1]:
                yield [batch[row] for row in part.rows]


def _ignore_interrupt(worker):
    # Ctrl-C reaches the whole process group; the main process decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _loader(dataset, workers, device, **batching) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        worker_init_fn=_ignore_interrupt,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # its own, so that the caller's stays as it was
        **batching,
    )


def train_batches(
    data: ImageSet,
    rule: HyperRule,
    *,
    seed: int,
    batch_split: int = 1,
    flip: bool = True,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    device="cpu",
) -> DataLoader:
    """Micro-batches (images, labels), ``batch_split`` to a step, for steps from ``start`` on.

    Of ``world_size`` processes, number ``rank`` loads its :class:`Part` of each.
    """
    batches = MicroBatches(len(data.images), rule, seed, batch_split, start, rank, world_size)
    return _loader(TrainView(data, rule, seed, flip), workers, device, batch_sampler=batches)


def eval_batches(data: ImageSet, crop: int, *, batch_size=64, workers=0, device="cpu"):
    """Batches (images, labels) of the whole set in order."""
    return _loader(EvalView(data, crop), workers, device, batch_size=batch_size)


def to_input(images: torch.Tensor, device) -> torch.Tensor:
    """uint8 (N, 3, H, W) as fp32 in [-1, 1] on the device, channels_last on a GPU."""
    images = images.to(device, non_blocking=True)
    if images.is_cuda:
        images = images.contiguous(memory_format=torch.channels_last)
    return images.float() / 127.5 - 1
