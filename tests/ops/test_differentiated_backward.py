"""Backward passes that are themselves differentiated or batched, by every way into autograd.

The kernels' forward, then backward by the formulas of ``bitkern.reference``: right to the rounding
of float32, where PyTorch is in float64. The formulas themselves are checked in float64.
"""

import math

import pytest
import torch
from torch.autograd import forward_ad, functional

import bitkern
from bitkern import ops, reference
from bitkern.ops.group_norm_act import GroupNormActFunction
from bitkern.ops.group_norm_act_conv import GroupNormActConvFunction
from bitkern.ops.group_norm_add_relu import GroupNormAddReluFunction
from bitkern.ops.weight_standardize import WeightStandardizeFunction
from bitkern.testing import affine, maps
from bitkern.variant import Variant
from tests.ops.backends import implementations
from tests.ops.test_group_norm_act_conv import CONVS


def node(x, residual, weight, bias, *weights):
    biases = [None] * len(weights)
    affine = 4, weight, bias, 1e-5, "silu"
    total, outs = ops.group_norm_act_conv(x, residual, *affine, weights, biases, CONVS)
    return total, *outs


def node_without_sum(x, residual, *parameters):
    return node(x, None, *parameters)[1:]


def of_samples(weight, bias):
    """Return parameters for each of the two samples."""
    return torch.stack([weight, bias]), torch.stack([bias, weight])


def standardized(x, residual, weight, bias, *weights):
    outer = {"eps": 1e-3, "eps_outside": True, "unbiased": True}
    other = ops.weight_standardize(weights[1], gain=weight[:4], scale=0.5, **outer)
    return ops.weight_standardize(weights[0]), other


OPERATORS = {
    "group_norm_act": lambda x, r, w, b, *_: (ops.group_norm_act(x, 4, w, b, act="mish"),),
    "without parameters": lambda x, *_: (ops.group_norm_act(x, 2, act="gelu"),),
    "add_group_norm_act": lambda x, r, w, b, *_: ops.add_group_norm_act(
        x, r, 4, *of_samples(w, b), act="silu"
    ),
    "group_norm_add_relu": lambda x, r, w, b, *_: (ops.group_norm_add_relu(x, r, 4, w, b),),
    "group_norm_act_conv": node,
    "group_norm_act_conv without sum": node_without_sum,
    "weight_standardize": standardized,
    "ws_conv2d": lambda x, r, w, b, *weights: (ops.ws_conv2d(x, weights[0]),),
}
operators = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def inputs(format=torch.contiguous_format):
    """Return x, residual, weight, bias, and weights of convolutions."""
    x = maps((2, 8, 4, 3), seed=0, shift=0.5, constant=False)
    residual = maps((2, 8, 4, 3), seed=4, shift=-0.5, constant=False)
    weights = torch.randn(6, 8, 1, 1), torch.randn(4, 4, 3, 3)
    return *(t.contiguous(memory_format=format) for t in (x, residual)), *affine(8), *weights


def ramp(t, rows=()):
    """Return numbers from -1 to 1 in the shape of a tensor, or of several of them."""
    shape = *rows, *t.shape
    return torch.linspace(-1, 1, math.prod(shape)).to(t).view(shape)


def smooth(outputs):
    """Return a number whose derivatives of any order are not zero."""
    return sum((o * ramp(o)).sin().sum() for o in outputs)


def used(tensors):
    return [t for t in tensors if t is not None]


def penalty(fn, leaves, **options):
    grads = torch.autograd.grad(smooth(fn(*leaves)), leaves, create_graph=True, allow_unused=True)
    return sum(g.sin().sum() for g in used(grads))


def by_grad(fn, leaves):
    return used(torch.autograd.grad(penalty(fn, leaves), leaves, allow_unused=True))


def by_grad_of_each(fn, leaves):
    """Differentiate each gradient alone, as gradient penalties and meta-learners do."""
    total = penalty(fn, leaves)
    each = (
        torch.autograd.grad(total, leaf, retain_graph=True, allow_unused=True)[0] for leaf in leaves
    )
    return used(each)


def by_backward(fn, leaves):
    penalty(fn, leaves).backward()
    return used(leaf.grad for leaf in leaves)


def by_backward_of_inputs(fn, leaves):
    penalty(fn, leaves).backward(inputs=leaves[:1] + leaves[4:])
    return used(leaf.grad for leaf in leaves)


def by_backward_twice(fn, leaves):
    """Call ``.backward(create_graph=True)`` first."""
    smooth(fn(*leaves)).backward(create_graph=True)
    first = used(leaf.grad for leaf in leaves)
    return used(torch.autograd.grad(sum(g.sin().sum() for g in first), leaves, allow_unused=True))


def by_hvp(fn, leaves, product=functional.hvp):
    leaves = tuple(leaf.detach() for leaf in leaves)
    return product(lambda *t: smooth(fn(*t)), leaves, tuple(map(ramp, leaves)))[1]


