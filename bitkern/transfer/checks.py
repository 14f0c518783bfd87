"""Checks of arguments, and the choices of some, which the command line offers."""

import math
from collections.abc import Collection

import torch

BALANCE = ("none", "sample", "loss")
CACHE = ("auto", "ram", "disk", "off")
CUDA_GRAPH = ("auto", "on", "off")
KEEP = ("last", "best")
METRICS = ("top1", "balanced_accuracy", "macro_f1", "loss")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check(valid: bool, name: str, expected: str, got: object) -> None:
    """Raise ValueError, naming the argument, unless it is valid."""
    if not valid:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError, naming the argument, unless it is one of the choices."""
    separator = ", " if len(choices) > 2 else " or "
    check(value in choices, name, separator.join(choices), value)


class StepSchedule:
    """The fields of recipes with a linear warm-up and decays at ``decay_steps``."""

    steps: int
    decay_steps: tuple[int, ...]
    warmup_steps: int
    base_lr: float
    batch_size: int
    weight_decay: float

    def _check_schedule(self) -> None:
        """Raise ValueError for values that make no schedule."""
        check(self.steps >= 1, "steps", "a positive number", self.steps)
        ordered = list(self.decay_steps) == sorted(self.decay_steps)
        positive = all(step >= 0 for step in self.decay_steps)
        check(ordered and positive, "decay_steps", "ascending steps", self.decay_steps)
        check(self.warmup_steps >= 0, "warmup_steps", "0 or more", self.warmup_steps)
        check(0 < self.base_lr < math.inf, "base_lr", "a positive finite number", self.base_lr)
        check(self.batch_size >= 1, "batch_size", "a positive number", self.batch_size)
        decay = self.weight_decay
        check(0 <= decay < math.inf, "weight_decay", "a finite number, 0 or more", decay)
