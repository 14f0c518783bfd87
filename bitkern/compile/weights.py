"""Standardized weights in a graph, recognized by evaluation rather than by class.

Nodes that depend on parameters alone and end in the weight of a convolution are evaluated on random
values. If each filter comes out as its centered values times a number, and that number is
``scale / sqrt(var + eps)`` or ``scale / (sqrt(var) + eps)`` of the filters' variances, the kernel
computes it.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from bitkern import reference
from bitkern.compile import run
from bitkern.compile.graph import calls, changed, convolution_of, same_mode, value
from bitkern.variant import Variant

EPSILONS = 1e-5, 1e-6, 1e-8, 1e-10, 1e-12, 1e-3  # beside those that the graph names
LARGEST = 20_000_000  # elements, in float64


class Standardized(NamedTuple):
    """A weight that a graph standardizes."""

    weight: fx.Node
    gain: fx.Node | None
    variant: Variant
    scale: float


def dependencies(node: fx.Node) -> list[fx.Node]:
    """A node and all nodes that it depends on, in the order of the graph."""
    seen, queue = {node}, [node]
    while queue:
        for dependency in queue.pop().all_input_nodes:
            if dependency not in seen:
                seen.add(dependency)
                queue.append(dependency)
    return sorted(seen)


def unchanged(node: fx.Node) -> bool:
    """Return whether nothing in the graph changes a node or its dependencies."""
    return not changed(dependencies(node), node.graph.nodes)


def standardize_weights(
    graph: fx.Graph, parameters: set[fx.Node]
) -> tuple[dict[fx.Node, Standardized], dict[fx.Node, str]]:
    """Let kernels standardize weights of convolutions; returns those found, and why some were not.

    Each group runs in one launch. The keys are the nodes of the convolutions.
    """
    found: dict[fx.Node, Standardized] = {}
    left: dict[fx.Node, str] = {}
    formulas: _Formulas = {}
    for node in graph.nodes:
        conv = convolution_of(node)
        made = None if conv is None else conv.weight
        if not isinstance(made, fx.Node) or made in parameters:
            continue
        result = _recognized(node, dependencies(made), parameters, formulas)
        if isinstance(result, Standardized):
            found[node] = result
        elif result is not None:
            left[node] = result
    kinds: dict[Any, list[fx.Node]] = defaultdict(list)
    for node, each in found.items():
        fake = value(each.weight)
        kind = fake.dtype, fake.device, fake.requires_grad, fake.ndim, each.gain is None
        kinds[each.variant, kind].append(node)
    for (variant, _), nodes in kinds.items():
        _replace(graph, [(node, found[node]) for node in nodes], variant)
    return found, left


def _replace(
    graph: fx.Graph, convs: Sequence[tuple[fx.Node, Standardized]], variant: Variant
) -> None:
    unique = list(dict.fromkeys(standardized for _, standardized in convs))
    head = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(head):
        arguments = (
            [each.weight for each in unique],
            [each.gain for each in unique if each.gain is not None],
            [each.scale for each in unique],
            tuple(variant),
        )
        weights = graph.call_function(run.LazyWeights, arguments)
    for node, standardized in convs:
        with graph.inserting_before(node):
            at = unique.index(standardized), convolution_of(node).x  # type: ignore[union-attr]
            weight = graph.call_function(run.standardized_weight, (weights, *at))
        made = convolution_of(node).weight  # type: ignore[union-attr]
        weight.meta["example_value"] = value(made)
        node.replace_input_with(made, weight)
        for computed in reversed(dependencies(made)):
            if computed.op != "placeholder" and not computed.users:
                graph.erase_node(computed)


_Formulas = dict[Any, tuple[Variant, float] | None]


def _structure(nodes: list[fx.Node]) -> str:
    """A key of what nodes compute and of which shapes, without their parameters' names."""
    number = {node: i for i, node in enumerate(nodes)}

    def described(node: fx.Node) -> tuple[Any, ...]:
        if node.op == "placeholder":
            return (tuple(value(node).shape),)
        arguments = fx.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
        return node.target, arguments

    return repr([described(node) for node in nodes])


def _recognized(
    conv: fx.Node, nodes: list[fx.Node], parameters: set[fx.Node], formulas: _Formulas
) -> Standardized | str | None:
    """The standardization that nodes compute; None or a reason if they compute something else."""
    leaves = [node for node in nodes if node.op in ("placeholder", "get_attr")]
    if any(leaf not in parameters for leaf in leaves):
        return None
    other = "its weight is computed from parameters, but is no weight standardization"
    made = value(nodes[-1])
    weights = [leaf for leaf in leaves if value(leaf).shape == made.shape]
    gains = [leaf for leaf in leaves if leaf not in weights]
    if len(weights) != 1 or len(gains) > 1 or any(type(n) is not int for n in made.shape):
        return other
    (weight,), gain = weights, next(iter(gains), None)
    if gain is not None and (value(gain).numel(), value(gain).dtype) != (
        made.shape[0],
        value(weight).dtype,
    ):
        return other
    if not unchanged(nodes[-1]):
        return "its weight is computed from parameters that the graph changes"
    if not same_mode([conv, *(node for node in nodes if node not in leaves)]):
        return "its weight is computed in another mode than the convolution"
    if len(nodes) > 3 and calls(nodes[-3], torch.ops.bitkern.weight_standardize):
        arguments: Any = nodes[-3].args
        own, own_gains, scales, *variant = arguments[:6]
        plain = own == [weight] and own_gains == gains
        return Standardized(weight, gain, Variant(*variant[:3]), scales[0]) if plain else other
    if made.dtype != value(weight).dtype or not 0 < made.numel() <= LARGEST:
        return other
    if made.shape[1:].numel() < 2:
        return other
    key = _structure(nodes)
    if key not in formulas:
        try:
            formulas[key] = _formula(nodes, weight, gain)
        except Exception:  # of whatever the nodes compute, on values that they were not made for
            formulas[key] = None
    formula = formulas[key]
    return other if formula is None else Standardized(weight, gain, *formula)


