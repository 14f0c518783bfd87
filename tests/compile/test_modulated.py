"""Norms with a scale and shift for each sample, as networks of many kinds write them."""

import copy

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import bitkern
from tests.compile.nodes import fused
from tests.peers import distance, gradients, randomize, relative

TIMES = 12


class Block(nn.Module):
    """A residual block whose second norm is modulated; a function says how."""

    def __init__(self, modulate, dimensions=2, channels=16, affine=True, instance=False):
        super().__init__()
        conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dimensions - 1]
        instance_norm = [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d][dimensions - 1]
        self.norm1 = nn.GroupNorm(4, channels)
        self.norm2 = (
            instance_norm(channels) if instance else nn.GroupNorm(4, channels, affine=affine)
        )
        self.conv1, self.conv2 = (conv(channels, channels, 3, padding=1) for _ in range(2))
        self.times = nn.Linear(TIMES, 2 * channels)
        self.dropout = nn.Dropout(0.0)
        self.modulate = modulate

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x)))
        # As all but diffusers have it: the embedding is computed when it is needed.
        scale, shift = self.times(F.silu(t)).chunk(2, dim=1)
        where = (..., *[None] * (x.ndim - 2))
        h = self.modulate(self.norm2, h, scale[where], shift[where])
        return x + self.conv2(self.dropout(F.silu(h)))


def adm(norm, h, scale, shift):
    return norm(h) * (1 + scale) + shift


def edm(norm, h, scale, shift):
    return torch.addcmul(shift, norm(h), scale + 1)


def palette(norm, h, scale, shift):
    return (1 + scale) * norm(h) + shift


def shift_alone(norm, h, scale, shift):
    return shift + norm(h)


def scale_alone(norm, h, scale, shift):
    return torch.mul(norm(h), scale)


def in_place(norm, h, scale, shift):
    h = norm(h)
    h *= scale + 1
    return h.add_(shift)


def twice(norm, h, scale, shift):
    return (norm(h) * scale + shift) * (1 + shift[:, :1]) + scale[:1]


def of_the_map(norm, h, scale, shift):
    where = tuple(range(2, h.ndim))
    return norm(h) * h.mean(where, keepdim=True) + shift


class AdaptiveNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = diffusers.models.normalization.AdaGroupNorm(TIMES, 16, 4)
        self.conv = nn.Conv2d(16, 16, 3)

    def forward(self, x, t):
        return self.conv(F.relu(self.norm(x, t)))


def resnet_block():
    sizes = {"in_channels": 16, "out_channels": 24, "groups": 4, "groups_out": 8}
    return ResnetBlock2D(**sizes, temb_channels=TIMES, time_embedding_norm="scale_shift")


# The network, the spatial dimensions of its maps, its norms.
NETWORKS = {
    "ADM": (lambda: Block(adm), 2, 2),
    "ADM 1d": (lambda: Block(adm, 1), 1, 2),
    "ADM 3d": (lambda: Block(adm, 3), 3, 2),
    "EDM": (lambda: Block(edm), 2, 2),
    "EDM without affine": (lambda: Block(edm, affine=False), 2, 2),
    "Palette": (lambda: Block(palette), 2, 2),
    "AdaIN": (lambda: Block(palette, instance=True), 2, 2),
    "shift": (lambda: Block(shift_alone), 2, 2),
    "scale": (lambda: Block(scale_alone), 2, 2),
    "in place": (lambda: Block(in_place), 2, 2),
    "twice": (lambda: Block(twice), 2, 2),
    "of the map": (lambda: Block(of_the_map), 2, 2),
    "AdaGroupNorm": (AdaptiveNorm, 2, 1),
    "diffusers": (resnet_block, 2, 2),
}


CASES = [(name, 3) for name in NETWORKS] + [("ADM", 1), ("AdaIN", 1)]


@pytest.mark.parametrize("name, batch", CASES)
def test_modulated_norms_run_as_one_with_their_convolutions(name, batch):
    make, dimensions, norms = NETWORKS[name]
    model = randomize(make()).double()
    peer = copy.deepcopy(model)
    compiled = torch.compile(model, backend="bitkern", fullgraph=True)
    x = torch.randn(batch, 16, *(7, 5, 3)[:dimensions], dtype=torch.float64)
    t = torch.randn(batch, TIMES, dtype=torch.float64, requires_grad=True)
    assert fused(compiled, x, t) == (norms, 0)
    result, grads = gradients(model, x, forward=lambda x: compiled(x, t))
    (dt,) = torch.autograd.grad(compiled(x, t).square().sum(), t)
    expected, expected_grads = gradients(peer, x, forward=lambda x: peer(x, t))
    (expected_dt,) = torch.autograd.grad(peer(x, t).square().sum(), t)
    assert relative(result, expected) < 1e-12
    assert distance(grads, expected_grads) < 1e-12
    assert relative(dt, expected_dt) < 1e-12
    reasons = [row.reason for row in bitkern.explain(compiled) if row.layer == "norm"]
    assert sum("modulated" in reason for reason in reasons) == 1
