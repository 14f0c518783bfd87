"""Labelled images, and reading one."""

import functools
import importlib
import importlib.util
import io
import re
import struct
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image
    from scipy.sparse import csr_array

Pixels = npt.NDArray[np.uint8]


class Member(Protocol):
    """An encoded image within a file; as a string it is what errors call it."""

    @property
    def version(self) -> str:
        """What tells it from every other image, and from itself once its file has changed."""

    def read(self) -> bytes:
        """The bytes of a JPEG, PNG, … Raises OSError or ValueError; from any thread."""


Source = str | Path | Pixels | Member
# Of an image (height, width) the part that is wanted: top, left, height, width.
Region = Callable[[int, int], tuple[int, int, int, int]]
Box = tuple[float, float, float, float]  # left, top, right, bottom, as Pillow has it


# Which Pillow only recognizes, or has other programs read.
_NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
VALIDATION = ("val", "validation", "valid")  # what the split is called, the first there is
_SHOWN = 20  # names in a message


class DataError(ValueError):
    """The data set cannot be used; the message names the file or folder and what to do."""


class NoSplitError(DataError):
    """The data set has no images of that split."""


class ImageSet(NamedTuple):
    """Labelled images: file paths, uint8 arrays (H, W) or (H, W, 3), of any sizes, or members.

    ``images`` may be any sequence; one that does not hold its images, because there are millions,
    has a method ``take(indices)``, which returns another. ``labels`` int64 (N,), indices into
    ``classes``; or bool (N, classes), True for each label of an image that may have several, or
    none: a multi-label set. That may be a ``csr_array`` of SciPy, which takes five bytes for each
    label and not one for each class of an image.
    """

    images: Sequence[Source]
    labels: "npt.NDArray[np.int64] | npt.NDArray[np.bool_] | csr_array"
    classes: tuple[str, ...]

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels."""
        return self.labels.ndim == 2

    def as_multi_label(self) -> "ImageSet":
        """The same images, as ones that might have several labels."""
        if self.multi_label:
            return self
        from scipy.sparse import csr_array

        count = len(self.images)
        labels = np.asarray(self.labels, np.int32)
        parts = np.ones(count, np.bool_), labels, np.arange(count + 1, dtype=np.int32)
        return self._replace(labels=csr_array(parts, (count, len(self.classes))))

    def labels_of(self, indices: Any) -> npt.NDArray[Any]:
        """The labels at these indices as an array: int64 (M,) or bool (M, classes)."""
        labels = self.labels[indices]
        return labels if isinstance(labels, np.ndarray) else labels.toarray()

    def subset(self, indices: Any) -> "ImageSet":
        """The images at these indices."""
        take = getattr(self.images, "take", lambda indices: [self.images[i] for i in indices])
        return ImageSet(take(indices), self.labels[indices], self.classes)


@functools.cache
def image_formats() -> dict[str, str]:
    """Suffixes of image files, in small letters, and the formats of Pillow that they stand for.

    All that Pillow reads, with those of ``pillow_heif`` where it is installed.
    """
    from PIL import Image

    if importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
    known = Image.registered_extensions().items()
    return {end: name for end, name in known if name in {*Image.OPEN} - _NOT_READ}


SCALED = "16-bit images are scaled to 8 bits by their full range"
notes: dict[str, object] = {}  # what a user was told of the images that the process has read


def note(what: str) -> None:
    """Tell a user what is done to images, once; ``notes`` keeps it for the record."""
    own = object()
    if notes.setdefault(what, own) is own:  # in one thread alone
        print(what, file=sys.stderr)


def read_image(
    source: Source, before: "Callable[[Image.Image], object]" = lambda image: None
) -> "Image.Image":
    """The image of a path, member or uint8 array (H, W) or (H, W, 3) as an RGB ``PIL.Image``.

    A file's is turned upright, as its EXIF orientation says; 16 bits of grey are scaled to 8 by
    their full range. ``before`` is called with the image that is opened, but not decoded. Raises
    ``DataError``, naming the file, if it cannot be decoded.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        image = Image.fromarray(source).convert("RGB")
        before(image)
        return image
    try:
        # Never by name: then Pillow maps an uncompressed TIFF, and turns it wrongly.
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
            before(image)
            _turn_upright(image)
            if wide:
                note(SCALED)
                grey = np.rint(np.asarray(image, np.float32) / 257).astype(np.uint8)
                return Image.fromarray(grey).convert("RGB")
            return image.convert("RGB")
    # What Pillow's decoders raise for broken files.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise DataError(f"{source}: not a readable image ({_reason(error)})") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{source}: image too large ({error})") from None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return re.sub(r" <_io\..*", " the file", str(error))


