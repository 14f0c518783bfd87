"""Logits and labels for the tests of the report."""

import torch

from bitkern.transfer import ImageSet
from tests.transfer.images import picture


def logits(labels, classes, seed=0):
    """Random ones that tend to the label."""
    outputs = torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(seed))
    outputs[torch.arange(len(labels)), torch.from_numpy(labels)] += 1.5
    return outputs


def arrays(labels, classes):
    return ImageSet([picture(0, 0)] * len(labels), labels, tuple(classes))
