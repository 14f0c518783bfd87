"""group_norm_act and add_group_norm_act on every implementation."""

import pytest
import torch
import torch.nn.functional as F

import bitkern
from bitkern import ops, reference
from bitkern.backends import launchers
from bitkern.testing import affine, assert_accurate, maps, pytorch_group_norm, strided
from tests import interpreter
from tests.ops.backends import implementations

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTS = ["relu", "silu", "none"]
SHAPES = [
    ((2, 32, 9, 7), 32),
    ((1, 64, 14, 14), 32),
    ((3, 12, 5, 3), 4),  # 3 channels per group
    ((2, 9, 6, 5), 3),  # a block of two groups, and one of the third alone
    ((2, 10, 1, 1), 2),  # one pixel
    ((1, 6, 33, 2), 1),  # one group
    ((2, 96, 8, 8), 8),
    ((1, 256, 4, 5), 2),  # 128 channels per group
    ((4, 8), 4),
    ((2, 8, 11), 4),
    ((2, 8, 3, 5, 2), 4),
]
every_implementation = implementations("group_norm_act", interpreted=True)
# What takes long in an interpreter, or is not about the kernels.
uninterpreted = implementations("group_norm_act")
# Promised of the kernels: PyTorch's own code makes no such promises.
kernels = implementations("group_norm_act", reference=False)


def leaves_of(x, residual, weight, bias):
    """Return copies of the tensors that are there, by the names of their gradients."""
    given = {"dx": x, "dresidual": residual, "dweight": weight, "dbias": bias}
    return {k: t.detach().clone().requires_grad_() for k, t in given.items() if t is not None}


def run(fn, x, residual, num_groups, weight, bias, act, grads, eps=1e-5):
    """Return outputs and gradients of one call, by name."""
    leaves = leaves_of(x, residual, weight, bias)
    get = leaves.get
    affine = get("dweight"), get("dbias")
    if residual is None:
        outputs = {"y": fn[0](leaves["dx"], num_groups, *affine, eps, act)}
    else:
        pair = fn[1](leaves["dx"], leaves["dresidual"], num_groups, *affine, eps, act)
        outputs = dict(zip(("total", "y"), pair, strict=True))
    results = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), [grads[k] for k in outputs]
    )
    return outputs | dict(zip(leaves, results, strict=True))


def pytorch_group_norm_act(x, num_groups, weight, bias, eps, act):
    """Compute the operator as one would write it in PyTorch, in the dtype of x."""
    return reference.ACTIVATIONS[act](pytorch_group_norm(x, num_groups, weight, bias, eps))


def pytorch_add_group_norm_act(x, residual, *args):
    total = x + residual
    return total, pytorch_group_norm_act(total, *args)


def summed(x, num_groups, weight, bias, act, dy):
    """Return sums of absolute values of the terms of dweight and dbias."""
    normalized = reference.group_norm_act(x, num_groups, act="none")
    every = torch.ones_like(x)
    ones = [1] * (x.ndim - 2)
    terms = [
        ((default if p is None else p.reshape(*p.shape, *ones)) * every).requires_grad_()
        for p, default in ((weight, 1.0), (bias, 0.0))
    ]
    y = reference.ACTIVATIONS[act](normalized * terms[0] + terms[1])
    sums = (g.abs().reshape(*x.shape[:2], -1).sum(2) for g in torch.autograd.grad(y, terms, dy))
    return {
        name: terms if p is not None and p.ndim == 2 else terms.sum(0)
        for name, p, terms in zip(("dweight", "dbias"), (weight, bias), sums, strict=True)
    }


OURS = ops.group_norm_act, ops.add_group_norm_act
PYTORCH = pytorch_group_norm_act, pytorch_add_group_norm_act
REFERENCE = reference.group_norm_act, reference.add_group_norm_act


