"""Claims as data, stated before they are run."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Cell = tuple[str, str]  # (row, column) of a claim's table


class Comparison(NamedTuple):
    """A difference that each seed gives, as a sum of cells, each times a factor.

    ``smallest`` is the smallest effect of interest. It is a gain that is looked for, or, with
    ``no_loss``, a loss that should not be: see :func:`benchmarks.claims.statistics.verdict`.
    """

    what: str
    terms: tuple[tuple[float, Cell], ...]
    smallest: float
    no_loss: bool = False


class Claim(NamedTuple):
    """A hypothesis of the paper in small, and the runs that may show it.

    ``run(seed, **amounts, **conditions[name])`` is a run and returns its numbers by name; a cell is
    one of the numbers of one condition. ``quick`` takes the place of ``amounts`` in a dry run. The
    first comparison decides on the claim, the others belong to the picture. ``seconds`` is what a
    seed's runs were expected to take of a free core, from the time of a batch on an AMD EPYC.
    """

    name: str
    title: str
    hypothesis: str
    setting: str
    metric: str
    across: str
    seeds: int
    seconds: int
    run: Callable[..., dict[str, float]]
    amounts: Mapping[str, Any]
    quick: Mapping[str, Any]
    conditions: Mapping[str, Mapping[str, Any]]
    cells: Mapping[Cell, tuple[str, str]]
    comparisons: tuple[Comparison, ...]