def several(errors: Sequence[str]) -> str:
    """The messages of images that cannot be read, in one."""
    if len(errors) == 1:
        return errors[0]
    rest = len(errors) - _SHOWN
    more = f"; and {rest} more" * (rest > 0)
    return f"{len(errors)} images cannot be read: {'; '.join(errors[:_SHOWN])}{more}"


def read_region(source: Source, size: int, region: Region) -> "tuple[Image.Image, Box]":
    """An RGB image and the box in it of a region, which has ``size`` pixels a side or more.

    Of a JPEG Pillow decodes an eighth, a quarter or half of the pixels along a side, where that
    leaves as many; not of an image with fewer. Raises as ``read_image``.
    """
    box: Box | None = None

    def choose(image: "Image.Image") -> None:
        nonlocal box
        if image.format not in ("JPEG", "MPO"):
            return  # of other formats it is not the same in all which size there is before
        orientation = orientation_of(image)
        turned = orientation in (5, 6, 7, 8)
        width, height = image.size[::-1] if turned else image.size
        top, left, tall, wide = region(height, width)
        needed = -(-width * size // wide), -(-height * size // tall)
        drafted = image.draft(None, needed[::-1] if turned else needed)
        scale, x, y = 1.0, 0.0, 0.0
        if drafted:  # (mode, the box of the whole image in the smaller one)
            scale = drafted[1][3 if turned else 2] / width
            # Of what does not fill a last pixel there is one, at another side when it is turned.
            more = image.size[0] - drafted[1][2], image.size[1] - drafted[1][3]
            right, below = more[::-1] if turned else more
            x = right if orientation in (2, 3, 6, 7) else 0.0
            y = below if orientation in (3, 4, 7, 8) else 0.0
        x, y = x + left * scale, y + top * scale
        box = x, y, x + wide * scale, y + tall * scale

    image = read_image(source, choose)
    if box is None:
        top, left, tall, wide = region(image.height, image.width)
        box = left, top, left + wide, top + tall
    return image, (*box[:2], min(box[2], image.width), min(box[3], image.height))


def orientation_of(image: "Image.Image") -> int:
    """How the camera was held, of the numbers of EXIF; 1 is upright."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # of damaged EXIF data anything
        return 1


def _turn_upright(image: "Image.Image") -> None:
    """Apply the orientation that the camera wrote into the file, if any."""
    from PIL import ImageOps

    image.load()  # what raises here is wrong with the pixels
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # of damaged EXIF data anything; the pixels are sound
        pass


def image_size(data: ImageSet) -> tuple[int, int]:
    """(height, width) of the median image by area, among at most 101 spread over the set.

    Those that cannot be read are left out; raises ``DataError`` if none can.
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


def check_same_classes(
    classes: Sequence[str], expected: Sequence[str], name: str, expected_name: str
) -> None:
    """Raise ``DataError`` unless both have the same classes in the same order."""
    if tuple(classes) == tuple(expected):
        return
    unexpected = [c for c in classes if c not in expected]
    missing = [c for c in expected if c not in classes]
    kinds = ("missing", missing), ("unexpected", unexpected)
    listed = "; ".join(f"{kind}: {listing(names)}" for kind, names in kinds if names)
    if {*map(_composed, missing)} & {*map(_composed, unexpected)}:
        kinds = ("missing", [*map(ascii, missing)]), ("unexpected", [*map(ascii, unexpected)])
        listed = "; ".join(f"{kind}: {listing(names)}" for kind, names in kinds if names)
        listed += ", which look alike in two forms of Unicode: rename one of them"
    raise DataError(
        f"{name}: expected the {len(expected)} classes of {expected_name}; "
        f"{listed or 'found another order'}"
    )


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def listing(names: Sequence[str], limit: int = 10) -> str:
    """Name the first few of many."""
    more = f" and {len(names) - limit} more" * (len(names) > limit)
    return f"{', '.join(names[:limit])}{more}"


def check_apart(train_set: ImageSet, test_set: ImageSet, source: str) -> None:
    """Raise ``DataError`` if an image file of the test set is also one of the training set."""
    tested = {image for image in test_set.images if not isinstance(image, np.ndarray)}
    for image in train_set.images if tested else ():
        if not isinstance(image, np.ndarray) and image in tested:
            raise DataError(
                f"{source}: {image} is both to train on and to test with: name the split of each "
                "image, or hold out part of them"
            )
