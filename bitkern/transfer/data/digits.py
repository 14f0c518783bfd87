"""scikit-learn's handwritten digits."""

import numpy as np

from bitkern.packages import require
from bitkern.transfer.data.images import ImageSet, NoSplitError
from bitkern.transfer.data.subsets import hold_out


def digits(split: str) -> ImageSet:
    """scikit-learn's 1797 handwritten digits, 8x8 grey: a fixed half of each class is ``"test"``.

    The other half is ``"train"``. Every writer may be in both.
    """
    require("sklearn")
    from sklearn.datasets import load_digits

    if split == "validation":
        raise NoSplitError("digits: has no validation images: expected holdout")
    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    full_set = ImageSet(list(images), data.target.astype(np.int64), tuple("0123456789"))
    train_set, test_set = hold_out(full_set, 0.5, seed=0)
    return {"train": train_set, "test": test_set}[split]
