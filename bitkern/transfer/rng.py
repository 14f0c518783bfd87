"""Random streams: each use of randomness has its own, a function of its key alone."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# The first word of every key, so that no two uses share a stream.
ORDER, AUGMENT, MIXUP, FEW_SHOT, HOLDOUT, LETTERS, BOOTSTRAP = range(7)
BLOCK = 512  # positions that share a stream, because creating one takes longer than drawing


def random_stream(use: int, *key: int) -> np.random.Generator:
    """Create the generator of a use of randomness from its key (seed, step, …)."""
    return np.random.default_rng((use, *key))


def uniforms(use: int, seed: int, positions: Sequence[int], count: int) -> npt.NDArray[np.float64]:
    """Draw ``count`` numbers in [0, 1) for each position, a function of (seed, position) alone."""
    rows = np.asarray(positions, np.int64)
    drawn = np.empty((len(rows), count))
    for block in np.unique(rows // BLOCK):
        within = rows // BLOCK == block
        table = random_stream(use, int(block), seed).random((BLOCK, count))
        drawn[within] = table[rows[within] % BLOCK]
    return drawn
