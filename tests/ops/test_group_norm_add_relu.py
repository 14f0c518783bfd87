"""group_norm_add_relu on every implementation."""

import pytest
import torch
import torch.nn.functional as F

import bitkern
from bitkern import ops, reference
from bitkern.testing import affine, assert_accurate, maps, pytorch_group_norm, strided
from tests.ops.backends import implementations
from tests.ops.test_group_norm_act import DTYPES, RESIDUALS, SHAPES, X, leaves_of

every_implementation = implementations("group_norm_add_relu", interpreted=True)
uninterpreted = implementations("group_norm_add_relu")
kernels = implementations("group_norm_add_relu", reference=False)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def run(fn, x, residual, num_groups, weight, bias, dy):
    """Return the output and the gradients of one call, by name."""
    leaves = leaves_of(x, residual, weight, bias)
    get = leaves.get
    y = fn(get("dx"), get("dresidual"), num_groups, get("dweight"), get("dbias"))
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def group_norm(x, num_groups, weight, bias, g, dtype):
    """Compute PyTorch's group normalization in a dtype, and its gradients for g."""
    names = "norm", "dx", "dweight", "dbias"
    leaves = [
        None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)
    ]
    norm = pytorch_group_norm(leaves[0], num_groups, *leaves[1:], 1e-5)
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(norm, wanted, g.to(dtype)))
    gradients = [None if leaf is None else next(found) for leaf in leaves]
    return dict(zip(names, (norm.detach(), *gradients), strict=True))


def compare(name, device, x, residual, num_groups, weight, bias):
    """Assert that y is accurate, dresidual is dy where y > 0, the others are group_norm's for it.

    So PyTorch's y, which is 0 where two rounded summands cancel, excuses no gradient of ours.
    """
    tensors = [None if t is None else t.to(device) for t in (x, residual, weight, bias)]
    x, residual, *parameters = tensors
    dy = maps(x.shape, x.dtype, 5, 0.1, constant=False).to(device)
    with bitkern.use_backend(name):
        ours = run(ops.group_norm_add_relu, x, residual, num_groups, *parameters, dy)
    g = torch.where(ours["y"] <= 0, 0.0, dy)
    assert torch.equal(ours["dresidual"], g)
    peer, exact = (
        group_norm(x, num_groups, *parameters, g, dtype) for dtype in (x.dtype, torch.float64)
    )
    for results in (peer, exact):
        results["y"] = F.relu(results["norm"] + residual.to(results["norm"].dtype))
    normalized = reference.group_norm_act(x.double(), num_groups, act="none")
    terms = {"dweight": g.double() * normalized, "dbias": g.double()}
    for key in ours.keys() - {"dresidual"}:
        summed = None
        if key in terms:
            summed = terms[key].abs().reshape(*x.shape[:2], -1).sum(2).cpu()
            summed = summed if ours[key].ndim == 2 else summed.sum(0)
        results = ours[key], peer[key].to(ours[key].dtype), exact[key]
        assert_accurate(*(t.cpu() for t in results), key, summed)
    return ours


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, num_groups", SHAPES, ids=str)
def test_accuracy(poison, name, device, dtype, shape, num_groups):
    x, residual = maps(shape, dtype), maps(shape, dtype, seed=7, shift=-1.0)
    compare(name, device, x, residual, num_groups, *affine(shape[1]))


@every_implementation
@pytest.mark.parametrize("of_residual", ["contiguous", "channels_last", "slice", "transposed"])
@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "slice", "transposed"])
def test_layouts(poison, name, device, kind, of_residual):
    for dtype in DTYPES:
        x = strided(maps((3, 16, 6, 5), dtype), kind)
        residual = strided(maps((3, 16, 6, 5), dtype, seed=7, shift=-1.0), of_residual)
        ours = compare(name, device, x, residual, 4, *affine(16))
        # The gradients of the reference are PyTorch's, in a layout of its choice.
        for key in ("y",) if name == "reference" else ("y", "dx", "dresidual"):
            assert kind not in FORMATS or ours[key].is_contiguous(memory_format=FORMATS[kind]), key


@uninterpreted
@pytest.mark.parametrize("kind", FORMATS)
def test_large_maps(poison, name, device, kind):
    """There are several blocks of work, none of them full."""
    for shape in ((2, 48, 61, 59), (1, 6, 190, 181)):
        x, residual = (strided(maps(shape, torch.bfloat16, seed), kind) for seed in (0, 7))
        compare(name, device, x, residual, 3, *affine(shape[1]))


