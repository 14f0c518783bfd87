"""Norms, activations and convolutions in a graph of torch.fx, and what they become."""

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from bitkern.nn.activations import act_of, may_be_idle
from bitkern.nn.fused import (
    add_norm_act_convs,
    fused_act,
    fusible_conv,
    norm_act,
    norm_act_convs,
    norm_add_relu,
)
from bitkern.reference import Activation

FUNCTIONS: dict[Any, Activation] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.silu: "silu",
    F.leaky_relu: "leaky_relu",
    F.gelu: "gelu",
    F.mish: "mish",
    F.hardswish: "hardswish",
}
METHODS: dict[Any, Activation] = {"relu": "relu", "relu_": "relu"}


class Chain(NamedTuple):
    """A norm and what follows it one after the other, each the only use of the one before."""

    norm: fx.Node
    after: tuple[fx.Node | Activation, ...]
    act: Activation
    last: fx.Node
    nodes: tuple[fx.Node, ...]


class Sum(NamedTuple):
    """The node of a sum, its operands, and whether it changes the first of them."""

    node: fx.Node
    first: fx.Node
    second: fx.Node
    in_place: bool


class End(NamedTuple):
    """The sum with a residual and its ReLU behind a norm."""

    total: Sum
    residual: fx.Node
    relu: fx.Node
    act: fx.Node | Activation


AS_ONE = "norm, activation and convolution as one"
WITH_SUM = "residual sum, norm, activation and convolution as one"


class Found(NamedTuple):
    """What has become of a graph's norms, by the path of each; whether the graph returns one's;
    the paths of all that is not called any more, or at another time."""

    fused: dict[str, str]
    left: dict[str, str]
    escape: bool
    involved: set[str]


def fuse(graph: fx.Graph, block: nn.Module) -> Found:
    """Put fused nodes into a graph of ``block``, in the place of what they compute."""
    fused: dict[str, str] = {}
    left: dict[str, str] = {}
    escape = False
    called = _called(graph)
    modules = dict(block.named_modules(remove_duplicate=False))
    for node in list(graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if norm is None or fused_act(norm) is None:
            continue
        path = str(node.target)
        chain = _chain(node, modules) if _alone(node) else None
        end = None if chain is None else _end(chain, modules)
        if chain is not None and end is not None:
            _fuse_end(graph, chain, end)
            fused[path] = "norm, sum and ReLU in one kernel"
            continue
        if chain is None or chain.act == "none":
            left[path] = _why(node, chain, block)
            escape |= chain is not None and [u.op for u in chain.last.users] == ["output"]
            continue
        convs = [user for user in chain.last.users if _convolves(user, chain.last, modules)]
        if convs and len(convs) == len(chain.last.users):
            total = _sum_before(graph, chain, modules)
            if total is None:
                _fuse_convs(graph, chain, convs)
            else:
                _fuse_sum(graph, chain, convs, total)
            fused[path] = AS_ONE if total is None else WITH_SUM
        elif chain.nodes:
            _fuse_act(graph, chain)
            fused[path] = "norm and activation in one kernel"
        else:  # a norm with an activation of its own
            left[path] = "norm and activation in one kernel"
    graph.lint()
    return Found(fused, left, escape, called - _called(graph) | _makers(graph))


def _called(graph: fx.Graph) -> set[str]:
    """The paths of the modules that a graph calls."""
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def _makers(graph: fx.Graph) -> set[str]:
    """The paths of the modules that fused nodes hold, and of those whose results go into them."""
    fused = norm_act, norm_act_convs, add_norm_act_convs, norm_add_relu
    nodes = (node for node in graph.nodes if node.op == "call_function" and node.target in fused)
    given = (n for node in nodes for n in node.all_input_nodes)
    return {str(n.target) for n in given if n.op in ("call_module", "get_attr")}


def _alone(node: fx.Node) -> bool:
    """Whether a module is called with one symbol and nothing else."""
    return len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs


def _chain(norm: fx.Node, modules: dict[str, nn.Module]) -> Chain:
    act = fused_act(modules[str(norm.target)])
    assert act is not None
    after: list[fx.Node | Activation] = []
    nodes: list[fx.Node] = []
    last = norm
    while len(last.users) == 1:
        (user,) = last.users
        module = modules.get(str(user.target)) if user.op == "call_module" else None
        following = _activation(user, last, module)
        if module is not None and may_be_idle(module) and user.args == (last,):
            after.append(user)
        elif following is not None and act == "none":
            act = following
            after.append(following if module is None else user)
        else:
            break
        nodes.append(user)
        last = user
    return Chain(norm, tuple(after), act, last, tuple(nodes))


ADDITIONS = {operator.add: False, operator.iadd: True, torch.add: False, "add": False, "add_": True}


def _sum(node: fx.Node) -> Sum | None:
    """A sum of two symbols; None if a node is something else."""
    plain = node.op in ("call_function", "call_method") and node.target in ADDITIONS
    if not plain or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)) or first is second:
        return None
    return Sum(node, first, second, ADDITIONS[node.target])


def _sum_before(graph: fx.Graph, chain: Chain, modules: dict[str, nn.Module]) -> Sum | None:
    """The sum that a norm is the first to see, if it may be computed with it."""
    x = chain.norm.args[0]
    total = _sum(x) if isinstance(x, fx.Node) else None
    if total is None or (total.in_place and not _fresh(total.first, modules)):
        return None
    users = set(total.node.users)
    return total if next(n for n in graph.nodes if n in users) is chain.norm else None


