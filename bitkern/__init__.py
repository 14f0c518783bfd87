"""Fused weight standardization + convolution and GroupNorm + activation for PyTorch.

Layers (:mod:`bitkern.nn`), operators (:mod:`bitkern.ops`), the Big Transfer models
(:mod:`bitkern.models`) and recipe (:mod:`bitkern.transfer`).
"""

import importlib

from bitkern import nn, ops, reference
from bitkern.backend import Choice, explain, use_backend
from bitkern.convert import convert
from bitkern.fold import fold
from bitkern.standardized import standardized

__version__ = "0.1.0"

__all__ = ["Choice", "convert", "create_model", "explain", "fold", "models", "nn", "ops"]
__all__ += ["reference", "standardized", "transfer", "use_backend"]


def __getattr__(name):
    if name in ("models", "transfer"):
        return importlib.import_module(f"bitkern.{name}")
    if name == "create_model":
        return importlib.import_module("bitkern.models").create_model
    raise AttributeError(f"module 'bitkern' has no attribute {name!r}")
