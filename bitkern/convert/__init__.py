"""Conversion of existing models to these kernels, folding for inference, and explanation."""

from bitkern.convert.convert import convert
from bitkern.convert.explain import explain
from bitkern.convert.fold import fold

__all__ = ["convert", "explain", "fold"]
