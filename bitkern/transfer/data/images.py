"""Labelled images, and reading one."""

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.uint8]


class Member(Protocol):
    """An encoded image within a file; as a string it is what errors call it."""

    @property
    def version(self) -> str:
        """What tells it from every other image, and from itself once its file has changed."""

    def read(self) -> bytes:
        """The bytes of a JPEG, PNG, … Raises OSError or ValueError; from any thread."""


Source = str | Path | Pixels | Member


class DataError(ValueError):
    """The data set cannot be used; the message names the file or folder and what to do."""


class ImageSet(NamedTuple):
    """Labelled images: file paths, uint8 arrays (H, W) or (H, W, 3), of any sizes, or members.

    ``images`` may be any sequence; one that does not hold its images, because there are millions,
    has a method ``take(indices)``, which returns another. ``labels`` int64 (N,), indices into
    ``classes``; or bool (N, classes), True for each label of an image that may have several, or
    none: a multi-label set.
    """

    images: Sequence[Source]
    labels: npt.NDArray[np.int64] | npt.NDArray[np.bool_]
    classes: tuple[str, ...]

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels."""
        return self.labels.ndim == 2

    def subset(self, indices: Any) -> "ImageSet":
        """The images at these indices."""
        take = getattr(self.images, "take", lambda indices: [self.images[i] for i in indices])
        return ImageSet(take(indices), self.labels[indices], self.classes)


def read_image(source: Source) -> "Image.Image":
    """The image of a path, member or uint8 array (H, W) or (H, W, 3) as an RGB ``PIL.Image``.

    A file's is turned upright, as its EXIF orientation says. Raises :class:`DataError`, naming the
    file, if it cannot be decoded.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    try:
        file = source if isinstance(source, str | Path) else io.BytesIO(source.read())
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                # Pillow would clip these to 255 instead of scaling them.
                raise ValueError(f"mode {image.mode}, expected 8 bits per channel")
            _turn_upright(image)
            return image.convert("RGB")
    # What Pillow's decoders raise for broken files.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise DataError(f"{source}: not a readable image ({error})") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{source}: image too large ({error})") from None


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

    Those that cannot be read are left out; raises :class:`DataError` if none can.
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
    """Raise :class:`DataError` unless both have the same classes in the same order."""
    if tuple(classes) == tuple(expected):
        return
    extra = [c for c in classes if c not in expected]
    missing = [c for c in expected if c not in classes]
    differences = [f"{len(missing)} missing, such as {missing[0]!r}"] if missing else []
    differences += [f"{len(extra)} more, such as {extra[0]!r}"] if extra else []
    raise DataError(
        f"{name}: expected the {len(expected)} classes of {expected_name}, found "
        f"{' and '.join(differences) or 'another order'}"
    )


def check_apart(train_set: ImageSet, test_set: ImageSet, source: str) -> None:
    """Raise :class:`DataError` if an image file of the test set is also one of the training set."""
    tested = {image for image in test_set.images if not isinstance(image, np.ndarray)}
    for image in train_set.images if tested else ():
        if not isinstance(image, np.ndarray) and image in tested:
            raise DataError(
                f"{source}: {image} is both to train on and to test with: name the split of each "
                "image, or hold out part of them"
            )
