"""Unbalanced classes: sample rare ones as often as frequent ones, or weight the loss by class.

BiT's recipe does neither.
"""

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    Labels: TypeAlias = npt.NDArray[np.int64] | npt.NDArray[np.bool_] | csr_array
Weights = npt.NDArray[np.float64]


def sample_weights(labels: "Labels") -> Weights:
    """Compute sampling weights for N examples: one over the number of examples of the class.

    ``labels`` int64 (N,), or bool (N, classes), also as a ``csr_array``: an image then counts as
    one of its rarest label, and images without labels are a class of their own.
    """
    if labels.ndim == 1:
        counts: npt.NDArray[np.intp] = np.bincount(labels)
        return 1 / counts[labels]
    from scipy.sparse import csr_array

    rarity = 1 / np.maximum(labels.sum(0), 1)
    unlabelled = labels.sum(1) == 0
    weights: Weights = csr_array(labels).multiply(rarity).tocsr().max(axis=1).toarray()
    weights[unlabelled] = 1 / max(unlabelled.sum(), 1)
    return weights


def class_weights(labels: "Labels", num_classes: int) -> Weights:
    """Compute the weights of classes in the loss (num_classes,); 1 for a class without examples.

    For single labels N / (classes that occur * examples of the class), whose mean over the images
    is 1. For multi-label sets the weight of a class's positives, negatives / positives.
    """
    if labels.ndim == 1:
        counts = np.bincount(labels, minlength=num_classes)
        balanced = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    else:
        counts = labels.sum(0)
        balanced = (labels.shape[0] - counts) / np.maximum(counts, 1)
    return np.where(counts > 0, balanced, 1.0)