def by_vhp(fn, leaves):
    return by_hvp(fn, leaves, functional.vhp)


def by_third_order(fn, leaves):
    second = torch.autograd.grad(penalty(fn, leaves), leaves, create_graph=True, allow_unused=True)
    third = sum(g.sin().sum() for g in used(second))
    return used(torch.autograd.grad(third, leaves, allow_unused=True))


def by_transforms(fn, leaves):
    def first(*tensors):
        grads = torch.func.grad(lambda *t: smooth(fn(*t)), tuple(range(6)))(*tensors)
        return sum(g.sin().sum() for g in grads)

    return torch.func.grad(first, tuple(range(6)))(*(leaf.detach() for leaf in leaves))


def by_batched_grads(fn, leaves):
    outputs = fn(*leaves)
    options = {"is_grads_batched": True, "allow_unused": True}
    return used(torch.autograd.grad(outputs, leaves, [ramp(o, [3]) for o in outputs], **options))


def by_vmap_over_grad(fn, leaves):
    outputs = fn(*leaves)

    def one(*dys):
        grads = torch.autograd.grad(outputs, leaves, dys, allow_unused=True, retain_graph=True)
        return tuple(used(grads))

    return torch.vmap(one)(*(ramp(o, [3]) for o in outputs))


def by_vectorized_jacobian(fn, leaves):
    leaves = tuple(leaf.detach() for leaf in leaves)
    rows = functional.jacobian(lambda *t: fn(*t)[-1].sum((0, 2)), leaves, vectorize=True)
    return used(rows)


def by_forward_over_backward(fn, leaves):
    """Apply forward mode to the backward pass of an ordinary graph."""
    outputs = fn(*leaves)
    with forward_ad.dual_level():
        dys = [forward_ad.make_dual(torch.ones_like(o), ramp(o)) for o in outputs]
        grads = torch.autograd.grad(outputs, leaves, dys, allow_unused=True)
        return [forward_ad.unpack_dual(g).tangent for g in used(grads)]


def by_forward_mode(fn, leaves):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t.detach(), ramp(t)) for t in leaves]
        return [forward_ad.unpack_dual(o).tangent for o in fn(*duals)]


WAYS = {name[3:]: way for name, way in list(globals().items()) if name.startswith("by_")}
# Of these PyTorch's own group norm or activations have no rule: the derivative is linear in the
# incoming gradient, so that its own is that of the tangent alone.
NOT_PLAIN = by_forward_over_backward


def linear(fn, leaves):
    outputs = fn(*leaves)
    return used(torch.autograd.grad(outputs, leaves, [*map(ramp, outputs)], allow_unused=True))


@implementations("group_norm_act", reference=False)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@operators
def test_equals_plain_pytorch(operator, way, format, name, device):
    tensors = [t.to(device) for t in inputs(format)]

    def run(way, backend, dtype):
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]
        with bitkern.use_backend(backend):
            return way(operator, leaves)

    # "auto", since a demand for kernels under a transform is refused.
    ours = run(way, "auto", torch.float32)
    plain = linear if way is NOT_PLAIN else way
    exact = run(plain, "reference", torch.float64)
    peer = run(plain, "reference", torch.float32)
    assert any(map(torch.any, exact))
    for got, theirs, expected in zip(ours, peer, exact, strict=True):
        assert got.dtype == torch.float32
        allowed = 8 * (theirs - expected).norm() + 1e-4 * expected.norm()
        assert (got - expected).norm() <= allowed


@pytest.mark.parametrize("kind", ["gradcheck", "gradgradcheck"])
@pytest.mark.parametrize("act", ["relu", "silu", "leaky_relu", "gelu", "mish", "hardswish", "none"])
def test_formulas_of_group_norm(kind, act):
    x, residual, weight, bias, *weights = (t.double().requires_grad_() for t in inputs())
    check = getattr(torch.autograd, kind)
    arguments = x, residual, 4, weight, bias, 1e-3, act, reference
    assert check(GroupNormActFunction.apply, arguments)
    each = (p.detach().requires_grad_() for p in of_samples(weight, bias))
    assert check(GroupNormActFunction.apply, (x, None, 4, *each, *arguments[5:]))

    def convolved(x, residual, *parameters):
        args = CONVS, 4, 1e-3, act, reference, x, residual
        return GroupNormActConvFunction.apply(*args, *parameters, None, None)

    assert check(convolved, (x, residual, weight, bias, *weights))


@pytest.mark.parametrize("kind", ["gradcheck", "gradgradcheck"])
def test_formulas_of_group_norm_add_relu(kind):
    x, residual, weight, bias, *_ = (t.double().requires_grad_() for t in inputs())
    arguments = x, residual, 4, weight, bias, 1e-3, reference
    assert getattr(torch.autograd, kind)(GroupNormAddReluFunction.apply, arguments)


