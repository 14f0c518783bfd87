"""``torch.compile(model, backend="bitkern")``: a network's graph on these operators.

Dynamo traces the network; this rewrites the graph and hands it back. It runs eagerly, with ordinary
autograd: no Inductor, no compiler.

- ``graph``: the operation of a node, and what it changes in place
- ``weights``: standardized weights, recognized by evaluation
- ``patterns``: fusion of norms
- ``run``: the functions that a rewritten graph calls
- ``report``: records for ``bitkern.explain``
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from bitkern import _torch, ops
from bitkern.compile.graph import calls
from bitkern.compile.patterns import fuse
from bitkern.compile.report import Row, name_of, record
from bitkern.compile.weights import standardize_weights

__all__ = ["backend"]


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend ``"bitkern"`` of ``torch.compile``.

    GroupNorm and InstanceNorm are fused with what follows them (activations, dropout that drops
    nothing, convolutions) and with the sum before or after them, whatever class wrote these; weight
    standardization of any form runs in one launch for all layers of a kind. Results differ from the
    network's by rounding alone, except that under autocast a norm keeps its input's dtype.

    Args:
        gm, example_inputs: a graph of Dynamo and its inputs.
        options: ``{"inner": "inductor"}`` hands the rewritten graph to Inductor.

    Raises:
        ValueError: for other options.
    """
    inner = dict(options or {})
    if inner and inner != {"inner": "inductor"}:
        raise ValueError(f"options: expected {{'inner': 'inductor'}} or none, got {options!r}")
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    parameters = {
        node: example
        for node, example in zip(placeholders, example_inputs, strict=True)
        if isinstance(example, nn.Parameter)
    }
    rows = _rewrite(gm, set(parameters))
    record(gm, parameters.values(), rows)
    if inner:
        return _torch.inductor(gm, example_inputs)
    return gm.forward


def _rewrite(gm: fx.GraphModule, parameters: set[fx.Node]) -> list[Row]:
    """Rewrite a graph and its subgraphs; returns a row for each norm and weight."""
    names: dict[str, str] = gm.meta.get("dynamo_flat_name_to_original_fqn", {})
    graph = gm.graph
    rows = [row for node in list(graph.nodes) for row in _checkpoint(gm, node, parameters)]
    _canonicalize(graph)
    standardized, left = standardize_weights(graph, parameters)
    for each in standardized.values():
        how = f"weights standardized by a kernel: {each.variant}, scale {each.scale:g}"
        rows.append(Row(name_of(each.weight, names), "weight standardization", True, how))
    for node, reason in left.items():
        rows.append(Row(name_of(node, names), "convolution", False, reason))
    norms = {node: name_of(node, names) for node in graph.nodes}
    fused, alone = fuse(graph, parameters)
    for node, how in fused.items():
        how = f"{how}: {alone[node]}" if node in alone else how
        rows.append(Row(norms[node], "norm", True, how))
    graph.lint()
    gm.recompile()
    return rows


def _checkpoint(gm: fx.GraphModule, node: fx.Node, parameters: set[fx.Node]) -> list[Row]:
    """Rewrite the graph of a checkpointed part, and checkpoint it by torch.utils.checkpoint."""
    if node.target is not torch.ops.higher_order.tag_activation_checkpoint:
        return []
    function, *given = node.args
    assert isinstance(function, fx.Node)
    body = gm.get_submodule(str(function.target))
    assert isinstance(body, fx.GraphModule)
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    inside = {p for p, argument in zip(placeholders, given, strict=True) if argument in parameters}
    node.target = checkpoint
    return _rewrite(body, inside)


def _canonicalize(graph: fx.Graph) -> None:
    """Replace registered operators of bitkern's layers by the functions that patterns match."""
    norm, norm_add_relu = torch.ops.bitkern.group_norm_act, torch.ops.bitkern.group_norm_add_relu
    for node in list(graph.nodes):
        results = 2 * calls(node, norm) + calls(node, norm_add_relu)
        if not results or any(user.args[1] >= results for user in node.users):
            continue  # another operator, or the statistics are wanted too
        x, residual, *affine = node.args
        with graph.inserting_before(node):
            if residual is None:
                made = [None, graph.call_function(ops.group_norm_act, (x, *affine))]
            elif calls(node, norm):
                both = graph.call_function(ops.add_group_norm_act, node.args)
                made = [graph.call_function(operator.getitem, (both, i)) for i in range(2)]
            else:
                made = [graph.call_function(ops.group_norm_add_relu, node.args)]
        for user in list(node.users):
            new = made[user.args[1]]
            new.meta = dict(user.meta)
            user.replace_all_uses_with(new)
            graph.erase_node(user)
        graph.erase_node(node)
