"""Open the images of a set at one size: check them, and keep their pixels where there is room."""

import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

from bitkern.transfer import ranks
from bitkern.transfer.data import cache
from bitkern.transfer.data.decoders import find_decoder
from bitkern.transfer.data.entries import entries, room
from bitkern.transfer.data.images import DataError, Source
from bitkern.transfer.data.memory import free_memory
from bitkern.transfer.data.resized import Resized

CACHE = ("auto", "ram", "disk", "off")
CHECKED = 100_000  # images that are checked before they are used unless told otherwise, at most


class Reading(NamedTuple):
    """How images are read.

    ``cache`` is "ram" to keep the resized pixels of a set in memory that the processes of a machine
    share, "disk" in a file that later runs use too, "off" to decode images at every use, "auto" for
    what there is room for. ``decoder`` is one of ``DECODERS``. With ``skip_corrupt`` the next
    image that can be read takes the place of one that cannot. ``check`` has all images read before
    they are used; None means those of sets of up to 100 000. "auto" keeps what is checked.
    """

    cache: str = "auto"
    decoder: str = "pillow"
    skip_corrupt: bool = False
    check: bool | None = None

    @classmethod
    def of(
        cls, cache: str, decoder: str, skip_corrupt: bool, check: bool | None = None
    ) -> "Reading":
        """Of a user's arguments. Raises ValueError for a value that there is not."""
        if cache not in CACHE:
            raise ValueError(f"cache: expected {', '.join(CACHE)}, got {cache!r}")
        find_decoder(decoder)
        return cls(cache, decoder, skip_corrupt, check)

    def checks(self, count: int) -> bool:
        """Whether so many images are all read before they are used."""
        return count <= CHECKED if self.check is None else self.check


class _Found(NamedTuple):
    """The file of the pixels, None without one; the corrupt images; what was chosen, in words."""

    path: str | None
    corrupt: dict[int, str]
    chosen: str


def open_resized(
    images: Sequence[Source], size: int, reading: Reading, *, again: bool = True, whole: bool = True
) -> Resized:
    """The images resized to (size, size).

    Unless they are used ``again``, "auto" means a file that is there, or none, and nothing is
    checked before. Unless they are used ``whole``, nothing is kept. The processes of a group all
    make the call; the first of each machine reads.
    Raises ``DataError`` for a corrupt image, and where there is no room.
    """
    resized = Resized(images, size, find_decoder(reading.decoder))
    found = ranks.from_first_of_host(_find, resized, reading, again, whole)
    with ranks.together():
        resized.corrupt, resized.cache = found.corrupt, found.chosen
        if found.path:
            with open(found.path, "rb") as file:
                resized.kept = cache.mapped(file, resized)
        if not reading.skip_corrupt:
            resized.refuse_corrupt()
    return resized


def _find(resized: Resized, reading: Reading, again: bool, whole: bool) -> _Found:
    """What there is, or was made. The file is told by the number under which it is held open.

    For its name may be gone, or another's, before all processes have mapped it.
    """
    if not len(resized):
        return _Found(None, {}, "off, no images")
    entry_of = functools.cache(lambda: cache.entry_of(resized, reading.decoder))
    found = None
    if whole and (reading.cache == "disk" or reading.cache == "auto" and entries()):
        found = cache.ready(entry_of()[0], resized)
    mode, why = "off", "each crop is cut out of a whole image"
    if whole:
        mode, why = ("disk", "made before") if found else _chosen(resized, reading, again)
    if mode == "disk":
        entry, fresh = entry_of()
        index, file = found or cache.fill(entry, fresh, resized, reading.skip_corrupt)
        resized.corrupt = {int(i): message for i, message in index.corrupt.items()}
        resized.file, why = file, f"{why}, {entry.folder}"
    elif mode == "ram":
        resized.file = os.fdopen(os.memfd_create("bitkern-images"), "r+b")
        resized.file.truncate(cache.bytes_of(resized))
        pixels = cache.mapped(resized.file, resized, writable=True)
        resized.read_all(pixels.__setitem__, reading.skip_corrupt)
    elif again and reading.checks(len(resized)):
        resized.read_all(lambda *_: None, reading.skip_corrupt)
    path = f"/proc/{os.getpid()}/fd/{resized.file.fileno()}" if resized.file else None
    count = f", {len(resized.corrupt)} cannot be read" if resized.corrupt else ""
    return _Found(path, resized.corrupt, f"{mode}, {why}{count}")


def _chosen(resized: Resized, reading: Reading, again: bool) -> tuple[str, str]:
    """Which cache to make, and why."""
    if reading.cache == "off":
        return "off", "as asked for"
    needed = cache.bytes_of(resized)
    need = f"{needed / 1e9:.3f} GB for {len(resized)} images of {resized.size}x{resized.size}"
    if reading.cache == "disk":
        return "disk", need
    free = free_memory()
    memory = f"{free / 1e9:.1f} GB of memory free"
    if reading.cache == "ram":
        if needed > free:
            raise DataError(f"cache: expected disk, off or auto, got ram: needs {need}, {memory}")
        return "ram", need
    if not again:
        return "not needed", "images are read once"
    if not reading.checks(len(resized)):
        return "off", f"{len(resized)} images are not all read before the training"
    if needed <= free / 2:
        return "ram", f"{need}, {memory}"
    disk = room()
    if needed <= disk:
        return "disk", f"{need}, {memory}"
    return "off", f"{need}, {memory}, {disk / 1e9:.1f} GB of disk"
