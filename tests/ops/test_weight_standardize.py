"""weight_standardize for one layer and for many, on every implementation."""

import pytest
import torch

import bitkern
from bitkern import ops, reference
from bitkern.testing import assert_accurate, strided
from bitkern.variant import Variant
from tests.ops.backends import implementations
from tests.ops.test_group_norm_act import DTYPES
from tests.ops.test_reference import VARIANTS

every_implementation = implementations("weight_standardize", interpreted=True)
uninterpreted = implementations("weight_standardize")


def filters(shape, dtype=torch.float32, seed=0):
    """Make weights with a small std and a mean that differs by filter; one filter is constant."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    w = w + torch.linspace(-0.5, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    w[shape[0] // 2] = 0.25
    return w.to(dtype)


def pytorch(weight, eps=1e-10, *, gain=None, scale=1.0, eps_outside=False, unbiased=False, dtype):
    """Compute the formula as one would write it in PyTorch, in float32."""
    w = weight.float().flatten(1)
    c = w - w.mean(1, keepdim=True)
    var = c.square().sum(1, keepdim=True) / (w.shape[1] - unbiased)
    out = c / (var.sqrt() + eps if eps_outside else (var + eps).sqrt())
    out = out.view_as(weight) * scale
    return (out if gain is None else out * gain.float()).to(dtype)


def run(fn, weights, gains, dout, **options):
    weights = [w.detach().requires_grad_() for w in weights]
    gains = [g.detach().requires_grad_() for g in gains]
    outs = [fn(w, gain=g, **options) for w, g in zip(weights, gains or [None], strict=True)]
    grads = torch.autograd.grad(outs, weights + gains, dout)
    return outs, grads


@every_implementation
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [(a, b) for a in DTYPES for b in DTYPES if a in (torch.float32, b)],
    ids=str,
)
def test_accuracy(poison, name, device, variant, dtypes):
    shapes = [(5, 3, 7, 7), (8, 17, 1, 1), (6, 9, 3, 3), (4, 1, 3, 3), (3, 130, 2, 5), (3, 7)]
    for shape in shapes:
        w = filters(shape, dtypes[0])
        # A constant filter is excluded here: PyTorch's own gradient is NaN or overflows there.
        w[shape[0] // 2].view(-1)[0] += 0.03
        w = w.to(device)
        options = {k: v for k, v in variant.items() if k != "gain"}
        gains = [torch.randn(shape[0], *[1] * (len(shape) - 1)).to(w)] if "gain" in variant else []
        dout = torch.randn(shape, device=device).to(dtypes[1])
        with bitkern.use_backend(name):
            ours = run(ops.weight_standardize, [w], gains, [dout], dtype=dtypes[1], **options)
        peer = run(pytorch, [w], gains, [dout], dtype=dtypes[1], **options)
        double = [w.double()], [g.double() for g in gains], [dout.double()]
        exact = run(reference.weight_standardize, *double, **options)
        results = [(*outs, *grads) for outs, grads in (ours, peer, exact)]
        for result in zip(*results, strict=True):
            assert_accurate(*(t.cpu() for t in result), f"{shape}")


@every_implementation
@pytest.mark.parametrize("eps_outside", [False, True])
def test_constant_filter(name, device, eps_outside):
    w = filters((4, 3, 3, 3)).to(device).requires_grad_()
    with bitkern.use_backend(name):
        out = ops.weight_standardize(w, 1e-5, eps_outside=eps_outside)
        (dw,) = torch.autograd.grad(out, w, torch.randn_like(out))
    assert out[2].abs().max() == 0
    assert dw.isfinite().all()


@every_implementation
@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("out_channels_last", [False, True])
def test_layouts(poison, name, device, kind, out_channels_last):
    w = strided(filters((6, 35, 3, 5)), kind).to(device)
    g = torch.randn(6, 35, 3, 5, device=device)
    (exact,), (dexact,) = run(reference.weight_standardize, [w], [], [g])
    for gradient in (g, strided(g, "channels_last"), strided(g, "slice")):
        w.requires_grad_()
        with bitkern.use_backend(name):
            (out,) = ops.weight_standardize_all([w], channels_last=out_channels_last)
            (dw,) = torch.autograd.grad(out, w, gradient)
        format = torch.channels_last if out_channels_last else torch.contiguous_format
        assert out.is_contiguous(memory_format=format)
        torch.testing.assert_close(out, exact)
        torch.testing.assert_close(dw, dexact, rtol=1e-4, atol=1e-3)


@every_implementation
def test_many_layers_equal_one_by_one(name, device):
    """Bits are equal, except with Triton, where the number of warps suits a layer alone."""
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if name == "triton" else {"rtol": 0, "atol": 0}
    shapes = [(7, 3, 7, 7), (16, 8, 1, 1), (5, 4, 3, 3), (33, 2, 3, 3)]
    weights = [filters(s, seed=i).to(device).requires_grad_() for i, s in enumerate(shapes)]
    gains = [torch.randn(s[0], 1, 1, 1, device=device, requires_grad=True) for s in shapes]
    scales = [0.5, 1.0, 2.0, 0.1]
    douts = [torch.randn(s, device=device) for s in shapes]
    with bitkern.use_backend(name):
        outs = ops.weight_standardize_all(weights, Variant(1e-5), gains=gains, scales=scales)
        grads = torch.autograd.grad(outs, weights + gains, douts)
        for i, w in enumerate(weights):
            out = ops.weight_standardize(w, 1e-5, gain=gains[i], scale=scales[i])
            found = out, *torch.autograd.grad(out, (w, gains[i]), douts[i])
            for a, b in zip(found, (outs[i], grads[i], grads[len(weights) + i]), strict=True):
                torch.testing.assert_close(a, b, **tolerance)


def test_no_layers():
    assert ops.weight_standardize_all([]) == []


@every_implementation
def test_nan_stays_in_its_filter(name, device):
    w = filters((5, 3, 3, 3))
    w[3, 1] = float("nan")
    with bitkern.use_backend(name):
        out = ops.weight_standardize(w.to(device))
    assert out[3].isnan().all()
    assert out[[0, 1, 2, 4]].isfinite().all()


@uninterpreted
def test_opcheck(name, device):
    a, b = (filters((4, 3, 3, 3), seed=s).to(device).requires_grad_() for s in (0, 1))
    g = torch.randn(4, 1, 1, 1, device=device, requires_grad=True)
    b_last = strided(b.detach(), "channels_last").requires_grad_()
    op = torch.ops.bitkern.weight_standardize
    with bitkern.use_backend(name):
        torch.library.opcheck(op, ([a], [g], [0.5], 1e-5, True, True, torch.float32, False))
        torch.library.opcheck(
            op, ([a, b_last], [], [1.0, 0.5], 1e-5, False, False, torch.bfloat16, True)
        )


@uninterpreted
def test_compile(name, device):
    w = filters((6, 4, 3, 3)).to(device)
    w[3, 0] += 0.03
    dout = torch.randn(6, 4, 3, 3, device=device)
    with bitkern.use_backend(name):
        eager = run(ops.weight_standardize, [w], [], [dout])
        fn = torch.compile(ops.weight_standardize, fullgraph=True)
        compiled = run(fn, [w], [], [dout])
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-3)


W = torch.ones(3, 3)


@pytest.mark.parametrize(
    "error, message, weight, options",
    [
        (ValueError, r"weight: expected shape \(O, I, \*kernel\)", W[0], {}),
        (TypeError, "weight: expected a floating", W.long(), {}),
        (ValueError, "gain: expected one element", W, {"gain": torch.ones(2)}),
        (ValueError, "gain: expected the dtype", W, {"gain": torch.ones(3).bfloat16()}),
        (ValueError, "unbiased: expected filters of two", W[:, :1], {"unbiased": True}),
        (TypeError, "dtype: expected a floating", W, {"dtype": torch.int32}),
        (TypeError, "dtype: float64 needs", W, {"dtype": torch.float64}),
    ],
)
def test_errors(error, message, weight, options):
    with pytest.raises(error, match=message):
        ops.weight_standardize(weight, **options)


def test_errors_of_many():
    with pytest.raises(ValueError, match="scales: expected 2, one per weight, got 1"):
        ops.weight_standardize_all([W, W], scales=[1.0])
    with pytest.raises(ValueError, match="weights: expected one dtype and device"):
        ops.weight_standardize_all([W, W.bfloat16()])
    with pytest.raises(ValueError, match="channels_last: expected weights"):
        ops.weight_standardize_all([W], channels_last=True)