def compare(name, device, x, residual, num_groups, weight, bias, act):
    # No channel of dy is constant: where that of x is as well, dx is 0, and which float32 formula
    # gets it to the last bit is chance.
    grads = {
        k: maps(x.shape, x.dtype, seed, 0.1, constant=False) for k, seed in (("y", 5), ("total", 6))
    }
    args = [
        t if t is None or isinstance(t, str | int) else t.to(device)
        for t in (x, residual, num_groups, weight, bias, act)
    ]
    grads = {k: g.to(device) for k, g in grads.items()}
    with bitkern.use_backend(name):
        ours = run(OURS, *args, grads)
    peer = run(PYTORCH, *args, grads)
    double = [t.double() if isinstance(t, torch.Tensor) else t for t in args]
    if residual is not None:  # the statistics are those of the rounded sum
        rounded = args[0] + args[1]
        double[0], double[1] = rounded.double(), torch.zeros_like(double[1])
    exact = run(REFERENCE, *double, {k: g.double() for k, g in grads.items()})
    sums = summed(double[0], num_groups, *double[3:5], act, grads["y"].double())
    # The peer is PyTorch on the CPU, whose exponential is more accurate than that of any GPU.
    roundings = 4 if interpreter.EXECUTED and act == "silu" else 1
    for key in exact:
        results = ours[key], peer[key].to(ours[key].dtype), exact[key]
        terms = sums[key].cpu() if key in sums else None
        assert_accurate(*(t.cpu() for t in results), key, terms, roundings)
    return ours


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, num_groups", SHAPES, ids=str)
def test_accuracy(poison, name, device, dtype, shape, num_groups):
    for act in ACTS:
        x, residual = maps(shape, dtype), maps(shape, dtype, seed=7, shift=-1.0)
        weight, bias = affine(shape[1])
        compare(name, device, x, None, num_groups, weight, bias, act)
        compare(name, device, x, residual, num_groups, weight, bias, act)


@every_implementation
@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "slice", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(poison, name, device, kind, dtype):
    x, residual = strided(maps((3, 16, 6, 5), dtype), kind), maps((3, 16, 6, 5), dtype, seed=7)
    weight, bias = affine(16)
    ours = compare(name, device, x, residual, 4, weight, bias, "relu")
    if kind in ("contiguous", "channels_last"):
        format = torch.channels_last if kind == "channels_last" else torch.contiguous_format
        # The gradient of the reference is PyTorch's, in a layout of its choice.
        for key in ("total", "y") if name == "reference" else ("total", "y", "dx"):
            assert ours[key].is_contiguous(memory_format=format), key


@uninterpreted
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recompute(poison, name, device, format, dtype):
    """Recomputes y from the statistics that the forward returned."""
    implementation = launchers(name, "group_norm_act")
    for shape, samples in (((0, 6, 3, 3), ()), ((3, 6, 7, 5), (3,)), ((1, 64, 61, 59), ())):
        x = maps(shape, dtype).to(device, memory_format=format)
        affine_ = [p.to(device) for p in affine(shape[1], samples=samples)]
        for act in ACTS:
            y, mean, rstd = implementation.group_norm_act_forward(x, None, 2, *affine_, 1e-5, act)[
                1:
            ]
            again = implementation.group_norm_act_recompute(x, 2, *affine_, mean, rstd, act)
            peer, exact = (
                reference.group_norm_act(x.to(t), 2, *(p.to(t) for p in affine_), act=act)
                for t in (dtype, torch.float64)
            )
            assert again.shape == y.shape
            assert again.stride() == x.stride() or x.numel() == 0
            assert_accurate(again, peer, exact, act)


@every_implementation
def test_affine_dtypes(name, device):
    x = maps((2, 8, 5, 5), torch.bfloat16)
    for dtypes in ((torch.float32, torch.bfloat16), (torch.float16, torch.float32)):
        weight, bias = affine(8, dtypes[0])[0], affine(8, dtypes[1])[1]
        ours = compare(name, device, x, None, 4, weight, bias, "relu")
        assert (ours["dweight"].dtype, ours["dbias"].dtype) == dtypes
    compare(name, device, x, None, 4, None, None, "silu")
    compare(name, device, x, None, 4, affine(8)[0], None, "relu")


@every_implementation
@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_of_each_sample(poison, name, device, kind, dtype):
    for shape, groups, act in (((3, 12, 5, 3), 4, "relu"), ((1, 6, 33, 2), 1, "silu")):
        x, residual = strided(maps(shape, dtype), kind), maps(shape, dtype, seed=7, shift=-1.0)
        weight, bias = affine(shape[1], samples=shape[:1])
        for each in ((weight, bias), (weight, None), (None, bias), (weight, bias[0])):
            ours = compare(name, device, x, None, groups, *each, act)
            assert ours["dweight" if each[0] is not None else "dbias"].shape == shape[:2]
        compare(name, device, x, residual, groups, weight[0], bias, act)


@every_implementation
def test_parameters_of_any_stride(name, device):
    x, wide = maps((3, 16, 5, 3)).to(device), affine(32, samples=(3,))[0].to(device)
    for weight, bias in (
        (wide[0, ::2], wide[1, 1::2]),
        (wide[:, :1].expand(3, 16), wide.reshape(32, 3)[16:].t()),
    ):
        results = []
        for backend in (name, "reference"):
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
            with bitkern.use_backend(backend):
                y = ops.group_norm_act(leaves[0], 4, *leaves[1:], act="silu")
            results.append([y, *torch.autograd.grad(y, leaves, torch.sin(x))])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@every_implementation