def _end(chain: Chain, modules: dict[str, nn.Module]) -> End | None:
    """What ends a post-activation block, if that is what follows a norm."""
    x = chain.norm.args[0]
    if chain.act != "none" or len(chain.last.users) != 1 or not _fresh(x, modules):
        return None
    total = _sum(next(iter(chain.last.users)))
    if total is None or len(total.node.users) != 1:
        return None
    if total.in_place and total.first is not chain.last:
        return None
    (relu,) = total.node.users
    module = modules.get(str(relu.target)) if relu.op == "call_module" else None
    if _activation(relu, total.node, module) != "relu":
        return None
    residual = total.second if total.first is chain.last else total.first
    return End(total, residual, relu, "relu" if module is None else relu)


def _fresh(x: Any, modules: dict[str, nn.Module]) -> bool:
    """Whether a symbol is what a convolution has made, and a norm alone will see."""
    if len(x.users) != 1:
        return False
    if x.op == "call_module":
        return fusible_conv(modules[str(x.target)]) is not None
    made = x.args[0] if x.target is operator.getitem else None
    while made is not None and made.target is operator.getitem:
        made = made.args[0]
    return made is not None and made.target in (norm_act_convs, add_norm_act_convs)


def _activation(user: fx.Node, of: fx.Node, module: nn.Module | None) -> Activation | None:
    """The activation that a node computes of another; None if it is no such node."""
    if module is not None:
        return act_of(module) if user.args == (of,) and not user.kwargs else None
    tables: dict[str, dict[Any, Activation]]
    tables = {"call_function": FUNCTIONS, "call_method": METHODS}
    if user.args[:1] != (of,) or len(user.args) > 1 or user.kwargs.keys() - {"inplace"}:
        return None
    return tables.get(user.op, {}).get(user.target)


def _convolves(user: fx.Node, of: fx.Node, modules: dict[str, nn.Module]) -> bool:
    module = modules.get(str(user.target)) if user.op == "call_module" else None
    alone = user.args == (of,) and not user.kwargs
    return alone and module is not None and fusible_conv(module) is not None


def _module(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The module that a node calls."""
    return graph.create_node("get_attr", str(node.target))


def _arguments(graph: fx.Graph, chain: Chain) -> tuple[Any, ...]:
    after = tuple(_module(graph, a) if isinstance(a, fx.Node) else a for a in chain.after)
    return _module(graph, chain.norm), after, chain.norm.args[0]


def _erase(graph: fx.Graph, chain: Chain) -> None:
    for node in (*reversed(chain.nodes), chain.norm):
        graph.erase_node(node)


# Where the norm was: nothing that follows in the graph may have changed its input before.


def _fuse_act(graph: fx.Graph, chain: Chain) -> None:
    with graph.inserting_before(chain.norm):
        fused = graph.call_function(norm_act, _arguments(graph, chain))
    chain.last.replace_all_uses_with(fused)
    _erase(graph, chain)


def _fuse_convs(graph: fx.Graph, chain: Chain, convs: list[fx.Node]) -> None:
    with graph.inserting_before(chain.norm):
        norm, after, x = _arguments(graph, chain)
        parts = [_module(graph, conv) for conv in convs]
        fused = graph.call_function(norm_act_convs, (norm, after, parts, x))
        outs = [graph.call_function(operator.getitem, (fused, i)) for i in range(len(convs))]
    _replace(graph, convs, outs)
    _erase(graph, chain)


def _fuse_end(graph: fx.Graph, chain: Chain, end: End) -> None:
    with graph.inserting_before(end.total.node):  # where the residual is
        norm, after, x = _arguments(graph, chain)
        act = _module(graph, end.act) if isinstance(end.act, fx.Node) else end.act
        arguments = norm, after, act, x, end.residual, end.total.in_place
        fused = graph.call_function(norm_add_relu, arguments)
    end.relu.replace_all_uses_with(fused)
    graph.erase_node(end.relu)
    graph.erase_node(end.total.node)
    _erase(graph, chain)


def _fuse_sum(graph: fx.Graph, chain: Chain, convs: list[fx.Node], total: Sum) -> None:
    with graph.inserting_before(total.node):
        norm, after, _ = _arguments(graph, chain)
        parts = [_module(graph, conv) for conv in convs]
        arguments = norm, after, parts, total.first, total.second, total.in_place
        fused = graph.call_function(add_norm_act_convs, arguments)
        s, every = (graph.call_function(operator.getitem, (fused, i)) for i in range(2))
        outs = [graph.call_function(operator.getitem, (every, i)) for i in range(len(convs))]
    _replace(graph, convs, outs)
    _erase(graph, chain)
    _replace(graph, [total.node], [s])


def _replace(graph: fx.Graph, nodes: list[fx.Node], others: list[fx.Node]) -> None:
    for node, other in zip(nodes, others, strict=True):
        node.replace_all_uses_with(other)
        graph.erase_node(node)


def _why(node: fx.Node, chain: Chain | None, block: nn.Module) -> str:
    """Why nothing is fused with a norm."""
    name = type(block).__name__
    if chain is None:
        return f"{name} calls it with more than one argument"
    users = list(chain.last.users)
    if len(users) != 1:
        return f"its result has {len(users)} uses in {name}"
    if users[0].op == "output":
        return f"{name} returns its result"
    return f"{users[0].name} follows in {name}, which is no activation that a kernel computes"
