"""Random networks, compiled and compared with themselves in float64: results and gradients.

``python -m tests.compile.random_networks SEED`` replays one case, ``FIRST LAST`` runs a range.
"""

import copy
import operator
import random
import sys

import timm.layers
import torch
import torch.nn.functional as F
from torch import nn

PIXELS = 5
TOLERANCE = 1e-12


class VarMeanConv(nn.Conv2d):
    """Weight standardization as big_transfer writes it."""

    def forward(self, x):
        w = self.weight
        v, m = torch.var_mean(w, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return F.conv2d(x, (w - m) / torch.sqrt(v + 1e-10), self.bias, self.stride, self.padding)


class OuterEpsConv(nn.Conv2d):
    """Weight standardization as mmcv writes it, with a gain."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        flat = self.weight.flatten(1)
        mean = flat.mean(dim=1, keepdim=True).view(-1, 1, 1, 1)
        std = flat.std(dim=1, keepdim=True).view(-1, 1, 1, 1)
        weight = self.gain * ((self.weight - mean) / (std + 1e-5))
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class ScaledConv(nn.Conv2d):
    """Convolution whose weight is computed from parameters, but not standardized."""

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.weight.abs().mean(), self.bias)


class InstanceNorm(nn.InstanceNorm2d):
    """InstanceNorm that is a group norm in eager mode: PyTorch's loses digits in channels_last."""

    by_groups = False

    def forward(self, x):
        if self.by_groups:
            return F.group_norm(x, self.num_features, self.weight, self.bias, self.eps)
        return super().forward(x)


class FunctionalNorm(nn.Module):
    def __init__(self, groups, channels):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.randn(channels))

    def forward(self, x):
        return F.group_norm(x, self.groups, self.weight)


def mean(x):
    return x.mean((2, 3), keepdim=True)


CONVS = {
    "conv": lambda i, o: nn.Conv2d(i, o, 3, padding=1),
    "1x1": lambda i, o: nn.Conv2d(i, o, 1, bias=False),
    "same": lambda i, o: nn.Conv2d(i, o, 3, padding="same", dilation=2),
    "groups": lambda i, o: nn.Conv2d(i, o, 3, padding=1, groups=2),
    "transposed": lambda i, o: nn.ConvTranspose2d(i, o, 3, padding=1),
    "timm": lambda i, o: timm.layers.StdConv2d(i, o, 3, padding=1),
    "nfnet": lambda i, o: timm.layers.ScaledStdConv2d(i, o, 1, padding=0),
    "var_mean": lambda i, o: VarMeanConv(i, o, 1),
    "outer": lambda i, o: OuterEpsConv(i, o, 3, padding=1),
    "scaled": lambda i, o: ScaledConv(i, o, 1),
    "circular": lambda i, o: nn.Conv2d(i, o, 3, padding=1, padding_mode="circular"),
}
NORMS = {
    "group": lambda c: nn.GroupNorm(2, c),
    "no affine": lambda c: nn.GroupNorm(1, c, affine=False),
    "instance": lambda c: InstanceNorm(c, affine=True),
    "functional": lambda c: FunctionalNorm(4, c),
    "running": lambda c: nn.InstanceNorm2d(c, track_running_stats=True),
    "batch": lambda c: nn.BatchNorm2d(c),
    "timm": lambda c: timm.layers.GroupNormAct(c, 2, act_layer=nn.SiLU),
}
ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "relu method": lambda x: x.relu(),
    "relu_ method": lambda x: x.relu_(),
    "silu": F.silu,
    "silu in place": nn.SiLU(inplace=True),
    "silu written": lambda x: x * torch.sigmoid(x),
    "leaky": nn.LeakyReLU(0.01),
    "steep leaky": nn.LeakyReLU(0.2),
    "gelu": nn.GELU(),
    "tanh gelu": nn.GELU("tanh"),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(),
    "tanh": torch.tanh,
    "dropout": nn.Dropout(0.0),
    "dropout in eval": lambda x: F.dropout(x, 0.5, training=False),
    "identity": nn.Identity(),
}
SUMS = {
    "add": operator.add,
    "torch.add": torch.add,
    "iadd": operator.iadd,
    "add_": lambda a, b: a.add_(b),
    "alpha": lambda a, b: torch.add(a, b, alpha=2),
    "modulate": lambda a, b: a * (1 + mean(b)) + b[:, :, :1, :1],
    "addcmul": lambda a, b: torch.addcmul(mean(b), a, mean(b) + 1),
    "scale in place": lambda a, b: a.mul_(mean(b)),
    "shift": lambda a, b: mean(b[:1]) + a,
}
OTHERS = {
    "mul_": lambda x: x.mul_(0.5),
    "add_ 1": lambda x: x.add_(1.0),
    "half in place": lambda x: (x[:, : x.shape[1] // 2].mul_(2), x)[1],
    "view": lambda x: x.view(x.shape),
    "flip": lambda x: x.flip(3),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "clone": lambda x: x.clone(),
    "double": lambda x: x.double(),
}


class Network(nn.Module):
    """A sequence of steps, each of which makes a new map from earlier ones."""

    def __init__(self, seed):
        super().__init__()
        choose = self.choose = random.Random(seed)
        torch.manual_seed(seed)
        self.parts = nn.ModuleList()
        channels, self.steps = [4], []
        for _ in range(choose.randint(3, 14)):
            kind = choose.choices(("norm", "act", "conv", "sum", "other"), (5, 5, 5, 3, 1))[0]
            # Mostly what was made last, which is how networks are.
            i = len(channels) - 1 if choose.random() < 0.75 else choose.randrange(len(channels))
            context = choose.choices((None, "autocast", "no_grad"), (20, 1, 1))[0]
            made = channels[i]
            if kind == "sum":
                others = [j for j, c in enumerate(channels) if c == channels[i] and j != i]
                if not others:
                    continue
                what = choose.choice([*SUMS]), choose.choice(others)
            elif kind in ("norm", "conv"):
                made = channels[i] if kind == "norm" else choose.choice((4, 8))
                what = self._part(kind, channels[i], made)
            else:
                what = choose.choice([*(ACTIVATIONS if kind == "act" else OTHERS)]), None
            self.steps.append((kind, i, what, context))
            channels.append(made)
        self.returned = [choose.randrange(len(channels)) for _ in range(choose.randint(0, 2))]
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape) * 0.5 + 0.1)

    def _part(self, kind, i, o):
        shared = [
            (name, index)
            for k, _, (name, index), _ in self.steps
            if k == kind and self.channels_of(index) == (i, o)
        ]
        if shared and self.choose.random() < 0.15:
            return self.choose.choice(shared)
        name = self.choose.choice([*(NORMS if kind == "norm" else CONVS)])
        part = NORMS[name](i) if kind == "norm" else CONVS[name](i, o)
        part.sizes = i, o
        self.parts.append(part)
        return name, len(self.parts) - 1

    def channels_of(self, index):
        return self.parts[index].sizes

    def step(self, maps, kind, i, what, index):
        x = maps[i]
        if kind == "sum":
            return SUMS[what](x, maps[index])
        if kind in ("norm", "conv"):
            return self.parts[index](x)
        return (ACTIVATIONS if kind == "act" else OTHERS)[what](x)

    def forward(self, x):
        maps = [x]
        for kind, i, (what, index), context in self.steps:
            if context == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    made = self.step(maps, kind, i, what, index)
            elif context == "no_grad":
                with torch.no_grad():
                    made = self.step(maps, kind, i, what, index)
            else:
                made = self.step(maps, kind, i, what, index)
            maps.append(made)
        return [maps[-1], *(maps[i] for i in self.returned)]


