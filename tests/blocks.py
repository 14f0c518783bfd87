"""Blocks of classes that no library knows, and what they are compared by."""

import copy

import torch
from torch import nn

import bitkern
from tests.helpers import assert_accurate

C = 8


class Block(nn.Module):
    """Norms, a shared activation in place, convolutions, a residual."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, C), nn.GroupNorm(4, C)
        self.act = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(C, C, 3, padding="same", groups=2)
        self.conv2 = nn.Conv2d(C, C, 3, padding=2, dilation=2, bias=False)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        y = self.conv1(self.act(self.norm1(x)))
        return x + self.conv2(self.drop(self.act(self.norm2(y))))


def block(forward=None, cls=Block, **parts):
    """A block with random affine parameters, of a class of its own with this forward."""
    torch.manual_seed(0)
    made = cls() if forward is None else type("Own", (cls,), {"forward": forward})()
    for name, part in parts.items():
        setattr(made, name, part)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def nodes(y):
    """The names of the nodes of an autograd graph."""
    found, queue = [], [y.grad_fn]
    seen = set()
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.append(node.name())
            queue += [n for n, _ in node.next_functions]
    return found


def fused(module, *args, **kwargs):
    """How many norms run with activation and convolutions as one, and how many with the former."""
    names = nodes(module(*args, **kwargs))
    return (
        names.count("GroupNormActConvFunctionBackward"),
        names.count("GroupNormActFunctionBackward"),
    )


def images(*shape, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (2, C, 7, 5), generator=generator) + 0.5


def run(module, *inputs):
    leaves = [i.detach().requires_grad_() if isinstance(i, torch.Tensor) else i for i in inputs]
    y = module(*leaves)
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(y.shape, generator=generator).to(y)
    wanted = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)] + list(module.parameters())
    return [y.detach(), *torch.autograd.grad(y, wanted, weights, allow_unused=True)]


def assert_same(module, peer, *inputs):
    """No further from float64 than twice the peer, results and gradients."""
    exact = copy.deepcopy(peer).double()
    doubles = [i.double() if isinstance(i, torch.Tensor) else i for i in inputs]
    every = zip(run(module, *inputs), run(peer, *inputs), run(exact, *doubles), strict=True)
    for ours, theirs, truth in every:
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_accurate(ours, theirs, truth)


def converted(made):
    """The block on the kernels, and what it was."""
    peer = copy.deepcopy(made)
    keys, parts = list(made.state_dict()), list(made.modules())
    assert bitkern.convert(made) is made
    assert list(made.state_dict()) == keys
    assert all(a is b for a, b in zip(made.modules(), parts, strict=True))
    return made, peer
