"""Randomness: every use of it is a stream of its own, a function of its key alone."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# The first word of every key, so that no two uses share a stream.
ORDER, AUGMENT, MIXUP, FEW_SHOT, HOLDOUT, LETTERS, BOOTSTRAP = range(7)


def random_stream(use: int, *key: int) -> np.random.Generator:
    """The generator of one use of randomness: a function of its key (seed, step, …) alone."""
    return np.random.default_rng((use, *key))


BLOCK = 512  # positions that share a stream, since to begin one takes longer than to draw from it


def uniforms(use: int, seed: int, positions: Sequence[int], count: int) -> npt.NDArray[np.float64]:
    """``count`` numbers in [0, 1) for each position, a function of (seed, position) alone."""
    places = np.asarray(positions, np.int64)
    drawn = np.empty((len(places), count))
    for block in np.unique(places // BLOCK):
        within = places // BLOCK == block
        table = random_stream(use, int(block), seed).random((BLOCK, count))
        drawn[within] = table[places[within] % BLOCK]
    return drawn
