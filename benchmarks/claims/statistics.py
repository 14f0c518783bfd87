"""Means over seeds, paired differences, and what they say of a claim."""

import math
from typing import NamedTuple

from scipy.stats import t

LEVEL = 0.95
SEEN, NOT_SEEN, OPPOSITE = "seen", "not seen", "opposite seen"
UNCERTAIN = "too uncertain to say"


class Estimate(NamedTuple):
    """A mean over seeds, its standard error, and the t interval of 95 %; None of a single seed."""

    seeds: int
    mean: float
    error: float | None
    low: float | None
    high: float | None

    @property
    def least(self):
        """The half-width of the interval: the smallest effect that could be told from none."""
        return None if self.error is None else (self.high - self.low) / 2


def estimate(values):
    """The estimate from one value of each seed; None without any."""
    count = len(values)
    if not count:
        return None
    mean = sum(values) / count
    if count == 1:
        return Estimate(count, mean, None, None, None)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1) / count)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return Estimate(count, mean, error, mean - half, mean + half)


def verdict(estimate, smallest, no_loss=False):
    """The verdict of an estimate on an effect of which ``smallest`` is the smallest of interest.

    A gain is seen if it is of interest and its interval lies above 0, and not seen if the interval
    excludes a gain of interest; the opposite is seen if the same is true of a loss. With
    ``no_loss`` what is claimed is that there is no loss of interest: seen if the interval excludes
    one, the opposite if the interval holds nothing else.
    """
    if estimate is None or estimate.error is None:
        return UNCERTAIN
    _, mean, _, low, high = estimate
    if no_loss:
        return SEEN if low > -smallest else OPPOSITE if high < -smallest else UNCERTAIN
    if low > 0 and mean >= smallest:
        return SEEN
    if high < 0 and mean <= -smallest:
        return OPPOSITE
    return NOT_SEEN if high < smallest else UNCERTAIN
