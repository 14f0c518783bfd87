"""The upstream training of BiT, as published.

Source: "Big Transfer (BiT)", arXiv 1912.11370, sections 3.1 to 3.3. What the paper leaves open is
as in google-research/big_vision, by the same authors (``utils.py``, ``optax.py``,
``pp/ops_image.py``, ``configs/bit_i21k.py``): docs/pretraining.md lists it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from bitkern.transfer.checks import StepSchedule, check, check_choice
from bitkern.transfer.recipes.mixup import cross_entropy

# Epochs, the epochs after which the learning rate decays, and sigmoids or a softmax.
PRESETS: dict[str, tuple[int, tuple[int, ...], bool]] = {
    "BiT-S": (90, (30, 60, 80), False),
    "BiT-M": (90, (30, 60, 80), True),
    "BiT-L": (40, (10, 23, 30, 37), True),
}
ASPECT_RATIOS = 3 / 4, 4 / 3


@dataclass(frozen=True)
class Pretraining(StepSchedule):
    """The hyper-parameters of one pre-training. Override values with ``dataclasses.replace``.

    ``crop`` is pixels (square), ``min_area`` the least fraction of an image in a crop;
    ``steps``, ``decay_steps`` and ``warmup_steps`` optimizer steps; ``base_lr`` the learning rate
    per 256 images of ``batch_size``; ``sigmoid`` selects the loss of sigmoids, also for single
    labels. ``weight_decay`` applies to the weights of convolutions and head. ``resize`` is None:
    crops are cut out of original images; ``mixup_alpha`` is 0: there is no MixUp upstream.
    Raises ``ValueError`` for values that make no schedule.
    """

    steps: int
    decay_steps: tuple[int, ...]
    warmup_steps: int = 5000
    base_lr: float = 0.03
    batch_size: int = 4096
    weight_decay: float = 1e-4
    sigmoid: bool = False
    crop: int = 224
    min_area: float = 0.05
    resize: ClassVar[None] = None
    mixup_alpha: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check(self.crop >= 1, "image_size", "a positive number of pixels", self.crop)
        check(0 < self.min_area <= 1, "min_area", "a fraction up to 1", self.min_area)
        self._check_schedule()
        check(
            self.warmup_steps < self.steps,
            "warmup_steps",
            f"fewer than the {self.steps} steps of the training",
            self.warmup_steps,
        )

    def lr(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0 (so the first is 0).

        Linear warm-up; a tenth from each decay step on, also within the warm-up.
        """
        check(step >= 0, "step", "0 or more", step)
        peak = self.base_lr * self.batch_size / 256
        risen = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return peak * risen / float(10 ** sum(decay <= step for decay in self.decay_steps))

    def regions(
        self, chance: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """The inception crop: regions of images (height, width), from numbers (N, 4) in [0, 1).

        The aspect ratio is uniform among those in 3/4 … 4/3 at which a region that covers
        ``min_area`` of the image fits, the height among those of such regions, the position among
        all. This is the distribution of TensorFlow's ``sample_distorted_bounding_box``. An image in
        which no region fits is taken whole. Returns int64 (N, 4): top, left, height, width.
        """
        height, width = sizes[:, 0], sizes[:, 1]
        least_ratio, most_ratio = ASPECT_RATIOS
        low = np.maximum(least_ratio, self.min_area * width / height)
        high = np.minimum(most_ratio, width / (self.min_area * height))
        ratio = low + chance[:, 0] * np.maximum(high - low, 0)
        least = np.ceil(np.sqrt(self.min_area * height * width / ratio))
        most = np.minimum(height, np.floor(width / ratio))
        drawn = np.minimum(least + np.floor(chance[:, 1] * (most - least + 1)), most)
        tall = np.where(least <= most, drawn, height)
        wide = np.where(least <= most, np.minimum(np.ceil(tall * ratio), width), width)
        top = np.floor(chance[:, 2] * (height - tall + 1))
        left = np.floor(chance[:, 3] * (width - wide + 1))
        return np.stack([top, left, tall, wide], 1).astype(np.int64)

    def loss(self, logits: Tensor, labels: Tensor, class_weight: Tensor | None = None) -> Tensor:
        """Cross-entropy of a softmax, or of sigmoids summed over the classes.

        Raises ValueError for a multi-label set without ``sigmoid``.
        """
        if not self.sigmoid and labels.ndim == 2:
            raise ValueError("labels: expected one per image for a softmax, got several")
        if self.sigmoid and labels.ndim == 1:
            labels = F.one_hot(labels, logits.shape[1]).bool()
        return cross_entropy(logits, labels, class_weight)

    def head_bias(self, num_classes: int) -> float:
        """Initial value of the head's biases: 0, or for sigmoids the logit of 1 / num_classes."""
        return -math.log(num_classes) if self.sigmoid else 0.0


def pretraining(
    preset: str,
    num_examples: int,
    batch_size: int = 4096,
    image_size: int = 224,
    *,
    epochs: float | None = None,
    decay_epochs: Sequence[float] | None = None,
    steps: int | None = None,
    **values: Any,
) -> Pretraining:
    """The pre-training of a preset, one of ``PRESETS``, on ``num_examples`` images.

    ``image_size`` is pixels (square). The other arguments override the preset or ``Pretraining``:
    ``epochs`` or ``steps`` stretch the decays in proportion, unless ``decay_epochs`` are given.
    Epochs are rounded to the nearest step. Raises ``ValueError`` for an unknown preset, for numbers
    that are not positive, and for a set so small that the training would end within its warm-up.
    """
    check_choice("preset", preset, PRESETS)
    published, decays, sigmoid = PRESETS[preset]

    def steps_of(count: float, stretch: float = 1) -> int:
        return max(1, round(count * num_examples / batch_size * stretch))

    check(num_examples >= 1, "num_examples", "a positive number", num_examples)
    check(batch_size >= 1, "batch_size", "a positive number", batch_size)
    check(steps is None or epochs is None, "steps", "no epochs beside them", epochs)
    stretch = 1.0
    if epochs is not None:
        check(0 < epochs < math.inf, "epochs", "a positive number", epochs)
        stretch = epochs / published
    if steps is not None:
        check(steps >= 1, "steps", "a positive number", steps)
        stretch = steps / (published * num_examples / batch_size)
    for epoch in decay_epochs or ():
        check(0 < epoch < math.inf, "decay_epochs", "positive numbers", epoch)
    if decay_epochs is None:
        decay_steps = tuple(steps_of(epoch, stretch) for epoch in decays)
    else:
        decay_steps = tuple(steps_of(epoch) for epoch in decay_epochs)
    rule = {"sigmoid": sigmoid, "batch_size": batch_size, "crop": image_size} | values
    return Pretraining(steps or steps_of(published, stretch), decay_steps, **rule)
