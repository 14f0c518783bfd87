"""What a training does, from its arguments: its schedule, optimizer and steps."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitkern.optim import SGD
from bitkern.transfer import balance, ranks
from bitkern.transfer.compute import Compute
from bitkern.transfer.data.images import ImageSet
from bitkern.transfer.fitting import (
    CPU_IMAGES,
    Trial,
    attempt,
    images_that_fit,
    smallest_split,
)
from bitkern.transfer.recipes import Recipe
from bitkern.transfer.reduction import Reduction
from bitkern.transfer.run import OPTIONS
from bitkern.transfer.schedule import Schedule
from bitkern.transfer.step import Stepper


class TrainingError(RuntimeError):
    """Training cannot go on: the loss is not finite, or the memory does not suffice."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """The arguments of ``train`` that decide on the model it makes, and what follows from them.

    Raises ValueError for arguments that do not fit each other.
    """

    model: nn.Module
    train_set: ImageSet
    rule: Recipe
    compute: Compute
    seed: int
    batch_split: int
    balance: str
    flip: bool
    decoder: str

    def __post_init__(self) -> None:
        if not self.trainable:
            raise ValueError("model: expected trainable parameters, found none")
        if not len(self.train_set.images):
            raise ValueError("train_set: expected images, got none")
        if self.balance not in balance.BALANCE:
            expected = ", ".join(balance.BALANCE)
            raise ValueError(f"balance: expected {expected}, got {self.balance!r}")
        if not self.most_splits:
            raise ValueError(
                f"batch_size: expected {ranks.world_size()} or more, an image for each process, "
                f"got {self.rule.batch_size}"
            )
        if not 1 <= self.batch_split <= self.most_splits:
            several = ranks.world_size() > 1
            limit = "the batch size of each process" if several else "the batch size"
            raise ValueError(
                f"batch_split: expected 1 to {self.most_splits}, {limit}, got {self.batch_split}"
            )

    @functools.cached_property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def most_splits(self) -> int:
        """The largest ``batch_split``, at which each process computes one image at a time."""
        return self.rule.batch_size // ranks.world_size()

    @property
    def micro_batch(self) -> int:
        """The images that a process computes at a time, at most."""
        return math.ceil(self.rule.batch_size / (self.batch_split * ranks.world_size()))

    @property
    def options(self) -> dict[str, Any]:
        """What summary.json says of the training, besides its recipe."""
        return {name: getattr(self, name) for name in OPTIONS} | {
            "precision": self.compute.precision
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What may not change on resuming."""
        return {
            "recipe": type(self.rule).__name__,
            "rule": dataclasses.asdict(self.rule),
            **self.options,
            "training images": len(self.train_set.images),
            "classes": list(self.train_set.classes),
            "multi-label": self.train_set.multi_label,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trainable parameters": sum(p.numel() for p in self.trainable),
        }

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Which images the steps of this process take."""
        sample = self.balance == "sample"
        weights = balance.sample_weights(self.train_set.labels) if sample else None
        group = ranks.rank(), ranks.world_size()
        return Schedule(
            len(self.train_set.images), self.rule, self.seed, self.batch_split, *group, weights
        )

    def optimizer(self) -> SGD:
        """SGD with momentum 0.9; each step sets its learning rate.

        The weights of convolutions and of the head decay, the biases and those of norms do not.
        """
        weights = [p for p in self.trainable if p.ndim > 1]
        rest = [p for p in self.trainable if p.ndim <= 1]
        groups = [
            {"params": weights, "weight_decay": self.rule.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        # Fused, it scales gradients and skips steps of fp16 without reading anything back.
        return SGD(groups, lr=0.0, momentum=0.9, fused=True)

    def stepper(
        self,
        optimizer: SGD,
        scaler: torch.amp.GradScaler,
        reduction: Reduction,
        batches: Iterator[Sequence[Tensor]],
        on_micro_batch: Callable[[int], object] = lambda done: None,
    ) -> Stepper:
        """The steps, on these micro-batches."""
        class_weight = None
        if self.balance == "loss":
            weights = balance.class_weights(self.train_set.labels, len(self.train_set.classes))
            class_weight = torch.from_numpy(weights).float()
        parts = self.model, optimizer, self.schedule, self.compute
        return Stepper(*parts, batches, scaler, reduction, class_weight, on_micro_batch)

    def fitted(
        self,
        optimizer: SGD,
        scaler: torch.amp.GradScaler,
        reduction: Reduction,
        auto: bool,
    ) -> "tuple[Setup, Trial]":
        """The setup and what a micro-batch of it takes; if ``auto``, one split so that it fits.

        That is the smallest ``batch_split`` that does, on a CPU for micro-batches of at most
        ``CPU_IMAGES``. Raises ``TrainingError`` if it does not fit.
        """
        trials: dict[int, Trial | None] = {}

        def tried(batch_split: int) -> Trial | None:
            if batch_split not in trials:
                setup = dataclasses.replace(self, batch_split=batch_split)
                parts = optimizer, scaler, reduction, setup.blank_batches()
                trials[batch_split] = attempt(setup.stepper(*parts))
            return trials[batch_split]

        device, most, few = self.compute.device, self.most_splits, 1
        fit = limit = self.rule.batch_size
        if device.type == "cpu":
            # Batch normalization cannot be trained on one image, where its maps are of one pixel.
            few += any(hasattr(module, "running_mean") for module in self.model.modules())
            fit = images_that_fit(lambda images: tried(math.ceil(most / images)), few)
            limit = min(fit, CPU_IMAGES)
        batch_split: int | None = self.batch_split
        if auto:
            least = math.ceil(most / limit) if limit else most
            batch_split = smallest_split(lambda split: tried(split) is not None, most, least)
        too_many = self.micro_batch > fit if not auto else not fit and few == 1
        trial = None if too_many or batch_split is None else tried(batch_split)
        if batch_split is None or trial is None:
            what, advice = "one image", "lower the crop or take a smaller model"
            if not auto and self.micro_batch > 1:
                what, advice = f"{self.micro_batch} images", "raise batch_split"
            raise TrainingError(
                f"the memory of {device} does not suffice for {what} at a time: {advice}"
            )
        return dataclasses.replace(self, batch_split=batch_split), trial

    def blank_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches as the first one of a step, of black images."""
        part = self.schedule.step(0).parts[0]
        shape = len(part.rows), 3, self.rule.crop, self.rule.crop
        rows = np.arange(shape[0]) % len(self.train_set.images)
        labels = torch.from_numpy(self.train_set.labels_of(rows))
        while True:
            yield torch.zeros(shape, dtype=torch.uint8), labels
