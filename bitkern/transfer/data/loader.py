"""Batches of images as BiT transforms them.

Images leave here as uint8 (N, 3, crop, crop) and are scaled to [-1, 1] on the device.
"""

import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bitkern.transfer.compute import Compute
from bitkern.transfer.data.images import DataError, ImageSet, Pixels, Source, read_image
from bitkern.transfer.recipes import Recipe
from bitkern.transfer.schedule import Schedule
from bitkern.transfer.streams import AUGMENT, random_stream


def _to_tensor(pixels: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


class TrainView(Dataset[tuple[Tensor, Any]]):
    """What the recipe makes of images, half of them mirrored. Asked for as (index, position).

    ``position`` counts the examples since the start of training; with the seed it decides on all
    that is left to chance.
    """

    def __init__(self, data: ImageSet, recipe: Recipe, seed: int, flip: bool) -> None:
        self.data = data
        self.recipe = recipe
        self.seed = seed
        self.flip = flip

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Any]:
        index, position = key
        pixels = self.recipe.prepare(read_image(self.data.images[index]))
        random = random_stream(AUGMENT, position, self.seed)
        pixels = self.recipe.augment(pixels, random)
        if self.flip and random.integers(2):
            pixels = pixels[:, ::-1]
        return _to_tensor(pixels), self.data.labels[index]


class EvalView(Dataset[Tensor | DataError]):
    """Images resized straight to (crop, crop); in place of an unreadable one, what is wrong."""

    def __init__(self, images: Sequence[Source], crop: int) -> None:
        self.images = images
        self.crop = crop

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | DataError:
        from PIL.Image import Resampling

        try:
            image = read_image(self.images[index])
        except DataError as error:
            return error
        image = image.resize((self.crop, self.crop), Resampling.BILINEAR)
        return _to_tensor(np.asarray(image))


class EvalBatch(NamedTuple):
    """uint8 images (N, 3, crop, crop), and by their places in the batch those that are missing."""

    images: Tensor
    unreadable: dict[int, DataError]


def _eval_batch(items: Sequence[Tensor | DataError]) -> EvalBatch:
    unreadable = {i: item for i, item in enumerate(items) if isinstance(item, DataError)}
    images = [item for item in items if isinstance(item, Tensor)]
    empty = torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    return EvalBatch(torch.stack(images) if images else empty, unreadable)


class _MicroBatches:
    """The batch sampler of a schedule."""

    def __init__(self, schedule: Schedule, start: int) -> None:
        self.schedule, self.start = schedule, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.schedule.micro_batches(self.start)


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the main process decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _loader(dataset: Dataset[Any], compute: Compute, **batching: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        num_workers=compute.workers,
        worker_init_fn=_ignore_interrupt,
        pin_memory=compute.device.type == "cuda",
        generator=torch.Generator(),  # its own, so that the caller's stays as it was
        **batching,
    )


def scheduled_batches(
    data: ImageSet, schedule: Schedule, compute: Compute, *, flip: bool, start: int
) -> DataLoader[Any]:
    """The micro-batches of a schedule, those of this process, from optimizer step ``start`` on."""
    view = TrainView(data, schedule.recipe, schedule.seed, flip)
    return _loader(view, compute, batch_sampler=_MicroBatches(schedule, start))


def train_batches(
    data: ImageSet,
    rule: Recipe,
    *,
    seed: int,
    batch_split: int = 1,
    flip: bool = True,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    device: str | torch.device = "cpu",
) -> DataLoader[Any]:
    """Micro-batches (images uint8 (N, 3, crop, crop), labels), ``batch_split`` to a step.

    Those of :func:`train` for the same data, recipe and seed, for steps from ``start`` on. Of
    ``world_size`` processes, number ``rank`` loads its part of each.
    """
    schedule = Schedule(len(data.images), rule, seed, batch_split, rank, world_size)
    compute = Compute.of(device, "fp32", workers)
    return scheduled_batches(data, schedule, compute, flip=flip, start=start)


def eval_batches(
    images: Sequence[Source], crop: int, compute: Compute, *, batch_size: int = 64
) -> DataLoader[Any]:
    """Each :class:`EvalBatch` of the images, in order."""
    view = EvalView(images, crop)
    return _loader(view, compute, batch_size=batch_size, collate_fn=_eval_batch)
