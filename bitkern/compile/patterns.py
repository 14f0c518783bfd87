"""Fusion of the norms in a graph with the nodes around them.

    (sum ->) norm (-> scale, shift) (-> activation) (-> convolutions)    one node of autograd
    norm (-> scale, shift) -> sum -> ReLU                                one kernel

A fused node stands where the norm was, or the sum before it: what changes memory later in the graph
has not changed its input yet. Where a scale is computed later it stands where that is applied, and
the end of a post-activation block where the sum was, if nothing changes the input before.
"""

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from bitkern.compile import run
from bitkern.compile.graph import (
    Convolution,
    Norm,
    Sum,
    activation_of,
    between,
    changed,
    convolution_of,
    does_nothing,
    fresh,
    modulation_of,
    norm_of,
    same_mode,
    silu_of,
    sum_of,
    value,
)
from bitkern.compile.weights import dependencies, unchanged

_MAKERS = run.norm_act_conv, run.norm_act, run.norm_add_relu, run.add_norm_act


class Chain(NamedTuple):
    """A norm and the nodes that follow it, each the only user of the one before."""

    norm: Norm
    act: str
    nodes: tuple[fx.Node, ...]  # the norm first
    modulations: tuple[dict[str, fx.Node], ...]  # scales and shifts, in their order
    place: fx.Node  # where all of it can be computed

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def name(self) -> str:
        return "modulated norm" if self.modulations else "norm"

    def affine(self, graph: fx.Graph, place: fx.Node, x: fx.Node) -> tuple[Any, ...]:
        """``run.Affine`` for a node that is inserted before ``place`` and normalizes x."""
        norm = self.norm
        weight, bias = norm.weight, norm.bias
        with graph.inserting_before(place):
            for each in self.modulations:
                given = x, (weight, bias), each.get("scale"), each.get("shift")
                both = graph.call_function(run.modulated, given)
                weight, bias = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
        return norm.num_groups, weight, bias, norm.eps, self.act


def fuse(
    graph: fx.Graph, parameters: set[fx.Node]
) -> tuple[dict[fx.Node, str], dict[fx.Node, str]]:
    """Fuse the norms of a graph; returns how each was fused, and why some were not."""
    fused: dict[fx.Node, str] = {}
    left: dict[fx.Node, str] = {}
    for node in list(graph.nodes):
        norm = norm_of(node)
        if norm is None:
            continue
        chain = _chain(norm)
        alone = _why(chain)
        how = _fuse_end(graph, chain) or _fuse_convs(graph, chain, parameters)
        fused[node] = how or _fuse_act(graph, chain)
        if how is None and chain.act == "none":
            left[node] = alone
    return fused, left


def _chain(norm: Norm) -> Chain:
    act: str = norm.act
    nodes = [norm.node]
    modulations: list[dict[str, fx.Node]] = []
    place = norm.node
    dtype = value(norm.x).dtype
    while True:
        last = nodes[-1]
        silu = silu_of(last) if act == "none" else None
        if silu is not None:
            following: fx.Node = silu
        elif len(last.users) == 1:
            (following,) = last.users
        else:
            break
        if not same_mode([norm.node, following]):
            break
        activation = "silu" if silu is not None else activation_of(following, last)
        modulation = modulation_of(following, last) if act == "none" else {}
        later = _place(norm, modulations, place, nodes, following, modulation)
        if later is not None:
            place = later
            modulations.append(modulation)
        elif activation is not None and act == "none":
            act = activation
        elif not does_nothing(following, last, dtype):
            break
        if silu is not None:
            nodes.append(next(user for user in last.users if user is not silu))
        nodes.append(following)
    return Chain(norm, act, tuple(nodes), tuple(modulations), place)


def _place(
    norm: Norm,
    modulations: list[dict[str, fx.Node]],
    place: fx.Node,
    own: Sequence[fx.Node],
    node: fx.Node,
    modulation: dict[str, fx.Node],
) -> fx.Node | None:
    """The node before which a norm can be computed with one more scale and shift."""
    if not modulation:
        return None
    given = [*modulation.values()]
    if all(each < place for each in given):
        return None if changed(given, _others(place, node, own)) else place
    read = _read(norm, modulations)
    return None if changed(read, _others(norm.node, node, own)) else node


def _read(norm: Norm, modulations: Iterable[dict[str, fx.Node]]) -> list[Any]:
    """Inputs of a norm and of the scales and shifts behind it."""
    given = [node for each in modulations for node in each.values()]
    return [norm.x, norm.weight, norm.bias, *given]


