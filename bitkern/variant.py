"""The variants of weight standardization."""

from typing import NamedTuple


class Variant(NamedTuple):
    """What layers that are standardized in one launch have in common.

    ``eps`` is added to the variance of a filter, or to its root with ``eps_outside``; ``unbiased``
    divides the sum of squares by K - 1 instead of K. A layer's own ``scale`` and gain are factors.
    """

    eps: float = 1e-10
    eps_outside: bool = False
    unbiased: bool = False