@pytest.mark.parametrize("kind", ["gradcheck", "gradgradcheck"])
@pytest.mark.parametrize(
    "variant", [(1e-3, False, False), (1e-3, True, False), (1e-3, True, True)], ids=str
)
def test_formulas_of_weight_standardize(kind, variant):
    weights = [torch.randn(3, 2, 3, 1).double().requires_grad_() for _ in range(2)]
    gains = [torch.randn(3, 1, 1, 1).double().requires_grad_() for _ in range(2)]
    options = [0.5, 2.0], Variant(*variant), torch.float64, False

    def standardized(*parameters):
        return WeightStandardizeFunction.apply(reference, options, 2, *parameters)

    assert getattr(torch.autograd, kind)(standardized, (*weights, *gains))


def test_a_constant_filter_has_finite_second_derivatives():
    weight = torch.randn(3, 4, 1, 1)
    weight[1] = 2.0
    for outside in (False, True):
        leaf = weight.clone().requires_grad_()
        out = ops.weight_standardize(leaf, 1e-5, eps_outside=outside)
        (first,) = torch.autograd.grad(out.sin().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.sin().sum(), leaf)
        assert second.isfinite().all() and second[0].any() and second[2].any()


@implementations("group_norm_act")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@operators
def test_first_order_under_create_graph(operator, dtype, name, device):
    """Gradients that nobody differentiates again are as close as those without a graph."""
    tensors = [t.to(device) for t in inputs(torch.channels_last)]
    results = []
    for create_graph in (False, True):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        with bitkern.use_backend(name):
            total = smooth([o.float() for o in operator(*leaves)])
        options = {"create_graph": create_graph, "allow_unused": True}
        results.append(used(torch.autograd.grad(total, leaves, **options)))
    for without, with_graph in zip(*results, strict=True):
        assert with_graph.dtype == dtype and with_graph.requires_grad
        difference = (with_graph - without).float().norm() / without.float().norm()
        assert difference < 8 * torch.finfo(dtype).eps


def test_registered_operators_too():
    """Exported programs call the registered operators."""
    registered = torch.ops.bitkern

    def sum_and_norm(x, residual, weight, bias, *_):
        affine = 4, *of_samples(weight, bias), 1e-5, "silu"
        return registered.group_norm_act(x, residual, *affine)[:2]

    def norm_and_sum(x, residual, weight, bias, *_):
        return registered.group_norm_add_relu(x, residual, 4, weight, bias, 1e-5)[:1]

    def first_weight(x, residual, weight, bias, first, _):
        options = [1.0], 1e-10, False, False, torch.float32, False
        return registered.weight_standardize([first], [], *options)[0]

    tensors = inputs()
    for ours, theirs in (
        (sum_and_norm, OPERATORS["add_group_norm_act"]),
        (norm_and_sum, OPERATORS["group_norm_add_relu"]),
        (first_weight, lambda *tensors: (ops.weight_standardize(tensors[4]),)),
    ):
        found = []
        for fn in (ours, theirs):
            leaves = [t.clone().requires_grad_() for t in tensors]
            with bitkern.use_backend("auto" if fn is ours else "reference"):
                found.append(by_grad(fn, leaves))
        for got, expected in zip(*found, strict=True):
            assert (got - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "hessian"])
def test_transforms_under_the_compiler(transform):
    x, *_ = inputs()

    def number(x):
        return smooth([ops.group_norm_act(x, 4, act="silu")])

    def run(x):
        if transform == "grad":
            return torch.func.grad(number)(x)
        if transform == "jvp":
            return torch.func.jvp(number, (x,), (torch.ones_like(x),))[1]
        if transform == "vmap":
            return torch.vmap(torch.func.grad(number))(torch.stack([x, 2 * x]))
        return torch.func.hessian(lambda row: number(torch.cat([row[None], x[1:]])))(x[0])

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x), rtol=1e-4, atol=1e-4)


def test_a_compiled_graph_is_never_silently_wrong():
    """With AOTAutograd the derivatives are right, or PyTorch raises its error."""
    x, _, _, _, weight, _ = (t.requires_grad_() for t in inputs())
    rows = ramp(x, [3])

    def norm(x):
        return ops.group_norm_act(x, 4, act="silu")

    torch._dynamo.reset()
    y = torch.compile(norm, backend="aot_eager")(x)
    (got,) = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)
    (expected,) = torch.autograd.grad(norm(x), x, rows, is_grads_batched=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        (dx,) = torch.autograd.grad(smooth([y]), x, create_graph=True)
        torch.autograd.grad(smooth([dx]), x)
    y = torch.compile(lambda w: ops.weight_standardize(w), backend="aot_eager")(weight)
    with pytest.raises(RuntimeError, match="Batching rule not implemented for bitkern"):
        torch.autograd.grad(y, weight, torch.ones(2, *y.shape), is_grads_batched=True)