def _others(first: fx.Node, last: fx.Node, own: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes between two nodes of a chain that do not belong to it."""
    return [node for node in between(first, last) if node not in own]


def _fuse_act(graph: fx.Graph, chain: Chain) -> str:
    addition = _sum_before(chain)
    if addition is not None and chain.act != "none":
        affine = chain.affine(graph, addition.node, addition.first)
        with graph.inserting_before(addition.node):
            node = graph.call_function(run.add_norm_act, (addition.first, addition.second, affine))
        _replace(graph, node, addition, [chain.last])
        _erase(graph, [*reversed(chain.nodes), addition.node])
        return f"residual sum, {chain.name} and activation in one kernel"
    affine = chain.affine(graph, chain.place, chain.norm.x)
    with graph.inserting_before(chain.place):
        y = graph.call_function(run.norm_act, (chain.norm.x, affine))
    _substitute(chain.last, y)
    _erase(graph, list(reversed(chain.nodes)))
    return f"{chain.name} " + (
        "by a kernel alone" if chain.act == "none" else "and activation in one kernel"
    )


def _fuse_convs(graph: fx.Graph, chain: Chain, parameters: set[fx.Node]) -> str | None:
    shared = [user for user in chain.last.users if user.target is run.standardized_weight]
    convs = [_convolves(user, chain.last) for user in chain.last.users if user not in shared]
    known = [conv for conv in convs if conv is not None]
    if chain.act == "none" or not convs or len(known) != len(convs):
        return None
    if not same_mode([chain.norm.node, *(conv.node for conv in known)]):
        return None
    addition = _sum_before(chain)
    place = chain.place if addition is None else addition.node
    if addition is not None and not all(_movable(conv, place, parameters) for conv in known):
        addition, place = None, chain.place
    if not all(_movable(conv, place, parameters) for conv in known):
        return None
    x = chain.norm.x if addition is None else addition.first
    weights = [_moved(graph, conv.weight, place, x) for conv in known]
    biases = [_moved(graph, conv.bias, place, x) for conv in known]
    specs = [tuple(conv.conv) for conv in known if conv.conv is not None]
    calls = [(conv.name, conv.rest) for conv in known]
    rest: Any = chain.affine(graph, place, x), weights, biases, specs, calls
    outputs = [conv.node for conv in known]
    residual = None if addition is None else addition.second
    with graph.inserting_before(place):
        node = graph.call_function(run.norm_act_conv, (x, residual, *rest))
    _replace(graph, node, addition, outputs)
    summed = [] if addition is None else [addition.node]
    _erase(graph, [*outputs, *shared, *reversed(chain.nodes), *summed])
    what = f"{chain.name}, activation and convolution as one"
    return what if addition is None else f"residual sum, {what}"


def _fuse_end(graph: fx.Graph, chain: Chain) -> str | None:
    """``relu(norm + residual)``."""
    if chain.act != "none" or len(chain.last.users) != 1:
        return None
    addition = sum_of(next(iter(chain.last.users)))
    if addition is None or len(addition.node.users) != 1:
        return None
    if addition.in_place and addition.first is not chain.last:
        return None
    (relu,) = addition.node.users
    read = _read(chain.norm, chain.modulations)
    quiet = not changed(read, _others(chain.norm.node, addition.node, chain.nodes))
    if activation_of(relu, addition.node) != "relu" or not quiet:
        return None
    if not same_mode([chain.norm.node, relu]):
        return None
    residual = addition.second if addition.first is chain.last else addition.first
    affine = chain.affine(graph, addition.node, chain.norm.x)
    with graph.inserting_before(addition.node):
        y = graph.call_function(run.norm_add_relu, (chain.norm.x, residual, affine))
    _substitute(relu, y)
    _erase(graph, [relu, addition.node, *reversed(chain.nodes)])
    return f"{chain.name}, sum and ReLU in one kernel"


def _sum_before(chain: Chain) -> Sum | None:
    """The residual addition that can be computed with a norm, its first user."""
    addition = sum_of(chain.norm.x)
    if addition is None or (addition.in_place and not fresh(addition.first, _MAKERS)):
        return None
    _, *read = _read(chain.norm, chain.modulations)
    given = [p for p in read if isinstance(p, fx.Node)]
    early = all(p < addition.node for p in given)
    early = early and not changed(given, _others(addition.node, chain.last, chain.nodes))
    first = min(addition.node.users) is chain.norm.node
    return addition if early and first and same_mode([addition.node, chain.norm.node]) else None


def _replace(graph: fx.Graph, node: fx.Node, addition: Sum | None, outputs: list[fx.Node]) -> None:
    """Replace a residual addition, if any, and outputs by the results of a node."""
    for i, old in enumerate([None if addition is None else addition.node, *outputs]):
        if old is not None:
            with graph.inserting_after(node):
                _substitute(old, graph.call_function(operator.getitem, (node, i)))


def _convolves(user: fx.Node, source: fx.Node) -> Convolution | None:
    conv = convolution_of(user)
    if conv is None or conv.conv is None or conv.x is not source:
        return None
    return None if source in (conv.weight, conv.bias) else conv


def _movable(conv: Convolution, place: fx.Node, parameters: set[fx.Node]) -> bool:
    """Return whether a convolution's parameters have the same values at another place."""
    for node in (conv.weight, conv.bias):
        if not isinstance(node, fx.Node) or node.target is run.standardized_weight:
            continue
        if changed(dependencies(node), between(place, conv.node)):
            return False
        late = [n for n in dependencies(node) if not n < place]
        leaves = [n for n in dependencies(node) if n.op in ("placeholder", "get_attr")]
        known = all(leaf in parameters for leaf in leaves) and unchanged(node)
        if late and not (known and same_mode([place, *late])):
            return False
    return True


def _moved(graph: fx.Graph, node: Any, place: fx.Node, x: fx.Node) -> Any:
    if not isinstance(node, fx.Node):
        return node
    if node.target is run.standardized_weight:  # for a convolution of x
        with graph.inserting_before(place):
            moved = graph.call_function(run.standardized_weight, (*node.args[:2], x))
        moved.meta = dict(node.meta)
        return moved
    for dependency in dependencies(node):
        if not dependency < place:
            place.prepend(dependency)
    return node


def _substitute(old: fx.Node, new: fx.Node) -> None:
    new.meta = {k: v for k, v in old.meta.items() if k in ("example_value", "nn_module_stack")}
    old.replace_all_uses_with(new)


def _erase(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    for node in nodes:
        graph.erase_node(node)


def _why(chain: Chain) -> str:
    """Why nothing is fused with a norm."""
    users = list(chain.last.users)
    if len(users) != 1:
        return f"its result has {len(users)} uses"
    (user,) = users
    if user.op == "output":
        return "its result leaves the graph"
    if user.target in _MAKERS:
        return "its result is added to that of another norm"
    function = user.target if isinstance(user.target, str) else torch.typename(user.target)
    return f"{function} follows, which no kernel computes with it"
