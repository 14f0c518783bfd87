"""Analysis of Dynamo graphs: the operation of a node, and what it changes in place."""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from bitkern import _torch, ops
from bitkern.ops import Conv
from bitkern.ops.convolution import numeric_padding
from bitkern.reference import Activation

# Names and defaults of the arguments, in their order.
_GROUP_NORM = {"input": None, "num_groups": None, "weight": None, "bias": None, "eps": 1e-5}
_NORMS: dict[Any, dict[str, Any]] = {
    F.group_norm: _GROUP_NORM,
    torch.group_norm: _GROUP_NORM | {"cudnn_enabled": True},
    F.instance_norm: dict.fromkeys(("input", "running_mean", "running_var", "weight", "bias"))
    | {"use_input_stats": True, "momentum": 0.1, "eps": 1e-5},
    ops.group_norm_act: _GROUP_NORM | {"act": "relu"},
}
_CONV = {"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0}
_CONVS: dict[Any, dict[str, Any]] = {
    **dict.fromkeys(
        (torch.conv1d, torch.conv2d, torch.conv3d), _CONV | {"dilation": 1, "groups": 1}
    ),
    **dict.fromkeys(
        (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
        _CONV | {"output_padding": 0, "groups": 1, "dilation": 1},
    ),
    torch.convolution: _CONV
    | {"dilation": 1, "transposed": False, "output_padding": 0, "groups": 1},
}
# Activations, and the arguments with which a kernel computes them.
_ACTIVATIONS: dict[Any, tuple[Activation, dict[str, Any]]] = {
    F.relu: ("relu", {}),
    torch.relu: ("relu", {}),
    torch.relu_: ("relu", {}),
    "relu": ("relu", {}),
    "relu_": ("relu", {}),
    F.silu: ("silu", {}),
    F.leaky_relu: ("leaky_relu", {"negative_slope": 0.01}),
    F.gelu: ("gelu", {"approximate": "none"}),
    F.mish: ("mish", {}),
    F.hardswish: ("hardswish", {}),
}
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
_DROPOUT = {"input": None, "p": 0.5, "training": True, "inplace": False}
_ADDITIONS = {operator.add: False, torch.add: False, "add": False}
_ADDITIONS |= {operator.iadd: True, "add_": True, "__iadd__": True}
_MULTIPLICATIONS = operator.mul, torch.mul, "mul"
_SCALES = dict.fromkeys(_MULTIPLICATIONS, False)
_SCALES |= {operator.imul: True, "mul_": True, "__imul__": True}
_SIGMOIDS = torch.sigmoid, F.sigmoid, "sigmoid"
_MODES = "_enter_", "_exit_", "_set_grad_enabled", "set_grad_enabled", "_saved_tensors_hooks"
# In-place operators of Python, and functions whose last argument is ``inplace``.
_AUGMENTED = {
    *("iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior"),
    *("ipow", "irshift", "isub", "itruediv", "ixor"),
}
_INPLACE_LAST = {"relu", "silu", "dropout", "leaky_relu", "hardswish", "mish", "elu", "celu"}
_INPLACE_LAST |= {"selu", "relu6", "hardtanh", "hardsigmoid", "threshold", "rrelu"}
_INPLACE_LAST |= {"dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}


class Norm(NamedTuple):
    """A normalization; ``num_groups`` is None for one group per channel."""

    node: fx.Node
    x: fx.Node
    num_groups: int | None
    weight: Any
    bias: Any
    eps: float
    act: Activation


class Convolution(NamedTuple):
    """A convolution: its input, parameters, and its other arguments in two forms."""

    node: fx.Node
    x: Any
    weight: Any
    bias: Any
    name: str  # of the function, in torch
    rest: tuple[Any, ...]  # by position
    conv: Conv | None  # None where the node that recomputes cannot be used


class Sum(NamedTuple):
    """A sum of two tensors, and whether it changes the first of them."""

    node: fx.Node
    first: fx.Node
    second: fx.Node
    in_place: bool


def value(node: Any) -> Any:
    """The fake tensor that a node stands for."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _bound(node: fx.Node, names: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a node by name; None if it has others."""
    if len(node.args) > len(names) or node.kwargs.keys() - names.keys():
        return None
    return names | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def norm_of(node: fx.Node) -> Norm | None:
    """The normalization that a node is."""
    names = _NORMS.get(node.target) if node.op == "call_function" else None
    given = None if names is None else _bound(node, names)
    if given is None or not isinstance(given["input"], fx.Node):
        return None
    if node.target is F.instance_norm:
        running = given["running_mean"] is not None or given["running_var"] is not None
        if running or given["use_input_stats"] is not True:
            return None
    groups, eps = given.get("num_groups"), given["eps"]
    if not isinstance(groups, int | None) or not isinstance(eps, int | float):
        return None
    act = given.get("act", "none")
    return Norm(node, given["input"], groups, given["weight"], given["bias"], eps, act)


def convolution_of(node: fx.Node) -> Convolution | None:
    """The convolution that a node is."""
    names = _CONVS.get(node.target) if node.op == "call_function" else None
    given = None if names is None else _bound(node, names)
    if given is None:
        return None
    x, weight, bias, *rest = given.values()
    name = str(getattr(node.target, "__name__", ""))
    return Convolution(node, x, weight, bias, name, tuple(rest), _conv(given))


def _conv(given: dict[str, Any]) -> Conv | None:
    x, weight = value(given["input"]), value(given["weight"])
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and x.ndim == weight.ndim):
        return None
    dimensions = weight.ndim - 2

    def each(name: str) -> tuple[Any, ...]:
        found = given.get(name, 0)
        return (found,) * dimensions if isinstance(found, int) else tuple(found)

    if any(isinstance(argument, fx.Node) for argument in [*given.values()][3:]):
        return None
    padding = given["padding"]
    if not isinstance(padding, str):
        padding = each("padding")
    padding = numeric_padding(padding, each("dilation"), weight.shape[2:])
    if padding is None:
        return None
    transposed = given.get("transposed", "output_padding" in given)
    more = each("dilation"), transposed, each("output_padding"), given["groups"]
    conv = Conv(each("stride"), padding, *more)
    numbers = (*conv.stride, *conv.padding, *conv.dilation, *conv.output_padding, conv.groups)
    one = all(len(part) in (1, dimensions) for part in (conv.stride, conv.padding, conv.dilation))
    return conv if one and all(type(n) is int for n in numbers) else None


def activation_of(node: fx.Node, source: fx.Node) -> Activation | None:
    """The activation that a node computes of another."""
    name, wanted = _ACTIVATIONS.get(node.target, (None, {}))
    if name is None or node.args[:1] != (source,):
        return None
    given = dict(zip([*wanted, "inplace"], node.args[1:], strict=False)) | node.kwargs
    given.pop("inplace", None)
    return name if all(wanted.get(key) == found for key, found in given.items()) else None


def silu_of(node: fx.Node) -> fx.Node | None:
    """The node that computes ``x * sigmoid(x)`` of a node x, written out."""
    users = list(node.users)
    sigmoid = next((u for u in users if u.target in _SIGMOIDS and u.args == (node,)), None)
    if len(users) != 2 or sigmoid is None or len(sigmoid.users) != 1:
        return None
    (product,) = sigmoid.users
    factors = product.target in _MULTIPLICATIONS and set(product.args) == {node, sigmoid}
    return product if factors and product in users and not product.kwargs else None


def modulation_of(node: fx.Node, source: fx.Node) -> dict[str, fx.Node]:
    """The scale and shift, a number for each sample and channel, that a node applies to another."""
    if node.target in (torch.addcmul, "addcmul") and not node.kwargs and len(node.args) == 3:
        shift, *factors = node.args
        found = {"scale": _other(factors, source), "shift": shift}
    elif node.target in _SCALES and not node.kwargs:
        found = {"scale": _other(node.args, source, _SCALES[node.target])}
    elif node.target in _ADDITIONS and not node.kwargs:
        found = {"shift": _other(node.args, source, _ADDITIONS[node.target])}
    else:
        return {}
    if source in found.values():
        return {}
    map_, made = value(source), value(node)
    for given in map(value, found.values()):
        if not isinstance(given, Tensor) or given.ndim != map_.ndim or given.ndim < 3:
            return {}
        if not given.is_floating_point() or any(size != 1 for size in given.shape[2:]):
            return {}
    return found if (made.dtype, made.shape) == (map_.dtype, map_.shape) else {}


def _other(of_two: Sequence[Any], one: fx.Node, in_place: bool = False) -> Any:
    """The argument beside ``one``; None if there are not two, or that one is changed in place."""
    if in_place and of_two[0] is not one:
        return None
    others = [given for given in of_two if given is not one]
    return others[0] if len(of_two) == 2 and len(others) == 1 else None


def does_nothing(node: fx.Node, source: fx.Node, dtype: torch.dtype) -> bool:
    """Return whether a node passes another through: inactive dropout, a cast to ``dtype``."""
    if node.args[:1] != (source,):
        return False
    if node.target in _DROPOUTS:
        given = _bound(node, _DROPOUT)
        return given is not None and (given["p"] == 0 or given["training"] is False)
    if node.op == "call_method" and node.target in ("to", "type", "float"):
        only = node.target == "float" or isinstance(node.args[-1], torch.dtype)
        same = (
            isinstance(value(source), Tensor) and value(node).dtype == value(source).dtype == dtype
        )
        return only and same and len(node.args) <= 2 and not node.kwargs
    return False


def sum_of(node: Any) -> Sum | None:
    """The sum of two tensors that a node is."""
    if not isinstance(node, fx.Node) or node.target not in _ADDITIONS or node.kwargs:
        return None
    if len(node.args) != 2 or node.args[0] is node.args[1]:
        return None
    first, second = node.args
    alike = isinstance(value(first), Tensor) and isinstance(value(second), Tensor)
    if not alike or value(first).dtype != value(second).dtype:
        return None
    return Sum(node, first, second, _ADDITIONS[node.target])  # type: ignore[arg-type]


def changes(node: fx.Node) -> bool:
    """Return whether a node may change memory that existed before."""
    if node.op not in ("call_function", "call_method"):
        return False
    mutates = _torch.mutates(node.target)
    if mutates is not None:
        return mutates
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    augmented = name.strip("_") in _AUGMENTED if name.startswith("__") else False
    if getattr(node.target, "__module__", "") == "_operator":
        augmented = name in _AUGMENTED
    in_place = name.endswith("_") and not name.endswith("__") or name in ("setitem", "__setitem__")
    argument = node.kwargs.get("inplace") or name in _INPLACE_LAST and node.args[-1:] == (True,)
    statistics = *node.args[1:3], node.kwargs.get("running_mean"), node.kwargs.get("running_var")
    running = name in ("batch_norm", "instance_norm") and any(s is not None for s in statistics)
    return bool(in_place or augmented or argument or "out" in node.kwargs or running)


def changed(nodes: Iterable[Any], by: Iterable[fx.Node]) -> bool:
    """Return whether nodes ``by`` change memory of ``nodes``, through any view."""
    storages = {_torch.storage_key(fake) for fake in map(value, nodes) if isinstance(fake, Tensor)}
    for node in filter(changes, by):
        fakes = [value(given) for given in node.all_input_nodes]
        if any(isinstance(f, tuple | list) for f in fakes):
            return True
        if storages & {_torch.storage_key(fake) for fake in fakes if isinstance(fake, Tensor)}:
            return True
    return False


def calls(node: fx.Node, packet: Any) -> bool:
    """Return whether a node calls a registered operator of bitkern's own layers."""
    return getattr(node.target, "overloadpacket", node.target) is packet


def is_mode(node: fx.Node) -> bool:
    """Return whether a node enters or leaves autocast, or switches gradients on or off."""
    return getattr(node.target, "__name__", "").startswith(_MODES)


def between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """The nodes after the first and before the last."""
    node = first.next
    while node is not last and node.op != "root":
        yield node
        node = node.next


def same_mode(nodes: list[fx.Node]) -> bool:
    """Return whether no mode is entered or left between nodes."""
    return not any(is_mode(node) for node in between(min(nodes), max(nodes)))


def fresh(x: Any, makers: tuple[Callable[..., Any], ...]) -> bool:
    """Return whether a node is the new, once used result of a convolution or of ``makers``."""
    if not isinstance(x, fx.Node) or len(x.users) != 1:
        return False
    if x.target is operator.getitem:  # of several results, not a slice
        x = x.args[0]
        return isinstance(x, fx.Node) and x.target in makers
    return x.target in _CONVS or x.target in makers