@pytest.mark.parametrize("shift", [100.0, 1000.0])
def test_mean_far_from_zero(name, device, shift):
    x = torch.randn(2, 16, 12, 12) + shift
    for kind in ("contiguous", "channels_last"):
        compare(name, device, strided(x, kind), None, 4, *affine(16), "relu")


@every_implementation
def test_many_channels(name, device):
    """There are more channels than a block on the CPU has elements."""
    compare(name, device, maps((2, 40000)), None, 4, None, None, "none")


@every_implementation
def test_zero_variance(name, device):
    x = torch.randn(2, 8, 4, 4)
    x[0, :4] = 2.0
    ours = compare(name, device, x, None, 2, *affine(8), "relu")
    assert all(t.isfinite().all() for t in ours.values())


@every_implementation
@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_sample(name, device, kind, bad):
    x = maps((3, 8, 6, 6))
    x[1, 2, 3, 3] = bad
    weight, bias = affine(8)
    x = strided(x, kind).to(device).requires_grad_()
    with bitkern.use_backend(name):
        y = ops.group_norm_act(x, 4, weight.to(device), bias.to(device))
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for t in (y, dx):
        assert t[1, 2:4].isnan().any()
        assert t[[0, 2]].isfinite().all()
        assert t[1, 4:].isfinite().all()  # other groups


@every_implementation
def test_empty_batch(poison, name, device):
    shape = (0, 8, 3, 3)
    for format, samples in ((torch.contiguous_format, ()), (torch.channels_last, (0,))):
        x = torch.empty(shape, device=device).contiguous(memory_format=format).requires_grad_()
        weight, bias = (p.to(device).requires_grad_() for p in affine(8, samples=samples))
        with bitkern.use_backend(name):
            total, y = ops.add_group_norm_act(x, x.detach(), 4, weight, bias)
            (total.sum() + y.sum()).backward()
        assert y.shape == x.grad.shape == shape
        assert weight.grad.shape == bias.grad.shape == (*samples, 8)
        assert weight.grad.abs().sum() == bias.grad.abs().sum() == 0


