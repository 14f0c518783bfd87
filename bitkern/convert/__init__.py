"""Models from elsewhere on these kernels, folded for inference, and told what became of them."""

from bitkern.convert.convert import convert
from bitkern.convert.explain import explain
from bitkern.convert.fold import fold

__all__ = ["convert", "explain", "fold"]