@every_implementation
def test_affine_dtypes(name, device):
    x, residual = (maps((2, 8, 5, 5), torch.bfloat16, seed) for seed in (0, 7))
    for dtypes in ((torch.float32, torch.bfloat16), (torch.float16, torch.float32)):
        weight, bias = affine(8, dtypes[0])[0], affine(8, dtypes[1])[1]
        ours = compare(name, device, x, residual, 4, weight, bias)
        assert (ours["dweight"].dtype, ours["dbias"].dtype) == dtypes
    compare(name, device, x, residual, 4, None, None)
    for weight, bias in (affine(8), affine(8, samples=(2,))):
        compare(name, device, x, residual, 4, weight, None)
        compare(name, device, x, residual, 4, None, bias)
        compare(name, device, x, residual, 4, weight, affine(8)[1])


@every_implementation
@pytest.mark.parametrize("kind", FORMATS)
def test_mean_far_from_zero(name, device, kind):
    x, residual = (strided(torch.randn(2, 16, 12, 12) + shift, kind) for shift in (1e3, 0.0))
    compare(name, device, x, residual, 4, *affine(16))


@every_implementation
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf(name, device, kind, bad):
    """NaN and inf in x stay in their group, in the residual in their place.

    Where y is NaN, dy passes.
    """
    clean = [maps((3, 8, 6, 6), seed=seed) for seed in (0, 7)]
    parameters = [p.to(device) for p in affine(8)]
    dy = torch.ones(3, 8, 6, 6, device=device)

    def results(x, residual):
        x, residual = (strided(t, kind).to(device) for t in (x, residual))
        with bitkern.use_backend(name):
            return run(ops.group_norm_add_relu, x, residual, 4, *parameters, dy)

    x, residual = (t.clone() for t in clean)
    x[1, 2, 3, 3] = residual[2, 5, 1, 1] = bad
    sound, of_x, of_residual = results(*clean), results(x, clean[1]), results(clean[0], residual)
    group, place = (torch.zeros(3, 8, 6, 6, dtype=torch.bool, device=device) for _ in range(2))
    group[1, 2:4] = place[2, 5, 1, 1] = True
    for key in ("y", "dx", "dresidual"):
        assert torch.equal(of_x[key][~group], sound[key][~group]), key
    assert of_x["y"][group].isnan().all() and of_x["dx"][group].isnan().all()
    for key in ("y", "dresidual"):
        assert torch.equal(of_residual[key][~place], sound[key][~place]), key
    assert of_residual["y"][place].isnan() or of_residual["y"][place] == bad
    assert of_residual["dx"].isfinite().all()  # its group's means are over one gradient more
    for found, where in ((of_x, group), (of_residual, place)):
        assert found["dresidual"][where].eq(1).all()


@every_implementation
@pytest.mark.parametrize("kind", FORMATS)
def test_empty_batch(poison, name, device, kind):
    x, residual = (torch.empty(0, 8, 3, 3, device=device).requires_grad_() for _ in range(2))
    weight, bias = (p.to(device).requires_grad_() for p in affine(8))
    with bitkern.use_backend(name):
        y = ops.group_norm_add_relu(strided(x, kind), residual, 4, weight, bias)
        y.sum().backward()
    assert y.shape == x.grad.shape == residual.grad.shape == x.shape
    assert weight.grad.abs().max() == bias.grad.abs().max() == 0


@kernels
@pytest.mark.parametrize("kind", FORMATS)
def test_gradients_of_any_stride(name, device, kind):
    """Gradients give the same bits as a dense one, whatever their strides.

    They have zero strides as from sum(), are a slice as from cat, or have the other memory format.
    """
    x, residual, dy = (strided(maps((2, 8, 5, 5), seed=s), kind).to(device) for s in (0, 3, 5))
    args = 4, *(p.to(device) for p in affine(8))
    with bitkern.use_backend(name):
        for gradient in (
            torch.ones((), device=device).expand(x.shape),
            *(strided(dy, other).to(device) for other in ("slice", "transposed", *FORMATS)),
        ):
            found = [
                run(ops.group_norm_add_relu, x, residual, *args, each)
                for each in (gradient, strided(gradient, kind))
            ]
            assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@every_implementation
@pytest.mark.parametrize("kind", FORMATS)
def test_only_wanted_gradients(name, device, kind):
    """Gradients asked for alone, or some together, have the same bits as when all are."""
    tensors = [strided(maps((2, 8, 5, 5), seed=seed), kind) for seed in (0, 7)]
    tensors = [t.to(device) for t in (*tensors, *affine(8))]

    def gradients(wanted):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        with bitkern.use_backend(name):
            y = ops.group_norm_add_relu(*leaves[:2], 4, *leaves[2:])
        y.square().sum().backward()
        return [leaf.grad for leaf in leaves]

    everything = gradients(range(4))
    for wanted in ([0], [1], [2], [3], [0, 1], [1, 2], [2, 3], [0, 3], [1, 2, 3]):
        found = gradients(wanted)
        assert [i for i in range(4) if found[i] is not None] == wanted
        assert all(torch.equal(found[i], everything[i]) for i in wanted)


