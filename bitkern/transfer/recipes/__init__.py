"""Recipes: what a training run does, from its data set's size alone."""

from dataclasses import Field
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor


class Recipe(Protocol):
    """All that the loop knows of a recipe, a frozen dataclass.

    ``steps`` optimizer steps of ``batch_size`` images (3, crop, crop) each, cut out of images that
    were resized to (resize, resize), or of whole ones where ``resize`` is None; mixed where
    ``mixup_alpha``, the Beta parameter of MixUp, is not 0. ``weight_decay`` concerns tensors of two
    dimensions and more. ``sigmoid`` says that sigmoids tell classes apart also where an image has
    one label.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def resize(self) -> int | None: ...
    @property
    def crop(self) -> int: ...
    @property
    def mixup_alpha(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def sigmoid(self) -> bool: ...

    def lr(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0."""

    def regions(
        self, chance: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """What is cut out of N images of ``sizes`` (N, 2): int64 (N, 4), top, left, height, width.

        ``sizes`` are heights and widths. ``chance`` are numbers in [0, 1): (N, 2) for images that
        were resized, whose crops are (crop, crop); (N, 4) for whole ones, whose parts are resized.
        """

    def loss(self, logits: Tensor, labels: Tensor, class_weight: Tensor | None = None) -> Tensor:
        """The mean loss of logits (N, classes) and labels int64 (N,) or bool (N, classes).

        ``class_weight`` (classes,), given for unbalanced classes alone, says what a class weighs.
        """
