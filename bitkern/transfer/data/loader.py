"""Batches of images as BiT transforms them, made by threads ahead of their use.

Images leave here as uint8 (N, 3, crop, crop), a view of (N, crop, crop, 3) and so channels_last,
and are scaled to [-1, 1] on the device.
"""

import math
import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitkern.transfer.compute import Compute
from bitkern.transfer.data.images import DataError, ImageSet, Pixels, Region, Source
from bitkern.transfer.data.opening import Reading, open_resized
from bitkern.transfer.data.resized import SPAN, Resized
from bitkern.transfer.data.threads import begun_ahead, thread_pool
from bitkern.transfer.recipes import Recipe
from bitkern.transfer.schedule import Schedule
from bitkern.transfer.streams import AUGMENT, uniforms

AHEAD = 2  # batches that are begun before they are asked for
Key = TypeVar("Key")
Told = TypeVar("Told")


class _Buffers:
    """Memory for batches, used again once nobody holds a tensor in it: fresh pages cost more.

    On a GPU's host PyTorch does the same for pinned memory.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.free: list[Pixels] = []

    def empty(self, *shape: int) -> Tensor:
        """A tensor uint8 of that shape."""
        if self.pinned:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        size = math.prod(shape)
        buffer = self.free.pop() if self.free else np.empty(size, np.uint8)
        if buffer.size < size:
            buffer = np.empty(size, np.uint8)
        held = buffer[:size].reshape(shape)  # by the tensor, and by its views
        weakref.finalize(held, self.free.append, buffer).atexit = False
        return torch.from_numpy(held)


def made_batches(
    keys: Iterable[Sequence[Key]],
    write: Callable[[Tensor, Key], Told],
    size: int,
    compute: Compute,
) -> Iterator[tuple[Tensor, list[Told]]]:
    """A batch uint8 (N, 3, size, size) for each list of keys, and what ``write`` told of each.

    ``write`` puts the image of a key into a tensor (size, size, 3), in a thread.
    """
    buffers = _Buffers(compute.device.type == "cuda")
    at_exit = sys.is_finalizing  # not a global, which Python may have dropped by then

    def write_span(images: Tensor, span: Sequence[Key]) -> list[Told]:
        return [write(image, key) for image, key in zip(images, span, strict=True)]

    def begin(batch: Sequence[Key]) -> Callable[[], tuple[Tensor, list[Told]]]:
        images = buffers.empty(len(batch), size, size, 3)
        spans = [slice(first, first + SPAN) for first in range(0, len(batch), SPAN)]
        if pool:
            pending = [pool.submit(write_span, images[span], batch[span]) for span in spans]
            told = (future.result() for future in pending)
        else:
            told = (write_span(images[span], batch[span]) for span in spans)
        return lambda: (images.permute(0, 3, 1, 2), [each for span in told for each in span])

    pool = thread_pool(compute.workers) if compute.workers else None
    try:
        yield from begun_ahead(begin, keys, AHEAD if pool else 0)
    finally:
        if pool and not at_exit():
            pool.shutdown(cancel_futures=True)


class Crop(NamedTuple):
    """Which image, the corner of its crop, and whether it is mirrored."""

    image: int
    top: int
    left: int
    flip: bool


class Piece(NamedTuple):
    """Which image, which region of it when it is whole, and whether it is mirrored."""

    image: int
    region: Region
    flip: bool


class TrainBatches:
    """The micro-batches of a schedule, those of this process, from optimizer step ``start`` on.

    (images uint8 (N, 3, crop, crop), labels of the set's dtype). The position of an example since
    the start of training decides, with the seed, on all that is left to chance. ``on_device`` uint8
    (N, resize, resize, 3) are the images, if they stay there.
    """

    def __init__(
        self,
        data: ImageSet,
        resized: Resized,
        schedule: Schedule,
        compute: Compute,
        *,
        flip: bool,
        skip_corrupt: bool,
        start: int,
        on_device: Tensor | None,
    ) -> None:
        self.resized, self.schedule, self.compute = resized, schedule, compute
        self.flip, self.skip_corrupt, self.start = flip, skip_corrupt, start
        self.on_device = on_device
        self.data = data

    def __iter__(self) -> Generator[tuple[Tensor, Tensor]]:
        wanted = self.schedule.micro_batches(self.start)
        if self.schedule.recipe.resize is None:
            batches = self._read(map(self._pieces, wanted))
        elif self.on_device is None:
            batches = self._copied(map(self._crops, wanted))
        else:
            batches = self._gathered(map(self._crops, wanted))
        for images, indices in batches:
            yield images, torch.from_numpy(self.data.labels_of(indices))

    def _read(self, pieces: Iterable[list[Piece]]) -> Iterator[tuple[Tensor, list[int]]]:
        def write(image: Tensor, piece: Piece) -> int:
            index, pixels = self.resized.replaced(piece.image, self.skip_corrupt, piece.region)
            image.copy_(mirrored(torch.from_numpy(pixels), piece.flip))
            return index

        return made_batches(pieces, write, self.schedule.recipe.crop, self.compute)

    def _copied(self, crops: Iterable[list[Crop]]) -> Iterator[tuple[Tensor, list[int]]]:
        size = self.schedule.recipe.crop

        def write(image: Tensor, crop: Crop) -> int:
            index, pixels = self.resized.replaced(crop.image, self.skip_corrupt)
            cut = torch.from_numpy(pixels)[crop.top : crop.top + size, crop.left : crop.left + size]
            image.copy_(mirrored(cut, crop.flip))
            return index

        return made_batches(crops, write, size, self.compute)

    def _gathered(self, batches: Iterable[list[Crop]]) -> Iterator[tuple[Tensor, list[int]]]:
        assert self.on_device is not None
        for batch in batches:
            indices = [self.resized.replaced(crop.image, self.skip_corrupt)[0] for crop in batch]
            crops = torch.tensor(batch)
            crops[:, 0] = torch.tensor(indices)
            yield cut_out(self.on_device, crops, self.schedule.recipe.crop), indices

    def _chance(
        self, batch: Sequence[tuple[int, int]], count: int
    ) -> tuple[npt.NDArray[np.float64], list[bool]]:
        """``count`` numbers in [0, 1) for each image, and whether it is mirrored."""
        positions = [position for _, position in batch]
        chance = uniforms(AUGMENT, self.schedule.seed, positions, count + 1)
        return chance[:, :-1], (self.flip & (chance[:, -1] < 0.5)).tolist()

    def _crops(self, batch: Sequence[tuple[int, int]]) -> list[Crop]:
        chance, flips = self._chance(batch, 2)
        sizes = np.full((len(batch), 2), self.resized.size)
        corners = self.schedule.recipe.regions(chance, sizes)[:, :2].tolist()
        rows = zip(batch, corners, flips, strict=True)
        return [Crop(image, top, left, flip) for (image, _), (top, left), flip in rows]

    def _pieces(self, batch: Sequence[tuple[int, int]]) -> list[Piece]:
        chance, flips = self._chance(batch, 4)

        def region(row: int) -> Region:
            def of(height: int, width: int) -> tuple[int, int, int, int]:
                sizes = np.array([[height, width]])
                ((top, left, tall, wide),) = self.schedule.recipe.regions(chance[row, None], sizes)
                return int(top), int(left), int(tall), int(wide)

            return of

        rows = enumerate(zip(batch, flips, strict=True))
        return [Piece(image, region(row), flip) for row, ((image, _), flip) in rows]


def mirrored(image: Tensor, flip: bool) -> Tensor:
    """An image (H, W, 3), mirrored if ``flip``."""
    return image.flip(1) if flip else image


def cut_out(images: Tensor, crops: Tensor, size: int) -> Tensor:
    """Crops uint8 (M, 3, size, size) of images uint8 (N, H, W, 3), on their device.

    ``crops`` int64 (M, 4) are the rows of ``Crop``. The result is in channels_last.
    """
    if images.is_cuda:  # a copy from other memory waits for the GPU
        crops = crops.pin_memory()
    image, top, left, flip = crops.to(images.device, non_blocking=True).unbind(1)
    along = torch.arange(size, device=images.device)
    rows = top[:, None] + along
    columns = left[:, None] + torch.where(flip[:, None] > 0, along.flip(0), along)
    return images[image[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def kept_on(device: torch.device, resized: Resized) -> Tensor | None:
    """The images on a GPU with room for them, a quarter of its free memory; None if it has not."""
    if device.type != "cuda" or resized.kept is None:
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return torch.from_numpy(resized.kept).to(device) if resized.kept.nbytes <= free // 4 else None


def open_for(rule: Recipe, images: Sequence[Source], reading: Reading) -> Resized:
    """The training images of a recipe, at its size; or whole, of which crops are read."""
    return open_resized(images, rule.resize or rule.crop, reading, whole=rule.resize is not None)


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

    Those of ``train`` with the same data, recipe and seed, ``balance`` apart, for steps from
    ``start`` on. Images are a view of (N, crop, crop, 3), so in channels_last; for a GPU in pinned
    memory, or there if the set is kept there; labels are in memory. Of ``world_size`` processes,
    number ``rank`` loads its part of each. ``workers`` threads make them, 0 for none but the
    caller's; these and ``cache`` change no pixel, ``decoder`` does: see ``train``. What "auto"
    chose is in ``.resized.cache``.

    Raises ``DataError`` for an image that cannot be read, ValueError for a bad argument.
    """
    reading = Reading.of(cache, decoder, skip_corrupt, check)
    resized = open_for(rule, data.images, reading)
    schedule = Schedule(len(data.images), rule, seed, batch_split, rank, world_size)
    compute = Compute.of(device, "fp32", workers)
    return TrainBatches(
        data,
        resized,
        schedule,
        compute,
        flip=flip,
        skip_corrupt=skip_corrupt,
        start=start,
        on_device=kept_on(compute.device, resized),
    )


class EvalBatch(NamedTuple):
    """uint8 images (N, 3, crop, crop), and by their places in the batch those that are missing."""

    images: Tensor
    unreadable: dict[int, DataError]


def eval_batches(
    resized: Resized,
    rows: Sequence[int] | npt.NDArray[np.int64],
    compute: Compute,
    *,
    batch_size: int = 64,
) -> Iterator[EvalBatch]:
    """Each ``EvalBatch`` of the images of these rows, in order."""

    def write(image: Tensor, row: int) -> DataError | None:
        try:
            image.copy_(torch.from_numpy(resized.pixels(row)))
        except DataError as error:
            return error
        return None

    parts = (list(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size))
    for images, errors in made_batches(parts, write, resized.size, compute):
        unreadable = {place: error for place, error in enumerate(errors) if error}
        if unreadable:
            images = images[[place not in unreadable for place in range(len(images))]]
        yield EvalBatch(images, unreadable)
