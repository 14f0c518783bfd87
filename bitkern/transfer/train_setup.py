"""The validated arguments of a training, and its schedule, optimizer and steps."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bitkern.optim import SGD
from bitkern.transfer import balance, ranks
from bitkern.transfer.data.images import ImageSet
from bitkern.transfer.data.open_images import ImageReadOptions
from bitkern.transfer.device_config import DeviceConfig
from bitkern.transfer.gradient_reducer import GradientReducer
from bitkern.transfer.micro_batch import (
    CPU_IMAGES,
    Trial,
    images_that_fit,
    smallest_split,
    try_step,
)
from bitkern.transfer.recipes import Recipe
from bitkern.transfer.run import OPTIONS
from bitkern.transfer.schedule import Schedule
from bitkern.transfer.selection import Selection
from bitkern.transfer.step import TrainStep


class TrainingError(RuntimeError):
    """Training cannot continue: the loss is not finite, or there is too little memory."""


class Intervals(NamedTuple):
    """The steps after which to evaluate and to save: every so many of ``steps``, and the last."""

    steps: int
    eval_every: int | None
    checkpoint_every: int | None

    def _is_due(self, step: int, every: int | None) -> bool:
        return step == self.steps or step % (every or max(1, self.steps // 10)) == 0

    def evaluation(self, step: int) -> bool:
        return step > 0 and self._is_due(step, self.eval_every)

    def checkpoint(self, step: int) -> bool:
        return self._is_due(step, self.checkpoint_every)


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """The arguments of ``train``. Raises ValueError if they do not fit each other."""

    model: nn.Module
    train_set: ImageSet
    rule: Recipe
    config: DeviceConfig
    seed: int
    batch_split: int
    balance: str
    flip: bool
    read_options: ImageReadOptions
    eval_set: ImageSet | None
    selection: Selection | None
    folder: Path | None
    intervals: Intervals
    shown: bool
    about: dict[str, Any]

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
            limit = "the batch size" + " of each process" * (ranks.world_size() > 1)
            raise ValueError(
                f"batch_split: expected 1 to {self.most_splits}, {limit}, got {self.batch_split}"
            )

    @property
    def decoder(self) -> str:
        return self.read_options.decoder

    @functools.cached_property
    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def most_splits(self) -> int:
        """The largest ``batch_split``: one image at a time in each process."""
        return self.rule.batch_size // ranks.world_size()

    @property
    def micro_batch(self) -> int:
        """The largest number of images that a process computes at a time."""
        return math.ceil(self.rule.batch_size / (self.batch_split * ranks.world_size()))

    @property
    def options(self) -> dict[str, Any]:
        """Entries of summary.json, besides the recipe."""
        options = {name: getattr(self, name) for name in OPTIONS}
        return options | {"precision": self.config.precision}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that must be the same on resuming."""
        selection = self.selection.settings if self.selection else {"keep": "last"}
        return {
            "recipe": type(self.rule).__name__,
            "rule": dataclasses.asdict(self.rule),
            **self.options,
            "training images": len(self.train_set.images),
            "classes": list(self.train_set.classes),
            "multi-label": self.train_set.multi_label,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trainable parameters": sum(p.numel() for p in self.trainable),
            **selection,
        }

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The images of each step of this process."""
        sample = self.balance == "sample"
        weights = balance.sample_weights(self.train_set.labels) if sample else None
        group = ranks.rank(), ranks.world_size()
        return Schedule(
            len(self.train_set.images), self.rule, self.seed, self.batch_split, *group, weights
        )

    def optimizer(self) -> SGD:
        """Create SGD with momentum 0.9, whose learning rate each step sets.

        Weight decay applies to the weights of convolutions and head, not to biases and norms.
        """
        weights = [p for p in self.trainable if p.ndim > 1]
        rest = [p for p in self.trainable if p.ndim <= 1]
        groups = [
            {"params": weights, "weight_decay": self.rule.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        # Fused SGD scales gradients and skips steps of fp16 without reading from the device.
        return SGD(groups, lr=0.0, momentum=0.9, fused=True)

    def train_step(
        self,
        optimizer: SGD,
        scaler: torch.amp.GradScaler,
        reducer: GradientReducer,
        batches: Iterator[Sequence[Tensor]],
        on_micro_batch: Callable[[int], object] = lambda done: None,
    ) -> TrainStep:
        class_weight = None
        if self.balance == "loss":
            weights = balance.class_weights(self.train_set.labels, len(self.train_set.classes))
            class_weight = torch.from_numpy(weights).float()
        parts = self.model, optimizer, self.schedule, self.config
        return TrainStep(*parts, batches, scaler, reducer, class_weight, on_micro_batch)

    def fitted(
        self, optimizer: SGD, scaler: torch.amp.GradScaler, reducer: GradientReducer, auto: bool
    ) -> "tuple[TrainSetup, Trial]":
        """Return the setup, with the smallest ``batch_split`` that fits if ``auto``, and its trial.

        On a CPU micro-batches of more than ``CPU_IMAGES`` are not tried. Raises ``TrainingError``
        if the memory does not suffice.
        """
        trials: dict[int, Trial | None] = {}

        def try_split(batch_split: int) -> Trial | None:
            if batch_split not in trials:
                setup = dataclasses.replace(self, batch_split=batch_split)
                parts = optimizer, scaler, reducer, setup.blank_batches()
                trials[batch_split] = try_step(setup.train_step(*parts))
            return trials[batch_split]

        device, most, few = self.config.device, self.most_splits, 1
        fit = limit = self.rule.batch_size
        if device.type == "cpu":
            # Batch normalization cannot be trained on one image with maps of one pixel.
            few += any(hasattr(module, "running_mean") for module in self.model.modules())
            fit = images_that_fit(lambda images: try_split(math.ceil(most / images)), few)
            limit = min(fit, CPU_IMAGES)
        batch_split: int | None = self.batch_split
        if auto:
            least = math.ceil(most / limit) if limit else most
            batch_split = smallest_split(lambda split: try_split(split) is not None, most, least)
        too_many = self.micro_batch > fit if not auto else not fit and few == 1
        trial = None if too_many or batch_split is None else try_split(batch_split)
        if batch_split is None or trial is None:
            images, advice = "one image", "lower the crop or take a smaller model"
            if not auto and self.micro_batch > 1:
                images, advice = f"{self.micro_batch} images", "raise batch_split"
            raise TrainingError(f"not enough memory on {device} for {images} at a time: {advice}")
        return dataclasses.replace(self, batch_split=batch_split), trial

    def blank_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield black images, in micro-batches of the size of a step's first."""
        rows = self.schedule.step(0).slices[0].rows
        shape = len(rows), 3, self.rule.crop, self.rule.crop
        labels = self.train_set.labels_of(np.arange(len(rows)) % len(self.train_set.images))
        while True:
            yield torch.zeros(shape, dtype=torch.uint8), torch.from_numpy(labels)
