"""The images of a set at one size: decoded at every use, or kept."""

import os
from collections.abc import Callable, Sequence
from typing import BinaryIO

import numpy as np

from bitkern.transfer.data.decoders import Decoder
from bitkern.transfer.data.images import (
    DataError,
    ImageSet,
    Pixels,
    Region,
    Source,
    several,
)
from bitkern.transfer.data.threads import begun_ahead, thread_pool

ADVICE = "repair or delete it, or pass skip_corrupt=True"
SPAN = 4  # images that a thread takes at a time


class Resized:
    """Images resized to (size, size), by their place in the set.

    ``kept`` uint8 (N, size, size, 3) holds them all, where there is a cache, which ``cache`` tells
    of in words. ``corrupt`` says what is wrong with those that cannot be read, as far as that is
    known.
    """

    def __init__(self, images: Sequence[Source], size: int, decode: Decoder) -> None:
        self.images, self.size, self.decode = images, size, decode
        self.kept: Pixels | None = None
        self.cache = "off"
        self.file: BinaryIO | None = None  # of the pixels, where this process has made them
        self.corrupt: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: int, region: Region | None = None) -> Pixels:
        """uint8 (size, size, 3), of a region where there is no cache.

        Raises ``DataError`` if the image cannot be read.
        """
        if index in self.corrupt:
            raise DataError(self.corrupt[index])
        if self.kept is not None:
            pixels: Pixels = self.kept[index]
            return pixels
        try:
            return self.decode(self.images[index], self.size, region)
        except DataError as error:
            self.corrupt[index] = str(error)
            raise

    def replaced(
        self, index: int, skip_corrupt: bool, region: Region | None = None
    ) -> tuple[int, Pixels]:
        """The image with its index; in place of a corrupt one the next of the set that is not.

        Raises ``DataError`` unless ``skip_corrupt``, and if all are corrupt.
        """
        for place in range(index, index + len(self)):
            place %= len(self)
            try:
                return place, self.pixels(place, region)
            except DataError as error:
                if not skip_corrupt:
                    raise DataError(f"{error}: {ADVICE}") from None
        raise DataError(f"{self.images[index]}: nor can any other image be read; replace them")

    def read_all(
        self,
        take: Callable[[int, Pixels], object],
        skip_corrupt: bool,
        start: int = 0,
        progress: Callable[[int], object] = lambda done: None,
    ) -> None:
        """Decode the images from ``start`` on, on all cores, and have ``take`` take their pixels.

        ``progress`` is told how many have been taken, counted from the set's first. What cannot be
        read is added to ``corrupt``; unless ``skip_corrupt``, ``DataError`` is raised for all of
        it at the end.
        """
        from tqdm import tqdm

        def read(indices: range) -> range:
            for index in indices:
                try:
                    take(index, self.pixels(index))
                except DataError:  # which is among the corrupt
                    pass
            return indices

        spans = (range(i, min(i + SPAN, len(self))) for i in range(start, len(self), SPAN))
        bar = tqdm(desc="reading images", total=len(self), initial=start, leave=False, disable=None)
        cores = len(os.sched_getaffinity(0))
        with bar, thread_pool(cores) as pool:
            try:
                for span in begun_ahead(lambda s: pool.submit(read, s).result, spans, 4 * cores):
                    for index in span:
                        progress(index + 1)
                    bar.update(len(span))
            finally:
                pool.shutdown(cancel_futures=True)
        if not skip_corrupt:
            self.refuse_corrupt()

    def refuse_corrupt(self) -> None:
        """Raise ``DataError`` for the images that are known to be corrupt, all at once."""
        if self.corrupt:
            errors = [self.corrupt[index] for index in sorted(self.corrupt)]
            raise DataError(f"{several(errors)}: {ADVICE}")


def check_classes(data: ImageSet, resized: Resized) -> None:
    """Raise ``DataError`` for a class all of whose images are known to be corrupt."""
    if data.multi_label or not resized.corrupt:
        return
    readable = np.delete(data.labels, list(resized.corrupt))
    for label in np.setdiff1d(data.labels, readable):
        raise DataError(f"{data.classes[label]}: every image is corrupt; replace them")
