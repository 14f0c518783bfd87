"""The standardized weights shared by the layers of a model, in the current context."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from bitkern import _torch


class WeightSource(Protocol):
    """An object that holds standardized weights of some layers."""

    def get(self, conv: nn.Module, weight: Tensor, x: Tensor) -> Tensor | None:
        """A layer's weight, standardized for a convolution of x; None if it is not held."""


_variable: contextvars.ContextVar[tuple[WeightSource | None, Any] | None]
_variable = contextvars.ContextVar("bitkern_standardized_weights", default=None)


def current() -> WeightSource | None:
    """The weights of the innermost ``using``, or None.

    None inside a checkpointed part, which runs again in backward when the weights are gone, unless
    they were set inside it. Checkpointing is recognized by its hooks on saved tensors.
    """
    weights, hooks = _variable.get() or (None, None)
    return weights if weights is None or hooks == _torch.saved_tensors_hooks() else None


@contextlib.contextmanager
def using(weights: WeightSource | None) -> Iterator[None]:
    """Let WSConv2d layers take their weights from ``weights``, or from none, inside the block."""
    token = _variable.set((weights, _torch.saved_tensors_hooks()))
    try:
        yield
    finally:
        _variable.reset(token)
