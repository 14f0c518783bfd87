"""Compare the reference with formulas written out once more, and with its own derivatives."""

from itertools import product

import pytest
import torch

from bitkern import reference
from bitkern.testing import affine, maps
from bitkern.variant import Variant
from tests.backends import standardization

VARIANTS = [
    {},
    {"eps": 1e-8},
    {"eps": 1e-5, "eps_outside": True, "unbiased": True},
    {"eps": 1e-5, "eps_outside": True},
    {"eps": 1e-5, "gain": True, "scale": 0.7},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_weight_standardize_formula(variant):
    w = torch.randn(5, 3, 3, 2, dtype=torch.float64) * 0.02 + 0.5
    gain = torch.randn(5, 1, 1, 1).double() if "gain" in variant else None
    out = reference.weight_standardize(w, **variant | {"gain": gain})
    eps = variant.get("eps", 1e-10)
    for filter, result in enumerate(out):
        v = w[filter]
        var = v.var(correction=int(variant.get("unbiased", False)))
        d = var.sqrt() + eps if variant.get("eps_outside") else (var + eps).sqrt()
        expected = (v - v.mean()) / d * variant.get("scale", 1.0)
        if gain is not None:
            expected = expected * gain[filter]
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("eps_outside", [False, True])
def test_weight_standardize_constant_filter(eps_outside):
    w = torch.randn(3, 2, 3, 3)
    w[1] = 0.25
    w.requires_grad_()
    out = reference.weight_standardize(w, 1e-5, eps_outside=eps_outside)
    (out * torch.randn_like(out)).sum().backward()
    assert out[1].abs().max() == 0
    assert w.grad.isfinite().all()


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_group_norm_act_formula(act):
    x = maps((2, 6, 5, 3), torch.float64)
    weight, bias = affine(6, torch.float64)[0], affine(6, torch.float64, samples=(2,))[1]
    y = reference.group_norm_act(x, 3, weight, bias, 1e-3, act)
    g = x.reshape(2, 3, -1)
    g = (g - g.mean(2, keepdim=True)) / (g.var(2, correction=0, keepdim=True) + 1e-3).sqrt()
    z = g.reshape(x.shape) * weight[:, None, None] + bias[:, :, None, None]
    expected = {
        "relu": z.clamp_min(0),
        "silu": z / (1 + (-z).exp()),
        "leaky_relu": torch.maximum(z, z / 100),
        "gelu": z / 2 * (1 + (z / 2**0.5).erf()),
        "mish": z * z.exp().log1p().tanh(),
        "hardswish": z * (z + 3).clamp(0, 6) / 6,
        "none": z,
    }[act]
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_group_norm_act_launcher_formulas(format):
    """Compare the explicit forward and backward with autograd of the plain function."""
    x = maps((3, 8, 5, 4), torch.float64).contiguous(memory_format=format).requires_grad_()
    r = torch.randn_like(x, requires_grad=True)
    dtotal, dy = torch.randn_like(x), torch.randn_like(x)
    for act, samples in product(reference.ACTIVATIONS, ((), (3,))):
        weight, bias = (p.requires_grad_() for p in affine(8, torch.float64, samples=samples))
        total, y = reference.add_group_norm_act(x, r, 4, weight, bias, 1e-5, act)
        expected = torch.autograd.grad((total, y), (x, weight, bias), (dtotal, dy))
        args = (t.detach() for t in (x, r))
        w, b = weight.detach(), bias.detach()
        total, y2, mean, rstd = reference.group_norm_act_forward(*args, 4, w, b, 1e-5, act)
        torch.testing.assert_close(y2, y)
        grads = reference.group_norm_act_backward(
            dy, dtotal, total, 4, w, b, mean, rstd, act, True, True
        )
        torch.testing.assert_close(grads, expected)
        assert grads[0].is_contiguous(memory_format=format)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_group_norm_add_relu_launcher_formulas(format):
    x, r = (
        maps((3, 8, 5, 4), torch.float64, seed).to(memory_format=format).requires_grad_()
        for seed in (0, 7)
    )
    weight, bias = (p.requires_grad_() for p in affine(8, torch.float64))
    y = reference.group_norm_add_relu(x, r, 4, weight, bias, 1e-3)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, r, weight, bias), dy)
    x, r, w, b = (t.detach() for t in (x, r, weight, bias))
    y2, mean, rstd = reference.group_norm_add_relu_forward(x, r, 4, w, b, 1e-3)
    torch.testing.assert_close(y2, y)
    grads = reference.group_norm_add_relu_backward(dy, x, y, 4, w, b, mean, rstd, True, True, True)
    torch.testing.assert_close(grads, expected)
    assert all(t.is_contiguous(memory_format=format) for t in (y2, *grads[:2]))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_weight_standardize_launcher_formulas(variant):
    weights = [torch.randn(n, 3, 2, 2, dtype=torch.float64) for n in (4, 6)]
    gains = [torch.randn(n, 1, 1, 1, dtype=torch.float64) for n in (4, 6)]
    gains = gains if "gain" in variant else None
    scales = [variant.get("scale", 1.0)] * 2
    flags = variant.get("eps_outside", False), variant.get("unbiased", False)
    shared = Variant(variant.get("eps", 1e-10), *flags)
    outs, stats = reference.weight_standardize_forward(
        weights, gains, scales, shared, torch.float64, True
    )
    douts = [torch.randn_like(out) for out in outs]
    found = reference.weight_standardize_backward(douts, weights, gains, scales, stats, shared)
    for i, dout in enumerate(douts):
        leaves = [p[i].requires_grad_() for p in (weights, gains) if p]
        gain = gains and gains[i]
        expected = reference.weight_standardize(weights[i], **variant | {"gain": gain})
        torch.testing.assert_close(outs[i], expected)
        grads = torch.autograd.grad(expected, leaves, dout)
        torch.testing.assert_close([p[i] for p in found if p], [*grads])


@pytest.mark.parametrize("options", standardization.SGD)
def test_weight_standardize_sgd_is_a_step_of_pytorch(options):
    shapes, options = [(4, 3, 2, 2), (6, 5)], standardization.SGD[options]
    case = standardization.Problem(reference, "cpu", shapes, torch.float64, eps=1e-3)
    buffers = [torch.randn_like(w) for w in case.weights]
    expected = [case.stepped(i, torch.float64, b, options) for i, b in enumerate(buffers)]
    stats = reference.filter_statistics(case.weights, case.variant)
    args = buffers, case.scales, stats, case.variant, options
    reference.weight_standardize_sgd(case.douts, case.weights, *args)
    torch.testing.assert_close([*zip(case.weights, buffers, strict=True)], expected)
