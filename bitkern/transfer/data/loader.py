"""Batches of images with BiT's transforms, prefetched by threads.

Batches are uint8 (N, 3, crop, crop), views of (N, crop, crop, 3) and so channels_last; they are
scaled to [-1, 1] on the device.
"""

import dataclasses
import math
import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitkern.transfer.data.images import DataError, ImageSet, Pixels, Region, Source
from bitkern.transfer.data.open_images import ImageReadOptions, open_resized
from bitkern.transfer.data.resized import SPAN, ResizedImages
from bitkern.transfer.data.threads import prefetch, thread_pool
from bitkern.transfer.device_config import DeviceConfig
from bitkern.transfer.recipes import Recipe
from bitkern.transfer.rng import AUGMENT, uniforms
from bitkern.transfer.schedule import Schedule

AHEAD = 2  # batches started before they are requested
Key = TypeVar("Key")
Result = TypeVar("Result")


class _BufferPool:
    """Memory for batches, reused when no tensor in it is left, because new pages are slow.

    For a GPU PyTorch does the same with pinned memory.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.free: list[Pixels] = []

    def empty(self, *shape: int) -> Tensor:
        if self.pinned:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        size = math.prod(shape)
        buffer = self.free.pop() if self.free else np.empty(size, np.uint8)
        if buffer.size < size:
            buffer = np.empty(size, np.uint8)
        array = buffer[:size].reshape(shape)  # the tensor and its views keep it alive
        weakref.finalize(array, self.free.append, buffer).atexit = False
        return torch.from_numpy(array)


def load_batches(
    keys: Iterable[Sequence[Key]],
    load: Callable[[Tensor, Key], Result],
    size: int,
    config: DeviceConfig,
) -> Iterator[tuple[Tensor, list[Result]]]:
    """Yield a batch uint8 (N, 3, size, size) for each list of keys, with the results of ``load``.

    ``load`` writes the image of a key into a tensor (size, size, 3), in a thread.
    """
    buffers = _BufferPool(config.device.type == "cuda")
    at_exit = sys.is_finalizing  # a local, because Python may have cleared the globals by then

    def load_span(images: Tensor, span: Sequence[Key]) -> list[Result]:
        return [load(image, key) for image, key in zip(images, span, strict=True)]

    def start(batch: Sequence[Key]) -> Callable[[], tuple[Tensor, list[Result]]]:
        images = buffers.empty(len(batch), size, size, 3)
        spans = [slice(first, first + SPAN) for first in range(0, len(batch), SPAN)]
        if pool:
            pending = [pool.submit(load_span, images[span], batch[span]) for span in spans]
            results = (future.result() for future in pending)
        else:
            results = (load_span(images[span], batch[span]) for span in spans)
        return lambda: (images.permute(0, 3, 1, 2), [each for span in results for each in span])

    pool = thread_pool(config.workers) if config.workers else None
    try:
        yield from prefetch(start, keys, AHEAD if pool else 0)
    finally:
        if pool and not at_exit():
            pool.shutdown(cancel_futures=True)


class Crop(NamedTuple):
    """An image's index, the corner of its crop, its flip, the region to decode if not all."""

    image: int
    top: int
    left: int
    flip: bool
    region: Region | None = None


@dataclasses.dataclass(eq=False, repr=False)
class TrainBatches:
    """This process's micro-batches of a schedule, from optimizer step ``start`` on.

    Each is (images uint8 (N, 3, crop, crop), labels of the set's dtype). All randomness is a
    function of the seed and the position of an example since the start of training. ``on_device``
    uint8 (N, resize, resize, 3) are the images, if they are kept on a GPU.
    """

    data: ImageSet
    resized: ResizedImages
    schedule: Schedule
    config: DeviceConfig
    flip: bool
    skip_corrupt: bool
    start: int
    on_device: Tensor | None

    def __iter__(self) -> Generator[tuple[Tensor, Tensor]]:
        crop, full_image = self.schedule.recipe.crop, self.schedule.recipe.resize is not None
        wanted = self.schedule.micro_batches(self.start)
        crops = map(self._crops if full_image else self._regions, wanted)
        if self.on_device is None:
            batches = load_batches(crops, self._load, crop, self.config)
        else:
            batches = self._gather(crops, self.on_device)
        for images, indices in batches:
            yield images, torch.from_numpy(self.data.labels_of(indices))

    def _load(self, image: Tensor, crop: Crop) -> int:
        index, pixels = self.resized.pixels_or_next(crop.image, self.skip_corrupt, crop.region)
        size = len(image)
        cut = torch.from_numpy(pixels)[crop.top : crop.top + size, crop.left : crop.left + size]
        image.copy_(cut.flip(1) if crop.flip else cut)
        return index

    def _gather(
        self, batches: Iterable[list[Crop]], on_device: Tensor
    ) -> Iterator[tuple[Tensor, list[int]]]:
        for batch in batches:
            indices = [self.resized.pixels_or_next(c.image, self.skip_corrupt)[0] for c in batch]
            crops = torch.tensor([crop[:4] for crop in batch])
            crops[:, 0] = torch.tensor(indices)
            yield gather_crops(on_device, crops, self.schedule.recipe.crop), indices

    def _uniforms(
        self, batch: Sequence[tuple[int, int]], count: int
    ) -> tuple[npt.NDArray[np.float64], list[bool]]:
        """Draw ``count`` numbers in [0, 1) for each image, and whether to flip it."""
        positions = [position for _, position in batch]
        chance = uniforms(AUGMENT, self.schedule.seed, positions, count + 1)
        return chance[:, :-1], (self.flip & (chance[:, -1] < 0.5)).tolist()

    def _crops(self, batch: Sequence[tuple[int, int]]) -> list[Crop]:
        chance, flips = self._uniforms(batch, 2)
        sizes = np.full((len(batch), 2), self.resized.size)
        corners = self.schedule.recipe.regions(chance, sizes)[:, :2].tolist()
        rows = zip(batch, corners, flips, strict=True)
        return [Crop(image, top, left, flip) for (image, _), (top, left), flip in rows]

    def _regions(self, batch: Sequence[tuple[int, int]]) -> list[Crop]:
        rows = zip(batch, *self._uniforms(batch, 4), strict=True)
        return [Crop(i, 0, 0, flip, partial(self._region, row)) for (i, _), row, flip in rows]

    def _region(
        self, chance: npt.NDArray[np.float64], height: int, width: int
    ) -> tuple[int, int, int, int]:
        sizes = np.array([[height, width]])
        ((top, left, tall, wide),) = self.schedule.recipe.regions(chance[None], sizes)
        return int(top), int(left), int(tall), int(wide)


