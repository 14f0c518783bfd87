"""The validated arguments of a training, and its schedule and optimizer."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitkern.optim import SGD
from bitkern.transfer import balance, ranks
from bitkern.transfer.checks import BALANCE, check, check_choice
from bitkern.transfer.data.images import ImageSet
from bitkern.transfer.data.open_images import ImageReadOptions
from bitkern.transfer.device_config import DeviceConfig
from bitkern.transfer.recipes import Recipe
from bitkern.transfer.run import OPTIONS
from bitkern.transfer.schedule import Schedule
from bitkern.transfer.selection import Selection


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
    eval_every: int | None
    checkpoint_every: int | None
    shown: bool
    about: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.trainable:
            raise ValueError("model: expected trainable parameters, found none")
        if not len(self.train_set.images):
            raise ValueError("train_set: expected images, got none")
        check_choice("balance", self.balance, BALANCE)
        processes, most = ranks.world_size(), self.most_splits
        least = f"{processes} or more, an image for each process"
        check(most >= 1, "batch_size", least, self.rule.batch_size)
        limit = f"1 to {most}, the batch size" + " of each process" * (processes > 1)
        check(1 <= self.batch_split <= most, "batch_split", limit, self.batch_split)

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

    def is_due(self, step: int, every: int | None) -> bool:
        """Return True after each ``every`` steps, by default a tenth of them, and the last."""
        steps = self.rule.steps
        return step == steps or step % (every or max(1, steps // 10)) == 0

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

    def blank_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield black images, in micro-batches of the size of a step's first."""
        rows = self.schedule.step(0).slices[0].rows
        shape = len(rows), 3, self.rule.crop, self.rule.crop
        labels = self.train_set.labels_of(np.arange(len(rows)) % len(self.train_set.images))
        while True:
            yield torch.zeros(shape, dtype=torch.uint8), torch.from_numpy(labels)
