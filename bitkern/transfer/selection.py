"""Which model of a training is kept, and when it ends early. BiT's recipe keeps the last."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitkern.transfer.data.images import ImageSet
from bitkern.transfer.run import Record

KEEP = ("last", "best")
METRICS = {"top1": "top1", "balanced_accuracy": "balanced_accuracy", "macro_f1": "macro_f1"}
METRICS |= {"loss": "eval_loss"}  # by their names in records


@dataclasses.dataclass(frozen=True)
class Selection:
    """Choose the model by images that are neither trained on nor tested with.

    While it trains, ``val_set`` is evaluated in place of the test set. ``keep`` "best" keeps the
    model of the evaluation that is best by ``metric``, the earliest of equals: "top1",
    "balanced_accuracy", "macro_f1" or "loss"; "last" the model of the last step. After ``patience``
    evaluations without a better one the training ends. Raises ValueError for another value.
    """

    val_set: ImageSet
    keep: str = "best"
    metric: str = "top1"
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise ValueError(f"keep: expected {' or '.join(KEEP)}, got {self.keep!r}")
        if self.metric not in METRICS:
            raise ValueError(f"metric: expected {', '.join(METRICS)}, got {self.metric!r}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience: expected a positive number, got {self.patience}")
        if not len(self.val_set.images):
            raise ValueError("val_set: expected images, got none")

    @property
    def settings(self) -> dict[str, Any]:
        """What may not change on resuming."""
        chosen = {"keep": self.keep, "metric": self.metric, "patience": self.patience}
        return chosen | {"validation_images": len(self.val_set.images)}

    def about(self, records: Sequence[Record]) -> dict[str, Any]:
        """What summary.json says of the choice."""
        best = self.best(records)
        step = best["step"] if self.keep == "best" else records[-1]["step"]
        return self.settings | {"kept_step": step, "best_validation": best}

    def best(self, records: Sequence[Record]) -> Record:
        """The best of the evaluations among some records."""
        sign, name = (-1 if self.metric == "loss" else 1), METRICS[self.metric]
        return max(_evaluations(records), key=lambda record: sign * record.get(name, 0.0))

    def is_over(self, records: Sequence[Record]) -> bool:
        """Whether patience has run out."""
        evaluations = _evaluations(records)
        if self.patience is None or not evaluations:
            return False
        return len(evaluations) - 1 - evaluations.index(self.best(evaluations)) >= self.patience


def _evaluations(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if "eval_loss" in record]


class Kept:
    """A copy of a model as it was at its best so far; nothing until it is taken."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors: dict[str, Tensor] = {}

    def take(self) -> None:
        """Copy the model as it is."""
        self.load_state_dict(self.model.state_dict())

    def put_back(self) -> None:
        """Give the model what was copied, if anything was."""
        if self.tensors:
            self.model.load_state_dict(self.tensors)

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        now = self.model.state_dict()
        with torch.no_grad():
            self.tensors = {
                name: torch.empty_like(now[name]).copy_(tensor) for name, tensor in state.items()
            }
