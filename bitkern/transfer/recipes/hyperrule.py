"""The BiT-HyperRule: every hyper-parameter of a transfer from the data set's size alone.

Source: "Big Transfer (BiT)", arXiv 1912.11370, section 3.3, and ``bit_hyperrule.py`` of
google-research/big_transfer.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bitkern.transfer.checks import StepSchedule, check
from bitkern.transfer.recipes.mixup import cross_entropy


@dataclass(frozen=True)
class HyperRule(StepSchedule):
    """The hyper-parameters of one transfer. Override values with ``dataclasses.replace``.

    ``resize`` and ``crop`` are pixels (square images); ``steps``, ``decay_steps`` and
    ``warmup_steps`` optimizer steps; ``mixup_alpha`` the Beta parameter of MixUp, 0 for none;
    ``base_lr`` the learning rate at ``batch_size`` (it is not rescaled when either is replaced).
    ``weight_decay``, 0 in BiT, applies to the weights of convolutions and head. ``sigmoid`` is
    False: sigmoids are for multi-label sets only.
    Raises ``ValueError`` for values that make no schedule, such as a crop larger than the image.
    """

    resize: int
    crop: int
    steps: int
    decay_steps: tuple[int, ...]
    warmup_steps: int
    mixup_alpha: float
    base_lr: float = 0.003
    batch_size: int = 512
    weight_decay: float = 0.0
    sigmoid: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self.crop >= 1, "crop", "a positive number of pixels", self.crop)
        check(
            self.resize >= self.crop,
            "resize",
            f"at least the crop, {self.crop} (the resized image must not be smaller than the crop)",
            self.resize,
        )
        finite_alpha = 0 <= self.mixup_alpha < math.inf
        check(finite_alpha, "mixup_alpha", "a finite number, 0 or more", self.mixup_alpha)
        self._check_schedule()

    def lr(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0 (so the first is 0).

        Linear warm-up, then a tenth for each decay step strictly below ``step``.
        """
        check(step >= 0, "step", "0 or more", step)
        if step < self.warmup_steps:
            return self.base_lr * step / self.warmup_steps
        decays = sum(decay < step for decay in self.decay_steps)
        return self.base_lr / float(10**decays)

    def with_steps(self, steps: int) -> "HyperRule":
        """The same schedule stretched or shrunk to ``steps``, warm-up and decays in proportion."""
        check(steps >= 1, "steps", "a positive number", steps)
        ratio = steps / self.steps
        return dataclasses.replace(
            self,
            steps=steps,
            decay_steps=tuple(round(decay * ratio) for decay in self.decay_steps),
            warmup_steps=round(self.warmup_steps * ratio),
        )

    def quick(self) -> "HyperRule":
        """The rule for small machines: minutes where its own training takes hours.

        At most 100 steps, scaled as by ``with_steps``, of at most 64 images, of at most the
        HyperRule's size of small images, 160 and 128. The learning rate stays.
        """
        return dataclasses.replace(
            self.with_steps(min(self.steps, 100)),
            resize=min(self.resize, 160),
            crop=min(self.crop, 128),
            batch_size=min(self.batch_size, 64),
        )

    def regions(
        self, chance: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Random crops (top, left, crop, crop), from numbers (N, 2) in [0, 1): int64 (N, 4)."""
        corners = (chance * (sizes - self.crop + 1)).astype(np.int64)
        return np.concatenate([corners, np.full_like(corners, self.crop)], 1)

    def loss(self, logits: Tensor, labels: Tensor, class_weight: Tensor | None = None) -> Tensor:
        """Cross-entropy of a softmax, or of sigmoids for a multi-label set."""
        return cross_entropy(logits, labels, class_weight)


def hyperrule(num_examples: int, image_size: tuple[int, int]) -> HyperRule:
    """The BiT-HyperRule for ``num_examples`` training images of ``image_size`` (height, width).

    ``num_examples`` is counted after few-shot subsetting. Raises ``ValueError`` unless all three
    numbers are positive.
    """
    check(num_examples >= 1, "num_examples", "a positive number", num_examples)
    pair = len(image_size) == 2 and min(image_size) >= 1
    check(pair, "image_size", "a positive (height, width)", image_size)
    height, width = image_size
    resize, crop = (160, 128) if height * width < 96 * 96 else (512, 480)
    if num_examples < 20_000:
        steps, decay_steps, warmup_steps, mixup_alpha = 500, (200, 300, 400), 100, 0.0
    elif num_examples < 500_000:
        steps, decay_steps, warmup_steps, mixup_alpha = 10_000, (3000, 6000, 9000), 500, 0.1
    else:
        steps, decay_steps, warmup_steps, mixup_alpha = 20_000, (6000, 12_000, 18_000), 500, 0.1
    return HyperRule(resize, crop, steps, decay_steps, warmup_steps, mixup_alpha)
