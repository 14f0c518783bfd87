"""Image decoders: Pillow and torchvision. Their pixels differ, so a run keeps to one."""

import contextlib
import functools
import importlib
import importlib.util
import io
import re
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from bitkern.packages import require
from bitkern.text import one_line
from bitkern.transfer.checks import check_choice
from bitkern.transfer.data.images import DataError, ImageSet, Pixels, Region, Source

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Box = tuple[float, float, float, float]  # Pillow's order: left, top, right, bottom
# Formats that Pillow only identifies, or decodes by calling other programs.
_UNSUPPORTED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
SCALED = "16-bit images are scaled to 8 bits by their full range"
notes: Counter[str] = Counter()  # messages about the images that this process has read
_counting = threading.Lock()


class Decoder(Protocol):
    """Reads an image, or the ``region`` of it, resized to (size, size): uint8 (size, size, 3)."""

    def __call__(self, source: Source, size: int, region: Region | None = None) -> Pixels: ...


def note_once(message: str) -> None:
    """Print a message about the images once for each process, and count it in ``notes``."""
    with _counting:
        notes[message] += 1
        if notes[message] == 1:
            print(message, file=sys.stderr)


def noted() -> Counter[str]:
    """Return a copy of ``notes``, while other threads may add to them."""
    with _counting:
        return notes.copy()


@functools.cache
def image_formats() -> dict[str, str]:
    """Map the suffixes of image files, in lower case, to Pillow's formats.

    Includes the formats of ``pillow_heif`` where it is installed.
    """
    from PIL import Image

    if importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
    known = Image.registered_extensions().items()
    return {suffix: name for suffix, name in known if name in {*Image.OPEN} - _UNSUPPORTED}


def read_image(
    source: Source, on_open: "Callable[[Image.Image], object]" = lambda image: None
) -> "Image.Image":
    """Decode a file, encoded image or uint8 array (H, W) or (H, W, 3) to an RGB ``PIL.Image``.

    The EXIF orientation of files is applied; 16-bit grey is scaled to 8 bits by its full range.
    ``on_open`` is called with the opened image before it is decoded. Raises ``DataError``, naming
    the file, if it cannot be decoded.
    """
    from PIL import Image, ImageOps

    if isinstance(source, np.ndarray):
        image = Image.fromarray(source).convert("RGB")
        on_open(image)
        return image
    try:
        # Not by file name: then Pillow memory-maps an uncompressed TIFF, and rotates it wrongly.
        with (
            (
                open(source, "rb") if isinstance(source, str | Path) else io.BytesIO(source.read())
            ) as file,
            Image.open(file, formats=[*{*image_formats().values()}]) as image,
        ):
            wide = image.mode.startswith("I;16") or (image.format, image.mode) == ("PNG", "I")
            if image.mode.startswith(("I", "F")) and not wide:
                # Pillow would clip these to 255 instead of scaling them.
                raise ValueError(f"mode {image.mode}, expected 8 bits per channel, or 16 of grey")
            on_open(image)
            image.load()  # errors raised here concern the pixels
            with contextlib.suppress(Exception):  # damaged EXIF data can raise anything
                ImageOps.exif_transpose(image, in_place=True)
            if wide:
                note_once(SCALED)
                grey = np.rint(np.asarray(image, np.float32) / 257).astype(np.uint8)
                return Image.fromarray(grey).convert("RGB")
            return image.convert("RGB")
    # The errors that Pillow's decoders raise for damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        strerror = error.strerror if isinstance(error, OSError) else None
        reason = strerror or re.sub(r" <_io\..*", " the file", str(error))
        raise DataError(f"{source}: not a readable image ({reason})") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{source}: image too large ({error})") from None


