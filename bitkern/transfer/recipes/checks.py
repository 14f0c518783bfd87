"""Checks of the values of recipes."""

import math
from typing import Protocol


class StepSchedule(Protocol):
    """A recipe with a linear warm-up and decays at ``decay_steps``, in optimizer steps."""

    @property
    def steps(self) -> int: ...
    @property
    def decay_steps(self) -> tuple[int, ...]: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def base_lr(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def weight_decay(self) -> float: ...


def check(valid: bool, name: str, expected: str, got: object) -> None:
    """Raise ValueError, naming the argument, unless it is valid."""
    if not valid:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def check_schedule(rule: StepSchedule) -> None:
    """Raise ValueError for values that make no schedule."""
    check(rule.steps >= 1, "steps", "a positive number", rule.steps)
    ordered = list(rule.decay_steps) == sorted(rule.decay_steps)
    positive = all(step >= 0 for step in rule.decay_steps)
    check(ordered and positive, "decay_steps", "ascending steps", rule.decay_steps)
    check(rule.warmup_steps >= 0, "warmup_steps", "0 or more", rule.warmup_steps)
    check(0 < rule.base_lr < math.inf, "base_lr", "a positive finite number", rule.base_lr)
    check(rule.batch_size >= 1, "batch_size", "a positive number", rule.batch_size)
    decay = rule.weight_decay
    check(0 <= decay < math.inf, "weight_decay", "a finite number, 0 or more", decay)
