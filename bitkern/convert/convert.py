"""Models from elsewhere: their layers run on these kernels, in place.

``convert`` assigns to ``module.__class__`` a subclass of the module's class that computes the same
with the kernels. Everything else of the module stays what it is: parameters and their names, hooks,
buffers, modules inside, flags, the attributes that its library reads, and the references to it that
hooks, wrappers and users hold. A new module in its place would keep the parameters alone.
"""

import importlib
import math
import sys
from collections import Counter
from itertools import groupby, pairwise
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import nn

from bitkern import ops
from bitkern.backend import explain
from bitkern.nn import GroupNormAct, WSConv2d, fused_act, watched

ACTS = {nn.ReLU: "relu", nn.SiLU: "silu"}

# bitkern.peers.<library> is of use where this module of the library is in use.
_LIBRARIES = {"timm": "timm.layers", "transformers": "transformers.models.bit.modeling_bit"}


class Sequential(nn.Sequential):
    """``nn.Sequential`` that computes a plain GroupNorm and the ReLU or SiLU after it as one."""

    def forward(self, input):
        modules = list(self)
        while modules:
            module, *modules = modules
            act = ACTS.get(type(modules[0])) if modules and fused_act(module) == "none" else None
            if act is None or watched(modules[0]):
                input = module(input)
            else:
                modules = modules[1:]
                norm = module.num_groups, module.weight, module.bias, module.eps
                input = ops.group_norm_act(input, *norm, act)
        return input


def peers(kind):
    """``LAYERS`` or ``BLOCKS`` of the libraries in use: their classes -> the ones taken instead."""
    classes = {}
    for name, marker in _LIBRARIES.items():
        if marker in sys.modules:
            classes |= getattr(importlib.import_module(f"bitkern.peers.{name}"), kind)
    return classes


def ours(module):
    """Whether the class of a module is one of this package, and no subclass of it."""
    return type(module).__module__.split(".")[0] == "bitkern"


def _fused_pairs(sequential):
    """The norms in a sequential container that come right before an activation, and those."""
    pairs = pairwise(sequential)
    return [(a, b) for a, b in pairs if fused_act(a) == "none" and type(b) in ACTS]


def convert(module, ws=False):
    """Run the layers of timm, transformers and PyTorch in ``module`` on the kernels, in place.

    Converted are timm's ``StdConv2d``, ``ScaledStdConv2d`` (with ``Same`` or without),
    ``GroupNormAct``, ``GroupNorm1Act``, ``GroupNorm`` and ``GroupNorm1``, transformers'
    ``WeightStandardizedConv2d`` and ``BitGroupNormActivation``, ``nn.GroupNorm``, the latter with
    the ReLU or SiLU behind it where an ``nn.Sequential`` shows it; in pre-activation (BiT) models
    of both libraries also the blocks, which keep less for backward, and in whole ones the weights
    are standardized in one launch. Parameters and ``state_dict`` keys, optimizer state, hooks,
    modes, dtypes and devices are left alone. Subclasses are not converted: what they compute is
    their own. :func:`bitkern.explain` of the module tells what was converted, what not, and why.

    Results differ from the peer's by rounding alone, except that under autocast a norm keeps its
    input's dtype, where PyTorch returns float32.

    Args:
        module: any ``nn.Module``, on any device, trained or not, in either mode.
        ws: first turn ``nn.BatchNorm2d`` into GroupNorm (of gcd(32, channels) groups, with the
            same weight and bias) and ``nn.Conv2d`` into :class:`bitkern.nn.WSConv2d`, where
            torch.fx or an ``nn.Sequential`` shows that batch normalization alone follows it. That
            is another network, for training; it has no running statistics.

    Returns:
        ``module``.

    Raises:
        TypeError: for what is no ``nn.Module``, or what is compiled already.
        ValueError: with ``ws``, if there is no such convolution.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"convert: expected an nn.Module, got {type(module).__name__}")
    for name, part in module.named_modules():
        compiler = _compiler(part)
        if compiler:
            where = name or "the module"
            raise TypeError(f"convert: {where} is compiled by {compiler}: convert it before that")
    if ws:
        _standardize(module)
    layers, blocks = peers("LAYERS"), peers("BLOCKS")
    layers[nn.GroupNorm] = GroupNormAct
    # Inner modules first: a block is converted for what is inside.
    for part in reversed(list(module.modules())):
        if "forward" in vars(part):  # put over that of the class, which nobody calls
            continue
        cls = layers.get(type(part))
        if type(part) is nn.GroupNorm:
            part.act = "none"
        elif type(part) is nn.Sequential and _fused_pairs(part):
            cls = Sequential
        elif type(part) in blocks and blocks[type(part)].fits(part):
            cls = blocks[type(part)]
        if cls is not None:
            part.__class__ = cls if isinstance(cls, type) else cls(part)
    return module


def _compiler(module):
    """What has compiled a module, and would not see a change of its class; else None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript"
    dynamo = sys.modules.get("torch._dynamo")
    wrapped = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    return "torch.compile" if wrapped or module._compiled_call_impl is not None else None


# Turning convolutions and batch normalization into weight standardization and GroupNorm.