def read_region(source: Source, size: int, region: Region) -> "tuple[Image.Image, Box]":
    """Decode an RGB image and find the region's box in it, at least ``size`` pixels a side.

    Pillow decodes a JPEG at an eighth, a quarter or half of its size where the region still has
    that many pixels. Raises as ``read_image``.
    """
    box: Box | None = None

    def choose_scale(image: "Image.Image") -> None:
        nonlocal box
        if image.format not in ("JPEG", "MPO"):
            return  # the size before decoding is not reliable for every other format
        orientation = orientation_of(image)
        turned = orientation in (5, 6, 7, 8)
        width, height = image.size[::-1] if turned else image.size
        top, left, tall, wide = region(height, width)
        needed = -(-width * size // wide), -(-height * size // tall)
        drafted = image.draft(None, needed[::-1] if turned else needed)
        scale, x, y = 1.0, 0.0, 0.0
        if drafted:  # (mode, the box of the full image in the smaller one)
            scale = drafted[1][3 if turned else 2] / width
            # A partly filled last pixel moves to the other side when the image is turned.
            more = image.size[0] - drafted[1][2], image.size[1] - drafted[1][3]
            right, below = more[::-1] if turned else more
            x = right if orientation in (2, 3, 6, 7) else 0.0
            y = below if orientation in (3, 4, 7, 8) else 0.0
        x, y = x + left * scale, y + top * scale
        box = x, y, x + wide * scale, y + tall * scale

    image = read_image(source, choose_scale)
    if box is None:
        top, left, tall, wide = region(image.height, image.width)
        box = left, top, left + wide, top + tall
    return image, (*box[:2], min(box[2], image.width), min(box[3], image.height))


def orientation_of(image: "Image.Image") -> int:
    """Read the EXIF orientation; 1 is upright."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF data can raise anything
        return 1


def image_size(data: ImageSet) -> tuple[int, int]:
    """Return (height, width) of the median image by area, among at most 101 spread over the set.

    Images that cannot be read are left out; raises ``DataError`` if none can.
    """
    sizes, errors = [], []
    for i in np.unique(np.linspace(0, len(data.images) - 1, 101).astype(int)):
        try:
            sizes.append(read_image(data.images[i]).size)
        except DataError as error:
            errors.append(error)
    if not sizes:
        raise errors[0]
    width, height = sorted(sizes, key=lambda size: size[0] * size[1])[len(sizes) // 2]
    return height, width


def pillow(source: Source, size: int, region: Region | None = None) -> Pixels:
    """Decode with Pillow, bilinearly, antialiased; the aspect ratio is not kept.

    For a region of a large JPEG fewer pixels are decoded: each the mean of 2x2, 4x4 or 8x8.
    """
    from PIL.Image import Resampling

    if region is None:
        image, box = read_image(source), None
    else:
        image, box = read_region(source, size, region)
    # A copy, because PyTorch warns about arrays that are not writable.
    return np.array(image.resize((size, size), Resampling.BILINEAR, box))


def torchvision(source: Source, size: int, region: Region | None = None) -> Pixels:
    """Decode with torchvision (JPEG, PNG, GIF, WebP), bilinearly, antialiased."""
    import torch
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2.functional import resize

    try:
        if isinstance(source, np.ndarray):
            pixels = torch.from_numpy(np.array(read_image(source))).permute(2, 0, 1)
        else:
            data = Path(source).read_bytes() if isinstance(source, str | Path) else source.read()
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            pixels = decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
            if data[8:12] == b"WEBP":  # torchvision ignores its orientation
                pixels = _upright(pixels, data)
        if pixels.dtype == torch.uint16:
            note_once(SCALED)
            pixels = (pixels.float() / 257).round().byte()
        if pixels.dtype != torch.uint8:
            raise ValueError(f"{pixels.dtype}, expected 8 bits per channel")
        pixels = pixels[0] if pixels.ndim == 4 else pixels  # the first frame of a GIF
        if region:
            top, left, height, width = region(*pixels.shape[1:])
            pixels = pixels[:, top : top + height, left : left + width]
        resized: Pixels = resize(pixels, [size, size], antialias=True).permute(1, 2, 0).numpy()
        return resized
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{source}: torchvision cannot read it ({one_line(error)})") from None


def _upright(pixels: "Tensor", data: bytes) -> "Tensor":
    """Apply the EXIF orientation of a file to its pixels (3, H, W)."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        orientation = orientation_of(image)
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    across, down = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    return pixels.flip([1] * down + [2] * across)


DECODERS: dict[str, Decoder] = {"pillow": pillow, "torchvision": torchvision}


def find_decoder(name: str) -> Decoder:
    """Return the decoder of that name. Raises ValueError if it is unknown or not installed."""
    check_choice("decoder", name, DECODERS)
    require("PIL" if name == "pillow" else name)
    return DECODERS[name]