@kernels
def test_what_is_kept(name, device):
    """Backward keeps x, y and small tensors, not the residual."""
    x, residual = (maps((2, 8, 5, 5), seed=seed).to(device).requires_grad_() for seed in (0, 7))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with bitkern.use_backend(name):
            y = ops.group_norm_add_relu(x, residual, 4, *(p.to(device) for p in affine(8)))
    assert {t.data_ptr() for t in kept if t.numel() >= x.numel()} == {x.data_ptr(), y.data_ptr()}
    with bitkern.use_backend(name):
        y = ops.group_norm_add_relu(x, residual, 4)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@kernels
@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_bits_again_and_in_a_batch(name, device, kind):
    for shape in ((5, 64, 15, 15), (3, 32, 40, 40), (9, 256, 7, 7)):
        x, residual, dy = (
            strided(maps(shape, torch.bfloat16, seed), kind).to(device) for seed in (0, 7, 9)
        )
        args = 32, *(p.to(device) for p in affine(shape[1]))

        def results(*maps, args=args):
            with bitkern.use_backend(name):
                return run(ops.group_norm_add_relu, *maps[:2], *args, maps[2])

        first = results(x, residual, dy)
        for _ in range(5):
            again = results(x, residual, dy)
            assert all(torch.equal(again[key], first[key]) for key in first)
        alone = results(*(strided(t[2:3], kind) for t in (x, residual, dy)))
        assert all(torch.equal(alone[key], first[key][2:3]) for key in ("y", "dx", "dresidual"))


@pytest.mark.parametrize("samples", [(), (2,)], ids=str)
def test_functional_transforms(samples):
    """Transforms use the reference, which they can see into."""
    x, residual = (torch.randn(3, 2, 3, 3, 8).permute(0, 1, 4, 2, 3) for _ in range(2))
    args = 4, *affine(8, samples=samples)
    y = torch.vmap(lambda a, b: ops.group_norm_add_relu(a, b, *args))(x, residual)
    for i in range(3):
        torch.testing.assert_close(y[i], ops.group_norm_add_relu(x[i], residual[i], *args))

    def loss(a):
        return ops.group_norm_add_relu(a, residual[0], *args).square().sum()

    leaf = x[0].clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x[0]), leaf.grad)
    grads = torch.vmap(torch.func.grad(loss))(x)
    torch.testing.assert_close(grads[0], leaf.grad)


@uninterpreted
@pytest.mark.parametrize("kind", FORMATS)
def test_opcheck(name, device, kind):
    x, residual = (
        strided(maps((2, 8, 5, 3), seed=seed), kind).to(device).requires_grad_() for seed in (0, 1)
    )
    weight, bias = (p.to(device).requires_grad_() for p in affine(8))
    with bitkern.use_backend(name):
        for args in (
            (x, residual, 4, weight, bias, 1e-5),
            (x.detach(), residual.detach().contiguous().requires_grad_(), 4, None, bias, 1e-5),
        ):
            torch.library.opcheck(torch.ops.bitkern.group_norm_add_relu, args)


@uninterpreted
def test_compile(name, device):
    x, residual = (maps((2, 8, 6, 6), seed=seed).to(device) for seed in (0, 1))
    x = x.contiguous(memory_format=torch.channels_last)
    args = 4, *(p.to(device) for p in affine(8)), torch.randn_like(x)
    # Of the reference Inductor would make code, which takes long.
    backend = "aot_eager" if name == "reference" else "inductor"
    with bitkern.use_backend(name):
        eager = run(ops.group_norm_add_relu, x, residual, *args)
        compiled = torch.compile(ops.group_norm_add_relu, fullgraph=True, backend=backend)
        compiled = run(compiled, x, residual, *args)
    for key in eager:
        torch.testing.assert_close(compiled[key], eager[key])
        assert compiled[key].stride() == eager[key].stride() or name == "reference", key


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (ValueError, "num_groups: expected a divisor of the 8 channels of x, got 3", {"groups": 3}),
        (ValueError, r"x: expected shape \(N, C, \*\), got \(8,\)", {"x": torch.ones(8)}),
        (ValueError, r"weight: expected shape \(8,\)", {"weight": torch.ones(4)}),
        *RESIDUALS,
    ],
)
def test_errors(error, message, arguments):
    x = arguments.get("x", X)
    residual, groups = arguments.get("residual", x), arguments.get("groups", 4)
    with pytest.raises(error, match=message):
        ops.group_norm_add_relu(x, residual, groups, arguments.get("weight"))


def test_a_group_of_one_element():
    """F.group_norm refuses it; the result is relu(bias + residual)."""
    residual, (weight, bias) = torch.randn(1, 4, 1, 1), affine(4)
    y = ops.group_norm_add_relu(torch.randn(1, 4, 1, 1), residual, 4, weight, bias)
    torch.testing.assert_close(y.flatten(), F.relu(bias + residual.flatten()))