def _formula(
    nodes: list[fx.Node], weight: fx.Node, gain: fx.Node | None
) -> tuple[Variant, float] | None:
    """The variant and the scale with which a kernel computes the same."""
    shape = value(weight).shape
    ratios, variances = [], []
    for first in range(max(1, 5 // shape[0])):  # filters of five scales
        w, factors = _filters(shape, first)
        with torch.no_grad():
            out = _evaluate(nodes, weight, w, gain, factors)
        tolerance = 1e-10 if out.dtype == torch.float64 else 1e-5
        flat, out = w.flatten(1), out.double().flatten(1)
        c = (flat - flat.mean(1, keepdim=True)) * (1 if gain is None else factors[:, None])
        ratio = (out * c).sum(1) / c.square().sum(1)
        if (out - ratio[:, None] * c).norm() > tolerance * out.norm() or not ratio.all():
            return None
        ratios.append(ratio)
        variances.append(torch.stack([flat.var(1, correction=n) for n in (0, 1)]))
    ratio, (biased, unbiased) = torch.cat(ratios), torch.cat(variances, 1)
    epsilons = dict.fromkeys((*_floats(nodes), *EPSILONS, 0.0))
    for eps, outside, bessel in itertools.product(epsilons, (False, True), (False, True)):
        var = unbiased if bessel else biased
        scales = ratio * (var.sqrt() + eps if outside else (var + eps).sqrt())
        scale = float(scales.mean())
        if (scales - scale).abs().max() <= tolerance * abs(scale):
            variant = Variant(eps, outside, bessel)
            scale = 1.0 if abs(scale - 1) <= tolerance else scale
            agrees = _agrees(nodes, weight, gain, variant, scale, tolerance)
            return (variant, scale) if agrees else None
    return None


def _agrees(
    nodes: list[fx.Node],
    weight: fx.Node,
    gain: fx.Node | None,
    variant: Variant,
    scale: float,
    tolerance: float,
) -> bool:
    """Compare values and gradients with the reference, for weights of any size and sign."""
    shape = value(weight).shape
    options: Any = {"scale": scale, **variant._asdict()}
    generator = torch.Generator().manual_seed(2)
    large = 20 * torch.rand(shape, generator=generator, dtype=torch.float64) - 9
    factors = torch.linspace(-2, 1.5, shape[0], dtype=torch.float64)
    weights = torch.linspace(-1, 1, large.numel(), dtype=torch.float64).view(shape)
    for w in (large, large * 1e-6, torch.zeros_like(large)):
        found = []
        for ours in (False, True):
            leaves = [w.clone().requires_grad_(), factors.clone().requires_grad_()]
            if ours:
                options["gain"] = None if gain is None else leaves[1]
                out = reference.weight_standardize(leaves[0], **options)
            else:
                out = _evaluate(nodes, weight, leaves[0], gain, leaves[1]).double()
            wanted = leaves if gain is not None else leaves[:1]
            found.append([out.detach()])
            if w.any():  # at zero a root has no derivative
                found[-1] += torch.autograd.grad((out * weights).sum(), wanted)
        for ours, theirs in zip(*found, strict=True):
            if not torch.allclose(ours, theirs, rtol=0, atol=float(tolerance * theirs.abs().max())):
                return False
    return True


def _filters(shape: Sequence[int], first: int) -> tuple[Tensor, Tensor]:
    """Filters whose standard deviations, 0.03 down to 3e-6, show the effect of eps; and gains.

    The powers of ten begin with the ``first``.
    """
    generator = torch.Generator().manual_seed(1)
    w = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.2
    powers = (torch.arange(shape[0], dtype=w.dtype) + first) % 5 + 1
    factors = torch.linspace(0.5, 2, shape[0], dtype=w.dtype)
    return w * (10**-powers).reshape(-1, *[1] * (len(shape) - 1)), factors


def _evaluate(
    nodes: list[fx.Node], weight: fx.Node, w: Tensor, gain: fx.Node | None, factors: Tensor
) -> Tensor:
    """Evaluate nodes for a weight and a gain. Raises ValueError if they draw random numbers."""
    interpreter = fx.Interpreter(nn.Module(), garbage_collect_values=False, graph=weight.graph)
    values = interpreter.env
    values[weight] = w
    if gain is not None:
        values[gain] = factors.view(value(gain).shape)
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        before = torch.get_rng_state()
        for node in nodes:
            if node not in values:
                values[node] = interpreter.run_node(node)
        if not torch.equal(before, torch.get_rng_state()):
            raise ValueError("random numbers")
    result: Tensor = values[nodes[-1]]
    return result


def _floats(nodes: Iterable[fx.Node]) -> Iterator[float]:
    for node in nodes:
        for argument in (*node.args, *node.kwargs.values()):
            if isinstance(argument, float) and 0 <= argument < 1:
                yield argument
