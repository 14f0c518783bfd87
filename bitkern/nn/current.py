"""The current standardized weights: those of a whole model, where somebody has made them."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from bitkern import _torch


class StandardizedWeights(Protocol):
    """Standardized weights of some layers."""

    def get(self, conv: nn.Module, weight: Tensor, x: Tensor) -> Tensor | None:
        """A layer's weight, standardized for a convolution of x; None if it has not this one."""


_variable: contextvars.ContextVar[tuple[StandardizedWeights | None, Any] | None]
_variable = contextvars.ContextVar("bitkern_standardized_weights", default=None)


def current() -> StandardizedWeights | None:
    """The weights of the innermost ``using``, or None.

    None as well in what checkpointing will run again in backward, when they are gone: there they
    were never, unless set inside. Told by the hooks on saved tensors, which it works by.
    """
    weights, hooks = _variable.get() or (None, None)
    return weights if weights is None or hooks == _torch.saved_tensors_hooks() else None


@contextlib.contextmanager
def using(weights: StandardizedWeights | None) -> Iterator[None]:
    """Take the weights of WSConv2d layers from these, or from none, inside the block."""
    token = _variable.set((weights, _torch.saved_tensors_hooks()))
    try:
        yield
    finally:
        _variable.reset(token)
