"""The examples of every optimizer step, in every process, and their MixUp."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bitkern.transfer.balance import Weights
from bitkern.transfer.recipes import Recipe
from bitkern.transfer.rng import MIXUP, ORDER, random_stream

Indices = npt.NDArray[np.intp]


class RankSlice(NamedTuple):
    """One process's slice of a micro-batch.

    ``rows`` int64 (M,) are the examples to load, as positions in the step's batch. The process
    computes the first ``own`` of them; the rest are MixUp partners. ``permutation`` int64 (M,) is
    MixUp's, among these rows; None without MixUp.
    """

    rows: Indices
    own: int
    permutation: Indices | None


class StepPlan(NamedTuple):
    """MixUp's lambda in a step, or None, and the process's slice of each micro-batch."""

    lam: float | None
    slices: list[RankSlice]


def _along_cycles(permutation: Indices) -> Indices:
    """Order 0 … N-1 along the cycles of ``permutation``, so that partners are neighbours."""
    order: dict[int, None] = {}  # used as an ordered set
    for row in range(len(permutation)):
        while row not in order:
            order[row] = None
            row = int(permutation[row])
    return np.array(list(order))


def _rank_slice(
    rows: Indices, permutation: Indices | None, rank: int, world_size: int
) -> RankSlice:
    order = np.arange(len(rows))
    if permutation is not None and world_size > 1:
        order = _along_cycles(permutation)  # few partners then belong to another process
    own = np.array_split(order, world_size)[rank]
    if permutation is None:
        return RankSlice(rows[own], len(own), None)
    partners = permutation[own]
    loaded = np.concatenate([own, np.setdiff1d(partners, own)])
    index = {row: i for i, row in enumerate(loaded)}
    local = [index[row] for row in partners]
    # Rows that are not computed get the partners left over.
    local += sorted(set(range(len(loaded))) - set(local))
    return RankSlice(rows[loaded], len(own), np.array(local))


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The order of examples, a function of (seed, step) alone, shared by loader and loop.

    Examples come in an endless stream of epochs, each a permutation drawn from (seed, epoch), and a
    step takes the next ``batch_size``, also from sets smaller than a batch. The slices of
    ``world_size`` processes make up a micro-batch with the same MixUp as in a single process.

    With ``weights`` float64 (num_examples,) an epoch has as many examples, each in proportion to
    its weight, rounded down or up.
    """

    num_examples: int
    recipe: Recipe
    seed: int
    batch_split: int = 1
    rank: int = 0
    world_size: int = 1
    weights: Weights | None = None

    def step(self, step: int) -> StepPlan:
        """Return this process's work in an optimizer step, counted from 0."""
        random = random_stream(MIXUP, step, self.seed)
        alpha = self.recipe.mixup_alpha
        lam = random.beta(alpha, alpha) if alpha else None
        slices = []
        for rows in np.array_split(np.arange(self.recipe.batch_size), self.batch_split):
            permutation = None if lam is None else random.permutation(len(rows))
            slices.append(_rank_slice(rows, permutation, self.rank, self.world_size))
        return StepPlan(lam, slices)

    def _epoch(self, epoch: int) -> Indices:
        random = random_stream(ORDER, epoch, self.seed)
        order = random.permutation(self.num_examples)
        if self.weights is None:
            return order
        # Systematic sampling: equidistant points, from a random start, on the cumulated weights.
        order = order[np.argsort(self.weights[order], kind="stable")]
        ends = np.cumsum(self.weights[order])
        points = (np.arange(self.num_examples) + random.random()) / self.num_examples
        drawn = order[np.searchsorted(ends / ends[-1], points, side="right")]
        return random.permutation(drawn)

    def micro_batches(self, start: int = 0) -> Iterator[list[tuple[int, int]]]:
        """Yield the (index, position) pairs of each micro-batch, from optimizer step ``start`` on.

        ``position`` counts the examples since the start of training.
        """
        epoch, order = -1, np.arange(0)
        for step in range(start, self.recipe.steps):
            batch = []
            first = step * self.recipe.batch_size
            for position in range(first, first + self.recipe.batch_size):
                if position // self.num_examples != epoch:
                    epoch = position // self.num_examples
                    order = self._epoch(epoch)
                batch.append((int(order[position % self.num_examples]), position))
            for rank_slice in self.step(step).slices:
                yield [batch[row] for row in rank_slice.rows]