@every_implementation
def test_gradients_of_any_stride(name, device):
    """Covers zero-stride gradients from sum(), and a loss on one of the two outputs only."""
    x, residual = maps((2, 8, 5, 5)).to(device), maps((2, 8, 5, 5), seed=3).to(device)
    weight, bias = (p.to(device) for p in affine(8))

    def grads(fn, pick):
        leaves = [t.detach().clone().requires_grad_() for t in (x, residual, weight, bias)]
        outputs = fn(leaves[0], leaves[1], 4, leaves[2], leaves[3])
        sum(o.sum() for o in outputs[pick]).backward()
        return [leaf.grad for leaf in leaves]

    for pick in (slice(0, 2), slice(1, 2)):
        with bitkern.use_backend(name):
            ours = grads(ops.add_group_norm_act, pick)
        for got, expected in zip(ours, grads(reference.add_group_norm_act, pick), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with bitkern.use_backend(name):
        dx, dresidual, dweight, _ = grads(ops.add_group_norm_act, slice(0, 1))
    assert dx.eq(1).all() and dresidual.eq(1).all() and dweight is None


@every_implementation
def test_only_wanted_gradients(name, device):
    x, (weight, bias) = maps((2, 8, 5, 5)).to(device), affine(8)
    for wanted in ([0], [1], [2], [1, 2], [0, 2]):
        leaves = [x.clone(), weight.clone().to(device), bias.clone().to(device)]
        for i in wanted:
            leaves[i].requires_grad_()
        with bitkern.use_backend(name):
            ops.group_norm_act(leaves[0], 4, leaves[1], leaves[2]).square().sum().backward()
        assert [i for i in range(3) if leaves[i].grad is not None] == wanted


@kernels
def test_a_sample_does_not_depend_on_its_batch(name, device):
    for kind in ("contiguous", "channels_last"):
        for shape in ((5, 64, 15, 15), (3, 32, 40, 40), (9, 256, 7, 7)):
            x = strided(maps(shape, torch.bfloat16), kind).to(device)
            weight, bias = (p.to(device) for p in affine(shape[1]))
            with bitkern.use_backend(name):
                batch = ops.group_norm_act(x, 32, weight, bias)
                alone = ops.group_norm_act(strided(x[2:3], kind), 32, weight, bias)
            assert torch.equal(batch[2:3], alone)


@every_implementation
def test_autocast_keeps_the_dtype(name, device):
    weight, bias = (p.to(device) for p in affine(8))
    for dtype in (torch.float32, torch.bfloat16):
        x = maps((2, 8, 5, 5), dtype).to(device)
        with bitkern.use_backend(name), torch.autocast(device, torch.bfloat16):
            assert ops.group_norm_act(x, 4, weight, bias).dtype == dtype
            assert ops.group_norm_add_relu(x, x, 4, weight, bias).dtype == dtype


@uninterpreted
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(name, device, format):
    x, residual = (
        maps((2, 8, 5, 3), seed=s).to(device).contiguous(memory_format=format).requires_grad_()
        for s in (0, 1)
    )
    weight, bias = (p.to(device).requires_grad_() for p in affine(8))
    weights = affine(8, samples=(2,))[0].t().contiguous().t().to(device).requires_grad_()
    with bitkern.use_backend(name):
        for args in (
            (x, None, 4, weight, bias, 1e-5, "relu"),
            (x, residual, 4, weights, None, 1e-5, "silu"),
        ):
            torch.library.opcheck(torch.ops.bitkern.group_norm_act, args)


@uninterpreted
def test_compile(name, device):
    # The reference is compiled by Inductor, whose float32 statistics differ from eager's.
    dtype = torch.float64 if name == "reference" else torch.float32
    x, residual = (
        maps((2, 8, 6, 6), dtype, seed=s).to(device).contiguous(memory_format=torch.channels_last)
        for s in (0, 1)
    )
    weight, bias = affine(8, dtype)[0].to(device), affine(8, dtype, samples=(2,))[1].to(device)
    grads = {"y": torch.randn_like(x), "total": torch.randn_like(x)}
    with bitkern.use_backend(name):
        eager = run(OURS, x, residual, 4, weight, bias, "relu", grads)
        compiled_ops = [torch.compile(op, fullgraph=True) for op in OURS]
        compiled = run(compiled_ops, x, residual, 4, weight, bias, "relu", grads)
    for key in eager:
        torch.testing.assert_close(compiled[key], eager[key])
        assert compiled[key].stride() == eager[key].stride(), key


X = torch.ones(2, 8, 3, 3)
RESIDUALS = [
    (ValueError, "residual: expected the shape of x", {"residual": torch.ones(2, 8, 3, 4)}),
    (TypeError, "residual: expected the dtype of x", {"residual": X.bfloat16()}),
    (ValueError, "residual: expected the device of x", {"residual": X.to("meta")}),
    (TypeError, "residual: expected a tensor, got None", {"residual": None}),
]


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (ValueError, "act: expected one of relu, .*, none, got 'tanh'", {"act": "tanh"}),
        (ValueError, "num_groups: expected a divisor of the 8 channels of x, got 3", {"groups": 3}),
        (ValueError, r"x: expected shape \(N, C, \*\), got \(8,\)", {"x": torch.ones(8)}),
        (ValueError, "x: expected at least one pixel", {"x": torch.ones(2, 8, 0, 3)}),
        (TypeError, "x: expected a floating dtype", {"x": torch.ones(2, 8, dtype=torch.int64)}),
        (ValueError, r"weight: expected shape \(8,\)", {"weight": torch.ones(4)}),
        (ValueError, r"weight: .* \(8,\) or \(2, 8\) .*, got \(1, 8\)", {"weight": X[:1, :, 0, 0]}),
        (ValueError, "bias: expected shape", {"bias": torch.ones(2, 8, 1, 1)}),
        (TypeError, "bias: expected a floating dtype", {"bias": torch.ones(8, dtype=torch.int)}),
        (ValueError, "weight: expected the device", {"weight": torch.ones(8, device="meta")}),
        *RESIDUALS,
    ],
)
def test_errors(error, message, arguments):
    x = arguments.get("x", X)
    groups, weight, bias = (arguments.get(k) for k in ("groups", "weight", "bias"))
    args = groups or 4, weight, bias, 1e-5, arguments.get("act", "relu")
    with pytest.raises(error, match=message):
        if "residual" in arguments:
            ops.add_group_norm_act(x, arguments["residual"], *args)
        else:
            ops.group_norm_act(x, *args)


def test_group_of_one_element():
    """F.group_norm refuses it; the result is act(bias)."""
    y = ops.group_norm_act(torch.randn(1, 4, 1, 1), 4, *affine(4))
    torch.testing.assert_close(y.flatten(), F.relu(affine(4)[1]))
