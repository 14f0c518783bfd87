"""Model selection by validation, and early stopping. BiT's recipe keeps the last model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitkern.transfer.checks import KEEP, METRICS, check_choice
from bitkern.transfer.curves import Record
from bitkern.transfer.data.images import ImageSet


@dataclasses.dataclass(frozen=True)
class Selection:
    """Choose the model by images that are neither trained on nor tested with.

    ``val_set`` is evaluated during the training in place of the test set. ``keep`` "best" keeps the
    model of the best evaluation by ``metric``, the earliest of equals: "top1",
    "balanced_accuracy", "macro_f1" or "loss"; "last" the model of the last step. The training ends
    after ``patience`` evaluations without an improvement. Raises ValueError for another value.
    """

    val_set: ImageSet
    keep: str = "best"
    metric: str = "top1"
    patience: int | None = None

    def __post_init__(self) -> None:
        check_choice("keep", self.keep, KEEP)
        check_choice("metric", self.metric, METRICS)
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience: expected a positive number, got {self.patience}")
        if not len(self.val_set.images):
            raise ValueError("val_set: expected images, got none")

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that must be the same on resuming."""
        chosen = {"keep": self.keep, "metric": self.metric, "patience": self.patience}
        return chosen | {"validation_images": len(self.val_set.images)}

    def about(self, records: Sequence[Record]) -> dict[str, Any]:
        """Entries of summary.json about the choice."""
        best = self.best(records)
        step = best["step"] if self.keep == "best" else records[-1]["step"]
        return self.settings | {"kept_step": step, "best_validation": best}

    def best(self, records: Sequence[Record]) -> Record:
        """Return the best evaluation among the records."""
        sign, name = (-1, "eval_loss") if self.metric == "loss" else (1, self.metric)
        return max(_evaluations(records), key=lambda record: sign * record.get(name, 0.0))

    def is_over(self, records: Sequence[Record]) -> bool:
        """Return True if ``patience`` evaluations have brought no improvement."""
        evaluations = _evaluations(records)
        if self.patience is None or not evaluations:
            return False
        return len(evaluations) - 1 - evaluations.index(self.best(evaluations)) >= self.patience


def _evaluations(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if "eval_loss" in record]


class BestModel:
    """A copy of the best model so far; empty until it is saved."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors: dict[str, Tensor] = {}

    def save(self) -> None:
        self.load_state_dict(self.model.state_dict())

    def restore(self) -> None:
        if self.tensors:
            self.model.load_state_dict(self.tensors)

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own = self.model.state_dict()
        with torch.no_grad():
            self.tensors = {k: torch.empty_like(own[k]).copy_(v) for k, v in state.items()}
