"""Fused weight standardization + convolution and GroupNorm + activation for PyTorch.

Layers (``bitkern.nn``), operators (``bitkern.ops``), the Big Transfer models
(``bitkern.models``) and recipe (``bitkern.transfer``).
"""

import importlib
from typing import TYPE_CHECKING, Any

from bitkern import nn, ops, optim, reference
from bitkern.backends import Choice, use_backend
from bitkern.convert import convert, explain, fold
from bitkern.nn.standardized import standardized

__version__ = "0.1.0"

__all__ = ["Choice", "convert", "create_model", "explain", "fold", "models", "nn", "ops"]
__all__ += ["optim", "reference", "standardized", "transfer", "use_backend"]

if TYPE_CHECKING:
    from bitkern import models, transfer
    from bitkern.models import create_model
else:

    def __getattr__(name: str) -> Any:
        """Load submodules on first use."""
        if name in ("models", "transfer"):
            return importlib.import_module(f"bitkern.{name}")
        if name == "create_model":
            return importlib.import_module("bitkern.models").create_model
        raise AttributeError(f"module 'bitkern' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the names, also those loaded on first use."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
