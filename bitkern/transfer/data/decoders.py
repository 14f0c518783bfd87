"""Decoders: a function and a line each. Pixels differ between them, so a run keeps to one."""

import importlib.metadata
import io
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from bitkern import files
from bitkern.transfer.compute import require
from bitkern.transfer.data.images import (
    SCALED,
    DataError,
    Pixels,
    Region,
    Source,
    note,
    orientation_of,
    read_image,
    read_region,
)

if TYPE_CHECKING:
    from torch import Tensor


class Decoder(Protocol):
    """Reads an image, or the ``region`` of it, resized to (size, size): uint8 (size, size, 3)."""

    def __call__(self, source: Source, size: int, region: Region | None = None) -> Pixels: ...


def pillow(source: Source, size: int, region: Region | None = None) -> Pixels:
    """By Pillow, bilinearly, with antialiasing; the aspect ratio is not kept.

    Of a region of a large JPEG fewer pixels are decoded: each the mean of 2x2, 4x4 or 8x8.
    """
    from PIL.Image import Resampling

    if region is None:
        image, box = read_image(source), None
    else:
        image, box = read_region(source, size, region)
    # A copy, since PyTorch warns of what it may not write to.
    return np.array(image.resize((size, size), Resampling.BILINEAR, box))


def torchvision(source: Source, size: int, region: Region | None = None) -> Pixels:
    """By torchvision (JPEG, PNG, GIF, WebP), bilinearly, with antialiasing."""
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
            if data[8:12] == b"WEBP":  # of which it ignores the orientation
                pixels = _upright(pixels, data)
        if pixels.dtype == torch.uint16:
            note(SCALED)
            pixels = (pixels.float() / 257).round().byte()
        if pixels.dtype != torch.uint8:
            raise ValueError(f"{pixels.dtype}, expected 8 bits per channel")
        pixels = pixels[0] if pixels.ndim == 4 else pixels  # the first picture of a GIF
        if region:
            top, left, height, width = region(*pixels.shape[1:])
            pixels = pixels[:, top : top + height, left : left + width]
        resized: Pixels = resize(pixels, [size, size], antialias=True).permute(1, 2, 0).numpy()
        return resized
    except (OSError, RuntimeError, ValueError) as error:
        reason = files.in_a_line(error)
        raise DataError(f"{source}: torchvision cannot read it ({reason})") from None


def _upright(pixels: "Tensor", data: bytes) -> "Tensor":
    """Turn (3, H, W) as the EXIF orientation of its file says."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        orientation = orientation_of(image)
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    across, down = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    return pixels.flip([1] * down + [2] * across)


DECODERS: dict[str, Decoder] = {"pillow": pillow, "torchvision": torchvision}


def find_decoder(name: str) -> Decoder:
    """The decoder of that name. Raises ValueError for another, and for one not installed."""
    if name not in DECODERS:
        raise ValueError(f"decoder: expected {' or '.join(DECODERS)}, got {name!r}")
    require("PIL" if name == "pillow" else name)
    return DECODERS[name]


def decoder_version(name: str) -> str:
    """The decoder and the version of its package: others may give other pixels."""
    return f"{name} {importlib.metadata.version(name)}"
