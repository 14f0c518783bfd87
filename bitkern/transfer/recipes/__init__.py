"""Recipes: what a training run does, from its data set's size alone."""

from dataclasses import Field
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor


class Recipe(Protocol):
    """All that the loop knows of a recipe, a frozen dataclass.

    ``steps`` optimizer steps of ``batch_size`` images (3, crop, crop) each, cut out of images that
    were resized to (resize, resize), and mixed where ``mixup_alpha``, the Beta parameter of MixUp,
    is not 0.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def resize(self) -> int: ...
    @property
    def crop(self) -> int: ...
    @property
    def mixup_alpha(self) -> float: ...

    def lr(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0."""

    def corners(self, chance: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """(top, left) of the crops of N images, from numbers (N, 2) in [0, 1): int64 (N, 2)."""

    def loss(self, logits: Tensor, labels: Tensor, class_weight: Tensor | None = None) -> Tensor:
        """The mean loss of logits (N, classes) and labels int64 (N,) or bool (N, classes).

        ``class_weight`` (classes,), given for unbalanced classes alone, says what a class weighs.
        """
