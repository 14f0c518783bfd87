"""Compare the node that keeps only its input with norm, activation and convolution apart."""

import pytest
import torch

import bitkern
from bitkern import ops, reference
from bitkern.ops import Conv
from bitkern.testing import affine, assert_accurate, maps, strided
from tests.ops.backends import implementations

every_implementation = implementations("group_norm_act")
CONVS = [
    Conv((1, 1), (0, 0), (1, 1), False, (0, 0), 1),
    Conv((2, 1), (1, 2), (1, 2), False, (0, 0), 2),
]


def inputs(dtype, kind="contiguous", residual=True, samples=()):
    x = strided(maps((2, 8, 9, 7), dtype, shift=0.5), kind)
    r = strided(maps((2, 8, 9, 7), dtype, seed=4, shift=-0.5), kind) if residual else None
    weights = [torch.randn(6, 8, 1, 1).to(dtype), torch.randn(4, 4, 3, 3).to(dtype)]
    return [x, r, *affine(8, samples=samples), *weights]


def one_by_one(x, residual, weight, bias, *weights, fn=reference.group_norm_act):
    total = x if residual is None else x + residual
    a = fn(total, 4, weight, bias)
    convolved = (
        torch.convolution(a, w, None, *conv) for w, conv in zip(weights, CONVS, strict=False)
    )
    return total, *convolved


def node(x, residual, weight, bias, *weights):
    convs = CONVS[: len(weights)]
    biases = [None] * len(weights)
    total, outs = ops.group_norm_act_conv(
        x, residual, 4, weight, bias, 1e-5, "relu", weights, biases, convs
    )
    return total, *outs


def run(fn, tensors, wanted=None):
    """Return outputs, and gradients of the wanted inputs (default: all that exist)."""
    leaves = [None if t is None else t.detach() for t in tensors]
    for i, leaf in enumerate(leaves):
        if leaf is not None and (wanted is None or i in wanted):
            leaf.requires_grad_()
    outputs = fn(*leaves)
    torch.manual_seed(3)
    grads = [torch.randn(o.shape).to(o) for o in outputs]
    used = [(o, grad) for o, grad in zip(outputs, grads, strict=True) if o.requires_grad]
    outputs_used, grads_used = zip(*used, strict=True)
    asked = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return list(outputs), list(torch.autograd.grad(outputs_used, asked, grads_used))


@every_implementation
@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_accuracy(poison, name, device, kind, dtype, residual):
    for samples in ((), (2,)):
        tensors = inputs(dtype, kind, residual, samples)
        tensors = [t if t is None else t.to(device) for t in tensors]
        with bitkern.use_backend(name):
            ours = run(node, tensors)
        peer = run(one_by_one, tensors)
        exact = run(one_by_one, [t if t is None else t.double() for t in tensors])
        for part in range(2):
            for result in zip(ours[part], peer[part], exact[part], strict=True):
                assert_accurate(*(t.cpu() for t in result))


@every_implementation
@pytest.mark.parametrize("wanted", [[0], [1], [2, 3], [4], [5], [0, 4], [0, 1, 5]], ids=str)
def test_only_wanted_gradients(name, device, wanted):
    tensors = [t.to(device) for t in inputs(torch.float32)]
    with bitkern.use_backend(name):
        ours = run(node, tensors, wanted)
    expected = run(one_by_one, tensors, wanted)
    for part in range(2):
        torch.testing.assert_close(ours[part], expected[part], rtol=1e-4, atol=1e-4)


def test_float64_equals_to_the_last_digits():
    tensors = [t.double() for t in inputs(torch.float32)]
    for part in zip(run(node, tensors), run(one_by_one, tensors), strict=True):
        torch.testing.assert_close(*part)


@every_implementation
def test_an_output_that_nobody_uses(name, device):
    tensors = [t.to(device) for t in inputs(torch.float32)]

    def second_only(fn):
        return lambda *leaves: (fn(*leaves)[2],)

    wanted = [0, 1, 2, 3, 5]
    with bitkern.use_backend(name):
        ours = run(second_only(node), tensors, wanted)
    expected = run(second_only(one_by_one), tensors, wanted)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@every_implementation
def test_keeps_its_input_alone(name, device):
    x, residual, *parameters = [t.to(device).requires_grad_() for t in inputs(torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        with bitkern.use_backend(name):
            total, *_ = node(x, residual, *parameters)
    maps_kept = [t for t in kept if t is not None and t.shape == x.shape]
    assert [t.data_ptr() for t in maps_kept] == [total.data_ptr()]
    assert sum(t.numel() for t in kept if t is not None) < x.numel() + 600


def test_errors():
    x, residual, *parameters = inputs(torch.float32)
    with pytest.raises(TypeError, match="weights: expected the dtype and device of x"):
        node(x, residual, *parameters[:2], parameters[2].bfloat16())
    with pytest.raises(ValueError, match=r"weights: expected \(O, C / groups, \*kernel\)"):
        node(x, residual, *parameters[:2], parameters[3])