def _standardize(module):
    convs = {conv for conv in _normalized(module) if conv.weight[:1].numel() > 1}
    if not convs:
        raise ValueError(
            f"convert(ws=True): neither torch.fx nor an nn.Sequential shows an nn.Conv2d of "
            f"{type(module).__name__} that nn.BatchNorm2d alone follows"
        )
    for conv in convs:
        conv.__class__ = WSConv2d
        conv.eps, conv.scale, conv.gain = 1e-10, 1.0, None
        conv.eps_outside = conv.unbiased = False
    for norm in module.modules():
        if type(norm) is nn.BatchNorm2d:
            norm.__class__ = nn.GroupNorm
            norm.num_channels = norm.num_features
            norm.num_groups = math.gcd(32, norm.num_channels)
            norm._buffers.clear()


def _normalized(module):
    """The convolutions whose result goes to batch normalization and nowhere else."""
    modes = {part: part.training for part in module.modules()}
    try:
        found = []
        for training in (True, False):  # torch.fx follows one branch of each condition
            module.train(training)
            found.append(_normalized_in(torch.fx.symbolic_trace(module)))
        return found[0] & found[1]
    except _UNTRACEABLE:
        return _normalized_in_sequentials(module)
    finally:
        for part, training in modes.items():
            part.training = training


# What Python code raises when it meets a symbolic value.
_UNTRACEABLE = torch.fx.proxy.TraceError, TypeError, ValueError, AttributeError, RuntimeError


def _normalized_in(graph):
    def is_a(node, cls):
        return node.op == "call_module" and type(graph.get_submodule(node.target)) is cls

    uses, normalized, exposed = Counter(), Counter(), set()
    for node in graph.graph.nodes:
        if is_a(node, nn.Conv2d):
            conv = graph.get_submodule(node.target)
            uses[conv] += 1
            normalized[conv] += bool(node.users) and all(
                is_a(user, nn.BatchNorm2d) for user in node.users
            )
        elif node.op == "get_attr":
            exposed.add(graph.get_submodule(node.target.rpartition(".")[0]))
    return {conv for conv, count in uses.items() if normalized[conv] == count} - exposed


def _normalized_in_sequentials(module):
    places = Counter(part for _, part in module.named_modules(remove_duplicate=False))
    sequentials = [part for part in module.modules() if type(part) is nn.Sequential]
    pairs = [pair for sequential in sequentials for pair in pairwise(sequential)]
    return {
        conv
        for conv, norm in pairs
        if (type(conv), type(norm)) == (nn.Conv2d, nn.BatchNorm2d) and places[conv] == 1
    }


# What was converted, what was left, and why.


class Row(NamedTuple):
    """One module: its name, the library and class it comes from, whether it runs on the kernels."""

    name: str
    layer: str
    converted: bool
    reason: str


class Table(tuple):
    """:class:`Row` by :class:`Row`; printed, rows that tell the same are one."""

    def __str__(self):
        tell = attrgetter("layer", "converted", "reason")
        lines = []
        for (layer, converted, reason), rows in groupby(sorted(self, key=tell), key=tell):
            names = [row.name or "(the module)" for row in rows]
            more = ", …" if len(names) > 1 else ""
            state = "converted" if converted else "left"
            lines.append(f"{len(names):4} {layer:42} {state:9}  {reason} [{names[0]}{more}]")
        return "\n".join(lines)


@explain.register
def _(module: nn.Module):
    """What of a module runs on the kernels, what does not, and why: a :class:`Table`."""
    layers, blocks = peers("LAYERS"), peers("BLOCKS")
    known = *layers, *blocks, *_PLAIN
    fused = {a for m in module.modules() if type(m) is Sequential for a, _ in _fused_pairs(m)}
    rows = []
    for name, part in module.named_modules():
        if isinstance(part, known) or type(part) in (nn.Conv2d, nn.BatchNorm2d):
            reason = _why_left(part, layers | blocks)
            library, cls = type(part).__module__.split("."), type(part).__name__
            layer = f"{library[2] if library[1:2] == ['peers'] else library[0]} {cls}"
            rows.append(Row(name, layer, reason is None, reason or _how(part, part in fused)))
    return Table(rows)


_PLAIN = nn.GroupNorm, WSConv2d, Sequential


def _how(module, fused):
    if isinstance(module, WSConv2d):
        return "weights standardized by a kernel"
    if isinstance(module, nn.GroupNorm):
        act, after = module.fusion()
        then = ", then ".join(type(m).__name__ for m in after if type(m) is not nn.Identity)
        if then:
            return f"norm by a kernel, then {then}, which it cannot apply"
        if act == "none" and not fused:
            return "norm by a kernel; no activation is known to follow"
        return "norm and activation in one kernel"
    return "norms, activations and convolutions inside as one"


def _why_left(module, classes):
    """Why a module does not run on the kernels; None if it does."""
    cls = type(module)
    if ours(module):
        return None
    if "forward" in vars(module):
        return "a forward of its own has been put over that of its class"
    if cls in classes or cls is nn.GroupNorm:
        fits = getattr(classes.get(cls), "fits", None)
        if fits is None or fits(module):
            return "bitkern.convert has not seen it"
        return "nothing converted inside that could be fused"
    if cls is nn.Conv2d:
        return "no weight standardization"
    if cls is nn.BatchNorm2d:
        return "no GroupNorm"
    base = next(base for base in cls.__mro__[1:] if base in classes or base in _PLAIN)
    return f"a subclass of {base.__name__}, which may compute something else"