def gather_crops(images: Tensor, crops: Tensor, size: int) -> Tensor:
    """Cut crops uint8 (M, 3, size, size) out of images uint8 (N, H, W, 3), on their device.

    ``crops`` int64 (M, 4) are image, top, left, flip. The result is in channels_last.
    """
    if images.is_cuda:  # a copy from pageable memory would synchronize
        crops = crops.pin_memory()
    image, top, left, flip = crops.to(images.device, non_blocking=True).unbind(1)
    along = torch.arange(size, device=images.device)
    rows = top[:, None] + along
    columns = left[:, None] + torch.where(flip[:, None] > 0, along.flip(0), along)
    return images[image[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def copy_to_gpu(device: torch.device, resized: ResizedImages) -> Tensor | None:
    """Copy cached images to a GPU if they take at most a quarter of its free memory, or None."""
    if device.type != "cuda" or resized.cached is None:
        return None
    free, _ = torch.cuda.mem_get_info(device)
    fits = resized.cached.nbytes <= free // 4
    return torch.from_numpy(resized.cached).to(device) if fits else None


def open_for_recipe(
    rule: Recipe, images: Sequence[Source], options: ImageReadOptions
) -> ResizedImages:
    """Open training images at the size that the recipe resizes them to, or crops are resized to."""
    full_image = rule.resize is not None
    return open_resized(images, rule.resize or rule.crop, options, full_image=full_image)


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
    cache: str = "auto",
    decoder: str = "pillow",
    skip_corrupt: bool = False,
    check: bool | None = None,
) -> TrainBatches:
    """Micro-batches (images uint8 (N, 3, crop, crop), labels), ``batch_split`` to a step.

    They are those of ``train`` with the same data, recipe and seed, ``balance`` apart, from step
    ``start`` on. Images are a view of (N, crop, crop, 3), so in channels_last; for a GPU in pinned
    memory, or on it if the set is kept there; labels are on the CPU. Of ``world_size`` processes,
    number ``rank`` loads its part of each. ``workers`` threads load them, 0 for the caller's alone;
    these and ``cache`` change no pixel, ``decoder`` does: see ``train``. ``.resized.cache``
    describes the choice of "auto".

    Raises ``DataError`` for an image that cannot be read, ValueError for a bad argument.
    """
    options = ImageReadOptions(cache, decoder, skip_corrupt, check)
    resized = open_for_recipe(rule, data.images, options)
    schedule = Schedule(len(data.images), rule, seed, batch_split, rank, world_size)
    config = DeviceConfig.create(device, "fp32", workers)
    on_device = copy_to_gpu(config.device, resized)
    return TrainBatches(data, resized, schedule, config, flip, skip_corrupt, start, on_device)


def eval_batches(
    resized: ResizedImages,
    rows: Sequence[int] | npt.NDArray[np.int64],
    config: DeviceConfig,
    *,
    batch_size: int = 64,
) -> Iterator[tuple[Tensor, dict[int, DataError]]]:
    """Yield the images of these rows in batches, in order.

    Each is readable images, uint8 (N, 3, crop, crop), and the errors by position in the batch.
    """

    def load(image: Tensor, row: int) -> DataError | None:
        try:
            image.copy_(torch.from_numpy(resized.pixels(row)))
        except DataError as error:
            return error
        return None

    parts = (list(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size))
    for images, errors in load_batches(parts, load, resized.size, config):
        unreadable = {i: error for i, error in enumerate(errors) if error}
        if unreadable:
            images = images[[i not in unreadable for i in range(len(images))]]
        yield images, unreadable
