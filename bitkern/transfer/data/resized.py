"""Images of a set resized to one size: decoded at every use, or cached."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import BinaryIO

import numpy as np

from bitkern.transfer.data.decoders import Decoder
from bitkern.transfer.data.images import DataError, ImageSet, Pixels, Region, Source
from bitkern.transfer.data.threads import prefetch, thread_pool

ADVICE = "repair or delete it, or pass skip_corrupt=True"
SPAN = 4  # images that a thread takes at a time
_NAMED = 20  # corrupt images that an error names


class ResizedImages:
    """Images resized to (size, size), by their index in the set.

    ``cached`` uint8 (N, size, size, 3) holds their pixels, or is None; ``cache`` describes the
    choice. ``corrupt`` maps the images that are known to be unreadable to their errors.
    """

    def __init__(self, images: Sequence[Source], size: int, decode: Decoder) -> None:
        self.images, self.size, self.decode = images, size, decode
        self.cached: Pixels | None = None
        self.cache = "off"
        self.file: BinaryIO | None = None  # the cached pixels, in the process that wrote them
        self.corrupt: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: int, region: Region | None = None) -> Pixels:
        """Return uint8 (size, size, 3); ``region`` applies where there is no cache.

        Raises ``DataError`` if the image cannot be read.
        """
        if index in self.corrupt:
            raise DataError(self.corrupt[index])
        if self.cached is not None:
            pixels: Pixels = self.cached[index]
            return pixels
        try:
            return self.decode(self.images[index], self.size, region)
        except DataError as error:
            self.corrupt[index] = str(error)
            raise

    def pixels_or_next(
        self, index: int, skip_corrupt: bool, region: Region | None = None
    ) -> tuple[int, Pixels]:
        """Return an image with its index, or the next one of the set if it is corrupt.

        Raises ``DataError`` unless ``skip_corrupt``, and if all are corrupt.
        """
        for i in range(index, index + len(self)):
            i %= len(self)
            try:
                return i, self.pixels(i, region)
            except DataError as error:
                if not skip_corrupt:
                    raise DataError(f"{error}: {ADVICE}") from None
        raise DataError(
            f"{self.images[index]}: cannot be read, and neither can any other image; replace them"
        )

    def decode_all(
        self,
        consume: Callable[[int, Pixels], object],
        skip_corrupt: bool,
        start: int = 0,
        progress: Callable[[int], object] = lambda done: None,
    ) -> None:
        """Decode the images from ``start`` on, on all cores, and pass their pixels to ``consume``.

        ``progress`` gets the number of images done, counted from the first of the set. Unreadable
        images are added to ``corrupt``; unless ``skip_corrupt``, ``DataError`` is raised for all of
        them at the end.
        """
        from tqdm import tqdm

        def decode_span(indices: range) -> range:
            for index in indices:
                with contextlib.suppress(DataError):  # recorded in self.corrupt
                    consume(index, self.pixels(index))
            return indices

        spans = (range(i, min(i + SPAN, len(self))) for i in range(start, len(self), SPAN))
        bar = tqdm(desc="reading images", total=len(self), initial=start, leave=False, disable=None)
        cores = len(os.sched_getaffinity(0))
        with bar, thread_pool(cores) as pool:
            try:
                for span in prefetch(
                    lambda s: pool.submit(decode_span, s).result, spans, 4 * cores
                ):
                    for index in span:
                        progress(index + 1)
                    bar.update(len(span))
            finally:
                pool.shutdown(cancel_futures=True)
        if not skip_corrupt:
            self.raise_if_corrupt()

    def raise_if_corrupt(self) -> None:
        """Raise one ``DataError`` for all images that are known to be corrupt."""
        errors = [self.corrupt[index] for index in sorted(self.corrupt)]
        if len(errors) == 1:
            raise DataError(f"{errors[0]}: {ADVICE}")
        if errors:
            more = f"; and {len(errors) - _NAMED} more" * (len(errors) > _NAMED)
            named = "; ".join(errors[:_NAMED])
            raise DataError(f"{len(errors)} images cannot be read: {named}{more}: {ADVICE}")


def check_classes(data: ImageSet, resized: ResizedImages) -> None:
    """Raise ``DataError`` for a class all of whose images are known to be corrupt."""
    if data.multi_label or not resized.corrupt:
        return
    readable = np.delete(data.labels, list(resized.corrupt))
    for label in np.setdiff1d(data.labels, readable):
        raise DataError(f"{data.classes[label]}: every image is corrupt; replace them")
