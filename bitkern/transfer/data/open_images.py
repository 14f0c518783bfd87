"""Open the images of a set at one size: check them, and cache their pixels where there is room."""

import dataclasses
import functools
import os
from collections.abc import Sequence

from bitkern.transfer import ranks
from bitkern.transfer.checks import CACHE, check_choice
from bitkern.transfer.data import disk_cache
from bitkern.transfer.data.decoders import find_decoder
from bitkern.transfer.data.disk_cache import available_bytes, cache_entries
from bitkern.transfer.data.images import DataError, Source
from bitkern.transfer.data.memory import free_memory
from bitkern.transfer.data.resized import ResizedImages

CHECKED = 100_000  # largest set whose images are all checked by default


@dataclasses.dataclass(frozen=True)
class ImageReadOptions:
    """The arguments about reading images, as ``train`` describes them.

    Raises ValueError for an unknown value.
    """

    cache: str = "auto"
    decoder: str = "pillow"
    skip_corrupt: bool = False
    check: bool | None = None

    def __post_init__(self) -> None:
        check_choice("cache", self.cache, CACHE)
        find_decoder(self.decoder)

    def checks(self, count: int) -> bool:
        """Return True if a set of so many images is read before it is used."""
        return count <= CHECKED if self.check is None else self.check


def open_resized(
    images: Sequence[Source],
    size: int,
    options: ImageReadOptions,
    *,
    reused: bool = True,
    full_image: bool = True,
) -> ResizedImages:
    """Open images resized to (size, size).

    Unless they are ``reused``, "auto" means an existing file or no cache, and nothing is checked.
    Unless the ``full_image`` is used, nothing is cached. All processes of a group make the call;
    the first of each machine reads. Raises ``DataError`` for a corrupt image, and without room.
    """
    resized = ResizedImages(images, size, find_decoder(options.decoder))
    opened = ranks.run_on_local_rank0(_open, resized, options, reused, full_image)
    with ranks.propagate_errors():
        path, resized.corrupt, resized.cache = opened
        if path:
            with open(path, "rb") as file:
                resized.cached = disk_cache.map_pixels(file, resized)
        if not options.skip_corrupt:
            resized.raise_if_corrupt()
    return resized


def _open(
    resized: ResizedImages, options: ImageReadOptions, reused: bool, full_image: bool
) -> tuple[str | None, dict[int, str], str]:
    """Find or fill the cache; returns the path of its pixels, corrupt images and a description.

    The path is that of the open file in /proc: the file's own name may be gone, or another file's,
    before all processes have mapped it.
    """
    if not len(resized):
        return None, {}, "off, no images"
    entry_for = functools.cache(lambda: disk_cache.entry_for(resized, options.decoder))
    found = None
    if full_image and (options.cache == "disk" or options.cache == "auto" and cache_entries()):
        found = disk_cache.open_complete(entry_for()[0], resized)
    mode, why = "off", "each crop is cut out of a whole image"
    if full_image:
        mode, why = ("disk", "made before") if found else _choose(resized, options, reused)
    if mode == "disk":
        entry, fresh = entry_for()
        index, file = found or disk_cache.fill(entry, fresh, resized, options.skip_corrupt)
        resized.corrupt = {int(i): message for i, message in index.corrupt.items()}
        resized.file, why = file, f"{why}, {entry.folder}"
    elif mode == "ram":
        resized.file = os.fdopen(os.memfd_create("bitkern-images"), "r+b")
        resized.file.truncate(disk_cache.num_bytes(resized))
        pixels = disk_cache.map_pixels(resized.file, resized, writable=True)
        resized.decode_all(pixels.__setitem__, options.skip_corrupt)
    elif reused and options.checks(len(resized)):
        resized.decode_all(lambda *_: None, options.skip_corrupt)
    path = f"/proc/{os.getpid()}/fd/{resized.file.fileno()}" if resized.file else None
    count = f", {len(resized.corrupt)} cannot be read" if resized.corrupt else ""
    return path, resized.corrupt, f"{mode}, {why}{count}"


def _choose(resized: ResizedImages, options: ImageReadOptions, reused: bool) -> tuple[str, str]:
    """Choose the cache to make; returns it with the reason."""
    if options.cache == "off":
        return "off", "as asked for"
    needed = disk_cache.num_bytes(resized)
    need = f"{needed / 1e9:.3f} GB for {len(resized)} images of {resized.size}x{resized.size}"
    if options.cache == "disk":
        return "disk", need
    free = free_memory()
    memory = f"{free / 1e9:.1f} GB of memory free"
    if options.cache == "ram":
        if needed > free:
            raise DataError(f"cache: expected disk, off or auto, got ram: needs {need}, {memory}")
        return "ram", need
    if not reused:
        return "not needed", "images are read once"
    if not options.checks(len(resized)):
        return "off", f"{len(resized)} images are not all read before the training"
    if needed <= free / 2:
        return "ram", f"{need}, {memory}"
    disk = available_bytes()
    if needed <= disk:
        return "disk", f"{need}, {memory}"
    return "off", f"{need}, {memory}, {disk / 1e9:.1f} GB of disk"
