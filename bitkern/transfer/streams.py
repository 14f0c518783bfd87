"""Randomness: every use of it is a stream of its own, a function of its key alone."""

import numpy as np

# The first word of every key, so that no two uses share a stream.
ORDER, AUGMENT, MIXUP, FEW_SHOT, HOLDOUT, LETTERS, BOOTSTRAP = range(7)


def random_stream(use: int, *key: int) -> np.random.Generator:
    """The generator of one use of randomness: a function of its key (seed, step, …) alone."""
    return np.random.default_rng((use, *key))
