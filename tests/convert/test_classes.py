"""Convolutions and norms of the user's own, on the kernels after a comparison."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitkern
from tests.peers import distance, gradients, relative

C = 8
X = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(3)) + 0.5


class TheirConv(nn.Conv2d):
    """Weight standardization as in many papers: Bessel's correction, eps beside the root."""

    factor = 1.0

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)
        return self.factor * F.conv2d(x, w, self.bias, self.stride, self.padding)


class TheirNorm(nn.GroupNorm):
    def forward(self, x):
        return F.silu(super().forward(x))


CONV = functools.partial(bitkern.nn.WSConv2d, eps=1e-5, eps_outside=True, unbiased=True)


def test_classes():
    made = nn.Sequential(TheirConv(3, C, 3), TheirNorm(2, C), nn.Conv2d(C, C, 1))
    peer = copy.deepcopy(made)
    norm = functools.partial(bitkern.nn.GroupNormAct, act="silu")
    bitkern.convert(made, classes={TheirConv: CONV, TheirNorm: norm})
    assert type(made[0]) is bitkern.nn.WSConv2d and type(made[1]) is bitkern.nn.GroupNormAct
    (y, grads), (expected, expected_grads) = gradients(made, X), gradients(peer, X)
    assert relative(y, expected) < 1e-5 and distance(grads, expected_grads) < 1e-5


def test_classes_that_compute_something_else():
    made = nn.Sequential(TheirConv(3, C, 3), TheirNorm(2, C))
    far = r"does not compute what 0 \(TheirConv\) does: \d"
    with pytest.raises(ValueError, match=rf"{far}.*torch\.compile"):
        bitkern.convert(made, classes={TheirConv: bitkern.nn.WSConv2d})
    with pytest.raises(ValueError, match=r"does not compute what 1 \(TheirNorm\) does"):
        bitkern.convert(made, classes={TheirNorm: bitkern.nn.GroupNormAct})
    made[0].factor = 1.1
    with pytest.raises(ValueError, match=far):
        bitkern.convert(made, classes={TheirConv: CONV})
    assert type(made[0]) is TheirConv and type(made[1]) is TheirNorm


def test_classes_bad_input():
    made = nn.Sequential(TheirConv(3, C, 3))
    for classes, error, match in (
        ({TheirNorm: bitkern.nn.GroupNormAct}, ValueError, "no TheirNorm in Sequential"),
        ({TheirConv: nn.Conv2d}, TypeError, "expected WSConv2d or GroupNormAct"),
        ({TheirConv: functools.partial(bitkern.nn.WSConv2d, bias=True)}, TypeError, "keywords"),
        ({nn.Linear: bitkern.nn.WSConv2d}, TypeError, r"a subclass of nn\.Conv2d"),
        ({TheirConv: bitkern.nn.GroupNormAct}, TypeError, r"a subclass of nn\.GroupNorm"),
    ):
        with pytest.raises(error, match=f"^classes: .*{match}"):
            bitkern.convert(made, classes=classes)


def test_classes_without_gradients_and_on_the_meta_device():
    with torch.no_grad():
        made = bitkern.convert(nn.Sequential(TheirConv(3, C, 3)), classes={TheirConv: CONV})
    assert type(made[0]) is bitkern.nn.WSConv2d
    with torch.device("meta"):
        made = bitkern.convert(nn.Sequential(TheirConv(3, C, 3)), classes={TheirConv: CONV})
    assert made[0].weight.is_meta
