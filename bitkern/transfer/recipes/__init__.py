"""Recipes: all hyper-parameters of a training, from its data set's size alone."""

from dataclasses import Field
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor


class Recipe(Protocol):
    """The interface of a recipe, a frozen dataclass.

    ``steps`` optimizer steps of ``batch_size`` images (3, crop, crop) each, cropped from images
    resized to (resize, resize), or from original images where ``resize`` is None. ``mixup_alpha``
    is the Beta parameter of MixUp, 0 for none. ``weight_decay`` applies to tensors of two
    dimensions and more. ``sigmoid`` selects the loss of sigmoids also for single labels.
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
        """Regions to crop from N images: int64 (N, 4), top, left, height, width.

        ``sizes`` (N, 2) are heights and widths. ``chance`` are numbers in [0, 1): (N, 2) for
        resized images, whose crops are (crop, crop); (N, 4) for original ones, whose regions are
        resized.
        """

    def loss(self, logits: Tensor, labels: Tensor, class_weight: Tensor | None = None) -> Tensor:
        """The mean loss of logits (N, classes) and labels int64 (N,) or bool (N, classes).

        ``class_weight`` (classes,) weights unbalanced classes.
        """
