"""Recipes: what a training run does, from its data set's size alone."""

from dataclasses import Field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

    from bitkern.transfer.data.images import Pixels


class Recipe(Protocol):
    """All that the loop knows of a recipe, a frozen dataclass.

    ``steps`` optimizer steps of ``batch_size`` images (3, crop, crop) each, mixed where
    ``mixup_alpha``, the Beta parameter of MixUp, is not 0.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def crop(self) -> int: ...
    @property
    def mixup_alpha(self) -> float: ...

    def lr(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0."""

    def prepare(self, image: "Image.Image") -> "Pixels":
        """What an image is turned into whenever it is read: uint8 (H, W, 3)."""

    def augment(self, pixels: "Pixels", random: np.random.Generator) -> "Pixels":
        """What chance does with it, mirroring apart: uint8 (crop, crop, 3)."""

    def loss(self, logits: Tensor, labels: Tensor, class_weight: Tensor | None = None) -> Tensor:
        """The mean loss of logits (N, classes) and labels int64 (N,) or bool (N, classes).

        ``class_weight`` (classes,), given for unbalanced classes alone, says what a class weighs.
        """
