"""Which examples every optimizer step takes, in every process; and how MixUp mixes them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bitkern.transfer.balance import Weights
from bitkern.transfer.recipes import Recipe
from bitkern.transfer.streams import MIXUP, ORDER, random_stream

Indices = npt.NDArray[np.intp]


class Part(NamedTuple):
    """What one process does of a micro-batch.

    ``rows`` int64 (M,) are the examples it loads, as positions in the step's batch. It computes the
    first ``own`` of them; the rest are there to be mixed in. ``permutation`` int64 (M,) is MixUp's,
    of these rows; None without MixUp.
    """

    rows: Indices
    own: int
    permutation: Indices | None


class Step(NamedTuple):
    """MixUp's lambda in a step, None without MixUp, and the process's part of each micro-batch."""

    lam: float | None
    parts: list[Part]


def _along_cycles(permutation: Indices) -> Indices:
    """0 … N-1 in an order in which the image of each under ``permutation`` tends to follow it."""
    order: dict[int, None] = {}  # as an ordered set
    for row in range(len(permutation)):
        while row not in order:
            order[row] = None
            row = int(permutation[row])
    return np.array(list(order))


def _part(rows: Indices, permutation: Indices | None, rank: int, world_size: int) -> Part:
    order = np.arange(len(rows))
    if permutation is not None and world_size > 1:
        order = _along_cycles(permutation)  # so that few partners are another process's
    own = np.array_split(order, world_size)[rank]
    if permutation is None:
        return Part(rows[own], len(own), None)
    partners = permutation[own]
    loaded = np.concatenate([own, np.setdiff1d(partners, own)])
    place = {row: i for i, row in enumerate(loaded)}
    local = [place[row] for row in partners]
    # The rows mixed in take the partners that are left, whatever they are.
    local += sorted(set(range(len(loaded))) - set(local))
    return Part(rows[loaded], len(own), np.array(local))


class Schedule:
    """A function of (seed, step) alone: loader and loop share one, and agree.

    The examples come in one endless stream of epochs, each a permutation drawn from (seed, epoch),
    and a step takes the next ``batch_size`` of it: also from sets smaller than a batch. The parts
    of ``world_size`` processes make up a micro-batch, mixed as a single process mixes it.

    With ``weights`` float64 (num_examples,) an epoch holds as many examples, each as often as its
    weight says: the whole number below or above its share.
    """

    def __init__(
        self,
        num_examples: int,
        recipe: Recipe,
        seed: int,
        batch_split: int = 1,
        rank: int = 0,
        world_size: int = 1,
        weights: Weights | None = None,
    ) -> None:
        self.num_examples = num_examples
        self.recipe = recipe
        self.seed = seed
        self.batch_split = batch_split
        self.rank, self.world_size = rank, world_size
        self.weights = weights

    def step(self, step: int) -> Step:
        """What this process does in an optimizer step, counted from 0."""
        random = random_stream(MIXUP, step, self.seed)
        alpha = self.recipe.mixup_alpha
        lam = random.beta(alpha, alpha) if alpha else None
        parts = []
        for rows in np.array_split(np.arange(self.recipe.batch_size), self.batch_split):
            permutation = None if lam is None else random.permutation(len(rows))
            parts.append(_part(rows, permutation, self.rank, self.world_size))
        return Step(lam, parts)

    def _epoch(self, epoch: int) -> Indices:
        random = random_stream(ORDER, epoch, self.seed)
        order = random.permutation(self.num_examples)
        if self.weights is None:
            return order
        # Systematic sampling: equal steps from a random start along the weights, laid end to end.
        order = order[np.argsort(self.weights[order], kind="stable")]
        ends = np.cumsum(self.weights[order])
        points = (np.arange(self.num_examples) + random.random()) / self.num_examples
        drawn = order[np.searchsorted(ends / ends[-1], points, side="right")]
        return random.permutation(drawn)

    def micro_batches(self, start: int = 0) -> Iterator[list[tuple[int, int]]]:
        """(index, position) pairs to load for each micro-batch, from optimizer step ``start`` on.

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
            for part in self.step(step).parts:
                yield [batch[row] for row in part.rows]
