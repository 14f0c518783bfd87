"""Compare the reference with formulas written out once more, and with its own derivatives."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

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


def options(variant, filters):
    variant = dict(variant)
    if "gain" in variant:
        variant["gain"] = torch.randn(filters, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    return variant


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_weight_standardize_formula(variant):
    w = torch.randn(5, 3, 3, 2, dtype=torch.float64) * 0.02 + 0.5
    variant = options(variant, 5)
    out = reference.weight_standardize(w, **variant)
    eps = variant.get("eps", 1e-10)
    for filter, result in enumerate(out.detach()):
        v = w[filter]
        var = v.var(correction=int(variant.get("unbiased", False)))
        d = var.sqrt() + eps if variant.get("eps_outside") else (var + eps).sqrt()
        expected = (v - v.mean()) / d * variant.get("scale", 1.0)
        if "gain" in variant:
            expected = expected * variant["gain"].detach()[filter]
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_weight_standardize_gradcheck(variant):
    w = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    variant = options(variant, 3)
    gain = variant.pop("gain", None)

    def fn(w, gain):
        return reference.weight_standardize(w, gain=gain, **variant)

    assert torch.autograd.gradcheck(fn, (w, gain))
    assert torch.autograd.gradgradcheck(fn, (w, gain))


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


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_group_norm_act_gradcheck(act):
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    r = torch.randn_like(x, requires_grad=True)
    weight, bias = (p.requires_grad_() for p in affine(4, torch.float64))

    def fn(x, r, weight, bias):
        return reference.add_group_norm_act(x, r, 2, weight, bias, 1e-5, act)

    assert torch.autograd.gradcheck(fn, (x, r, weight, bias))
    assert torch.autograd.gradgradcheck(fn, (x, r, weight, bias))


def test_group_norm_add_relu_formula():
    x, residual = (maps((2, 6, 5, 3), torch.float64, seed) for seed in (0, 7))
    weight, bias = affine(6, torch.float64)
    norm = reference.group_norm_act(x, 3, weight, bias, 1e-3, "none")
    y = reference.group_norm_add_relu(x, residual, 3, weight, bias, 1e-3)
    torch.testing.assert_close(y, (norm + residual).clamp_min(0))


def test_group_norm_add_relu_gradcheck():
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    r = torch.randn_like(x, requires_grad=True)
    weight, bias = (p.requires_grad_() for p in affine(4, torch.float64))

    def fn(x, r, weight, bias):
        return reference.group_norm_add_relu(x, r, 2, weight, bias)

    assert torch.autograd.gradcheck(fn, (x, r, weight, bias))
    assert torch.autograd.gradgradcheck(fn, (x, r, weight, bias))


def test_ws_conv2d_formula():
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    w = torch.randn(6, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(6, dtype=torch.float64)
    y = reference.ws_conv2d(x, w, b, stride=2, padding=1, groups=2)
    mean = w.mean((1, 2, 3), keepdim=True)
    std = (w.var((1, 2, 3), correction=0, keepdim=True) + 1e-10).sqrt()
    torch.testing.assert_close(y, F.conv2d(x, (w - mean) / std, b, 2, 1, 1, 2))
    assert torch.autograd.gradcheck(
        lambda w: reference.ws_conv2d(x, w, b, stride=2, padding=1, groups=2), (w,)
    )


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
    y = reference.group_norm_add_relu(x, r, 4, weight, bias)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, r, weight, bias), dy)
    x, r, w, b = (t.detach() for t in (x, r, weight, bias))
    y2, mean, rstd = reference.group_norm_add_relu_forward(x, r, 4, w, b, 1e-5)
    torch.testing.assert_close(y2, y)
    grads = reference.group_norm_add_relu_backward(dy, x, y, 4, w, b, mean, rstd, True, True, True)
    torch.testing.assert_close(grads, expected)
    assert all(t.is_contiguous(memory_format=format) for t in (y2, *grads[:2]))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_weight_standardize_launcher_formulas(variant):
    weights = [torch.randn(n, 3, 2, 2, dtype=torch.float64, requires_grad=True) for n in (4, 6)]
    variant = dict(variant)
    scale = variant.pop("scale", 1.0)
    gains = None
    if variant.pop("gain", False):
        gains = [torch.randn(n, 1, 1, 1, dtype=torch.float64, requires_grad=True) for n in (4, 6)]
    eps = variant.get("eps", 1e-10)
    flags = variant.get("eps_outside", False), variant.get("unbiased", False)
    shared = Variant(eps, *flags)
    detached = [w.detach() for w in weights], gains and [g.detach() for g in gains]
    outs, stats = reference.weight_standardize_forward(
        *detached, [scale, scale], shared, torch.float64, True
    )
    douts = [torch.randn_like(out) for out in outs]
    dweights, dgains = reference.weight_standardize_backward(
        douts, *detached, [scale, scale], stats, shared
    )
    for i, w in enumerate(weights):
        gain = gains and gains[i]
        expected = reference.weight_standardize(w, gain=gain, scale=scale, **variant)
        torch.testing.assert_close(outs[i], expected)
        inputs = (w,) if gain is None else (w, gain)
        grads = torch.autograd.grad(expected, inputs, douts[i])
        torch.testing.assert_close(dweights[i], grads[0])
        if gain is not None:
            torch.testing.assert_close(dgains[i], grads[1])


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
