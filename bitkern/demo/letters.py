"""Letters rendered from matplotlib's fonts: a data set of any size without a download.

They are made as scikit-learn's digits were (E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits", UCI 1998): a bitmap of 32x32, whose ink is counted in blocks of 4x4, which
gives 8x8 pixels of 17 levels.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bitkern.transfer.data import ImageSet
from bitkern.transfer.data.images import Pixels
from bitkern.transfer.rng import LETTERS, random_stream

if TYPE_CHECKING:
    from PIL import Image

# Capitals, and the small letters whose shape is not that of their capital.
CLASSES = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt")
_DEJAVU = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif")
_SLANTS = {"DejaVuSerif": "Italic"}
FONTS = (
    *(f"{family}{face}" for family in _DEJAVU for face in ("", "-Bold")),
    *(f"{family}-{_SLANTS.get(family, 'Oblique')}" for family in _DEJAVU),
    *(f"{family}-Bold{_SLANTS.get(family, 'Oblique')}" for family in _DEJAVU),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10", "cmmi10"),
)
# For the test only: a sans, a serif, a monospaced and an italic face.
HELD_OUT = ("DejaVuSans-Oblique", "STIXGeneral", "cmtt10", "cmti10")
GLYPH, BITMAP, BLOCK = 64, 32, 4  # pixels


@cache
def _glyph(font: str, letter: str, stroke: int) -> "tuple[Image.Image, float, float]":
    """Draw a letter in white on black, centred; returns it with its width and height in pixels."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    face = ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", f"{font}.ttf"), GLYPH)
    left, top, right, bottom = face.getbbox(letter, stroke_width=stroke)
    image = Image.new("L", (2 * GLYPH, 2 * GLYPH))
    corner = (GLYPH - (left + right) / 2, GLYPH - (top + bottom) / 2)
    ImageDraw.Draw(image).text(corner, letter, fill=255, font=face, stroke_width=stroke)
    return image, right - left, bottom - top


def _render(font: str, letter: str, random: np.random.Generator) -> Pixels:
    """Render a letter, rotated, sheared, scaled, shifted and with noise: (8, 8) uint8."""
    from PIL import Image

    image, width, height = _glyph(font, letter, int(random.integers(5)))
    angle, shear = np.deg2rad(random.normal(0, 8)), random.normal(0, 0.15)
    # Letters fill the bitmap, as the digits do, but narrow ones stay narrow.
    tall = BITMAP * random.uniform(0.75, 1.05) / height
    wide = min(tall * random.uniform(0.7, 1.2), BITMAP / width)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = turn @ [[1, shear], [0, 1]] @ np.diag([wide, tall])
    inverse = np.linalg.inv(forward)
    centre = BITMAP / 2 + random.normal(0, 1, 2)
    offset = GLYPH - inverse @ centre
    (a, b), (c, d) = inverse
    coefficients = a, b, offset[0], c, d, offset[1]
    size = BITMAP, BITMAP
    drawn = image.transform(size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    ink = (np.asarray(drawn) > 127) ^ (random.random(size) < random.uniform(0, 0.02))
    counts = ink.reshape(BITMAP // BLOCK, BLOCK, BITMAP // BLOCK, BLOCK).sum((1, 3))
    pixels: Pixels = np.rint(counts * (255 / BLOCK**2)).astype(np.uint8)
    return pixels


def letters(count: int, seed: int, *, held_out: bool = False) -> ImageSet:
    """Render ``count`` letters, 8x8 grey uint8, with classes in turn and random fonts.

    ``held_out`` uses the fonts that are in no other set. Letter i is a function of (seed, held_out,
    i) alone.
    """
    fonts = HELD_OUT if held_out else sorted(set(FONTS) - set(HELD_OUT))
    images = np.empty((count, BITMAP // BLOCK, BITMAP // BLOCK), np.uint8)
    labels = np.arange(count) % len(CLASSES)
    for i, label in enumerate(labels):
        random = random_stream(LETTERS, i, held_out, seed)
        images[i] = _render(fonts[random.integers(len(fonts))], CLASSES[label], random)
    return ImageSet(list(images), labels, CLASSES)
