"""Conversion of batch normalization to weight standardization and GroupNorm."""

import math
from collections import Counter
from itertools import pairwise

import torch
from torch import nn
from torch.fx import GraphModule, Node

from bitkern import _torch
from bitkern.nn import WSConv2d
from bitkern.variant import Variant


def standardize(module: nn.Module) -> None:
    """Convert in place the convolutions that batch normalization alone follows.

    Raises ValueError if there is no such convolution.
    """
    convs = {conv for conv in _normalized(module) if conv.weight[:1].numel() > 1}
    if not convs:
        raise ValueError(
            f"convert(ws=True): neither torch.fx nor an nn.Sequential shows an nn.Conv2d of "
            f"{type(module).__name__} that nn.BatchNorm2d alone follows"
        )
    for conv in convs:
        conv.__class__ = WSConv2d
        vars(conv).update(Variant()._asdict(), scale=1.0, gain=None)
    for norm in module.modules():
        if type(norm) is nn.BatchNorm2d:
            channels = norm.num_features
            _torch.drop_buffers(norm)
            norm.__class__ = nn.GroupNorm  # type: ignore[assignment]
            vars(norm).update(num_channels=channels, num_groups=math.gcd(32, channels))


def _normalized(module: nn.Module) -> set[nn.Conv2d]:
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


# Errors of Python code that is given a symbolic value.
_UNTRACEABLE = torch.fx.proxy.TraceError, TypeError, ValueError, AttributeError, RuntimeError


def _normalized_in(graph: GraphModule) -> set[nn.Conv2d]:
    def module_of(node: Node) -> nn.Module | None:
        return graph.get_submodule(str(node.target)) if node.op == "call_module" else None

    uses: Counter[nn.Conv2d] = Counter()
    normalized: Counter[nn.Conv2d] = Counter()
    exposed: set[nn.Module] = set()
    for node in graph.graph.nodes:
        conv = module_of(node)
        if type(conv) is nn.Conv2d:
            uses[conv] += 1
            normalized[conv] += bool(node.users) and all(
                type(module_of(user)) is nn.BatchNorm2d for user in node.users
            )
        elif node.op == "get_attr":
            exposed.add(graph.get_submodule(str(node.target).rpartition(".")[0]))
    return {conv for conv, count in uses.items() if normalized[conv] == count} - exposed


def _normalized_in_sequentials(module: nn.Module) -> set[nn.Conv2d]:
    places = Counter(part for _, part in module.named_modules(remove_duplicate=False))
    sequentials = [part for part in module.modules() if type(part) is nn.Sequential]
    pairs = [pair for sequential in sequentials for pair in pairwise(sequential)]
    return {
        conv
        for conv, norm in pairs
        if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and places[conv] == 1
    }