def outcome(call, network, x, grad):
    """Return results, gradients and buffers, or the error."""
    x = x.clone().requires_grad_(grad)
    network.zero_grad()
    with torch.set_grad_enabled(grad):
        results = call(x * 1.0)
    found = [r.detach().clone() for r in results]
    used = [r for r in results if r.requires_grad]
    if used:
        weights = [torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view_as(r) for r in used]
        leaves = [x, *network.parameters()]
        found += torch.autograd.grad(used, leaves, weights, allow_unused=True)
    return [*found, *(buffer.clone() for buffer in network.buffers())]


def check(seed, backend="bitkern"):
    """Compare a network with itself compiled; return False if eager code fails already."""
    torch._dynamo.reset()
    network = Network(seed).double()
    choose = random.Random(-seed)
    network.train(choose.random() < 0.5)
    grad = choose.random() < 0.8
    twin = copy.deepcopy(network)
    for module in network.modules():
        module.by_groups = isinstance(module, InstanceNorm)
    x = torch.randn(2, 4, PIXELS, PIXELS, dtype=torch.float64)
    if choose.random() < 0.5:
        x = x.contiguous(memory_format=torch.channels_last)
    inputs = [x]
    if choose.random() < 0.2:
        inputs.append(torch.randn(3, 4, PIXELS + 1, PIXELS, dtype=torch.float64))  # another size
    try:
        cases = [(case, outcome(network, network, case, grad)) for case in inputs]
    except RuntimeError:  # a map that backward needs was changed in place
        return False
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    for x, expected in cases:
        got = outcome(compiled, twin, x, grad)
        assert len(got) == len(expected)
        size = max([1.0, *(float(t.double().norm()) for t in expected if t is not None)])
        for ours, theirs in zip(got, expected, strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
                assert float((ours.double() - theirs.double()).norm()) <= TOLERANCE * size
    return True


def main(first, last=None):
    run = 0
    for seed in range(int(first), int(last or int(first) + 1)):
        try:
            run += check(seed)
        except Exception as error:
            print(f"python -m tests.compile.random_networks {seed}: {type(error).__name__} {error}")
            if last is None:
                print(*Network(seed).steps, sep="\n")
                raise
    print(f"{run} compared")


if __name__ == "__main__":
    main(*sys.argv[1:])
