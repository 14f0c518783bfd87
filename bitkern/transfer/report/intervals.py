"""95 % confidence intervals: what to expect on more images like these."""

import math

import numpy as np

from bitkern.transfer.report.outcome import Outcome
from bitkern.transfer.streams import BOOTSTRAP, random_stream

Interval = tuple[float, float]
RESAMPLES = 500
NORMAL = 1.959964  # the standard deviations that hold 95 % of a normal distribution


def wilson(share: float, count: int) -> Interval:
    """Wilson's interval of a share among ``count`` independent images: never empty, in [0, 1]."""
    spread = NORMAL**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrapped(
    outcome: Outcome, balanced_accuracy: float | None, macro_f1: float | None
) -> dict[str, Interval | None]:
    """The intervals of the two values; None where the resamples are all the same.

    The standard error is that of 500 resamples of the images. It goes to both sides of the value:
    percentiles of the resamples would not do, for rare classes shift all of them to one side.
    """
    from scipy.sparse import csr_array, hstack

    truth, predicted = csr_array(outcome.truth), csr_array(outcome.predicted)
    counted = hstack([truth * predicted, truth, predicted], format="csr", dtype=np.float64)
    count = len(outcome.rank)
    means = []
    for resample in range(RESAMPLES):
        drawn = random_stream(BOOTSTRAP, resample).integers(count, size=count)
        times = np.bincount(drawn, minlength=count).astype(np.float64)
        found, support, named = np.split(times @ counted, 3)
        occurs = support > 0
        if occurs.any():  # not so if an image may be without labels
            found, support, named = found[occurs], support[occurs], named[occurs]
            means.append(((found / support).mean(), (2 * found / (support + named)).mean()))
    errors = NORMAL * np.std(means or [(0.0, 0.0)], axis=0)
    values = {"balanced_accuracy": balanced_accuracy, "macro_f1": macro_f1}
    return {
        name: (max(0.0, value - error), min(1.0, value + error))
        if value is not None and error
        else None
        for (name, value), error in zip(values.items(), errors.tolist(), strict=True)
    }
