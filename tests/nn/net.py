"""A network of all kinds of layers."""

import torch
from torch import nn

from bitkern.nn import GroupNormAct, WSConv2d


def net():
    """Return a network with four kinds of layers: plain, gain, another eps and scale, frozen."""
    torch.manual_seed(0)
    return nn.Sequential(
        WSConv2d(3, 8, 3, padding=1, bias=False),
        GroupNormAct(4, 8),
        WSConv2d(8, 8, 1, gain=True, scale=0.7),
        GroupNormAct(2, 8, act="silu"),
        WSConv2d(8, 8, 3, eps=1e-5, eps_outside=True, unbiased=True, scale=0.3),
        WSConv2d(8, 8, 1).requires_grad_(False),
        WSConv2d(8, 4, 1),
    )
