"""The Triton kernels of group_norm_act against float64: interpreted, or on a GPU where one is."""

import pytest
import torch

from bitkern import reference
from bitkern.backends.triton import config
from bitkern.backends.triton import group_norm_act as kernels
from bitkern.testing import affine, assert_accurate, maps, pytorch_group_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
EPS = 1e-5
WAYS = "for", "back"

pytestmark = pytest.mark.usefixtures("poison")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
formats = pytest.mark.parametrize("format", FORMATS)


ways = pytest.mark.parametrize("way", ["on_chip", "whole", "split"], indirect=True)
# Small maps stay on chip: tests/ops has them.
tiled = pytest.mark.parametrize("way", ["whole", "split"], indirect=True)


def set_way(monkeypatch, way):
    """Make the plans for these small sizes the same as for large ones."""
    # A resident map has a few tiles only.
    tile = 1 << 20 if way == "on_chip" else 2048
    monkeypatch.setattr(config, "TILE_BYTES", tile)
    monkeypatch.setattr(config, "RESIDENT_BYTES", 1 << 20 if way == "whole" else 0)
    monkeypatch.setattr(config, "TILES_PER_SPLIT", 1)
    monkeypatch.setattr(config, "MAX_SPLITS", 4)
    config.group_norm_plan.cache_clear()


def kinds(launches):
    """Return the kernels of forward and backward that were launched."""
    names = {name for name, _, _ in launches}
    kinds = {name.partition("ward_")[2] for name in names if "ward_" in name}
    assert all(f"group_norm_act_{way}ward_{kind}" in names for kind in kinds for way in WAYS)
    return kinds


@pytest.fixture
def way(request, monkeypatch, launches):
    """Set each way through the kernels; after the test, assert that it was taken."""
    set_way(monkeypatch, request.param)
    yield request.param
    config.group_norm_plan.cache_clear()
    assert kinds(launches) == ({"reduce", "apply"} if request.param == "split" else {request.param})


class Problem:
    """Inputs of forward and backward, with three results: ours, PyTorch's and the exact one."""

    def __init__(self, x, groups, weight, bias, act, residual=None, seed=5):
        self.x, self.residual, self.groups, self.act = x, residual, groups, act
        self.weight, self.bias = weight, bias
        generator = torch.Generator().manual_seed(seed)

        def gradient():
            g = torch.randn(x.shape, generator=generator) + 0.5
            return torch.empty_like(x).copy_(g)

        self.dy = gradient()
        self.dtotal = None if residual is None else gradient()

    def ours(self, need_dx=True, need_dparams=True):
        total, y, mean, rstd = kernels.group_norm_act_forward(
            self.x, self.residual, self.groups, self.weight, self.bias, EPS, self.act
        )
        assert mean.shape == rstd.shape == (self.x.shape[0], self.groups)
        assert mean.dtype == rstd.dtype == torch.float32
        self.rstd = rstd
        saved = self.x if total is None else total
        args = self.groups, self.weight, self.bias, mean, rstd, self.act
        recomputed = kernels.group_norm_act_recompute(saved, *args)
        gradients = kernels.group_norm_act_backward(
            self.dy, self.dtotal, saved, *args, need_dx, need_dparams
        )
        assert (total is None) == (self.residual is None)
        for out in (total, y, recomputed, gradients[0]):
            assert out is None or out.stride() == self.x.stride()
        names = ("total", "y", "recomputed", "dx", "dweight", "dbias")
        return dict(zip(names, (total, y, recomputed, *gradients), strict=True))

    def of(self, dtype):
        """Compute the same with PyTorch's autograd, all of it in ``dtype``."""
        total = self.x if self.residual is None else self.x + self.residual
        inputs = {"dx": total, "dweight": self.weight, "dbias": self.bias}
        inputs = {
            name: t.to(dtype).detach().requires_grad_()
            for name, t in inputs.items()
            if t is not None
        }
        x, weight, bias = (inputs.get(name) for name in ("dx", "dweight", "dbias"))
        y = reference.ACTIVATIONS[self.act](pytorch_group_norm(x, self.groups, weight, bias, EPS))
        gradients = torch.autograd.grad(y, list(inputs.values()), self.dy.to(dtype))
        results = {"total": total, "y": y, "recomputed": y} | dict(
            zip(inputs, gradients, strict=True)
        )
        if self.dtotal is not None:
            results["dx"] = results["dx"] + self.dtotal.to(dtype)
        return results

    def check(self, **needs):
        """Return our results; assert that each is as near to the exact one as PyTorch's."""
        ours, exact = self.ours(**needs), self.of(torch.float64)
        peers = {}
        for name, value in ours.items():
            if value is None:
                continue
            dtype = torch.promote_types(self.x.dtype, value.dtype)
            if dtype not in peers:
                peers[dtype] = self.of(dtype)
            assert_accurate(value, peers[dtype][name].to(value.dtype), exact[name], name)
        return ours


def problem(
    device, shape, groups, dtype=torch.float32, format="nchw", act="relu", residual=False,
    parameters=torch.float32, shift=3.0,
):  # fmt: skip
    """Make hostile maps; parameters are exact in x's dtype, since PyTorch needs them in it."""

    def tensor(seed):
        x = maps(shape, dtype, seed=seed, shift=shift).to(device)
        return x.contiguous(memory_format=FORMATS[format]) if len(shape) == 4 else x

    weight, bias = (
        p.to(device, parameters) for p in affine(shape[1], torch.promote_types(dtype, dtype))
    )
    return Problem(tensor(0), groups, weight, bias, act, tensor(1) if residual else None)


@dtypes
@formats
@ways
def test_dtypes_and_formats(way, device, dtype, format):
    problem(device, (2, 24, 7, 9), 4, dtype, format, "relu", residual=True).check()
    if dtype == torch.float16:  # others are tested alone below
        problem(device, (2, 24, 7, 9), 4, dtype, format, "relu").check()


@tiled
@pytest.mark.parametrize("act", [act for act in reference.ACTIVATIONS if act != "relu"])
def test_activations(way, device, act):
    problem(device, (2, 24, 7, 9), 4, torch.float32, "channels_last", act, residual=True).check()


@formats
@ways
@pytest.mark.parametrize("size", [1, 3, 8, 36, 100, 256])
def test_group_sizes(way, device, format, size):
    groups, pixels = (2, (5, 9)) if size > 8 else (4, (17, 17))
    problem(device, (1, groups * size, *pixels), groups, torch.bfloat16, format).check()


@formats
def test_groups_wider_than_a_tile(device, format):
    """Several rows of such a group do not fit into shared memory."""
    problem(device, (1, 8192, 2, 3), 1, torch.float32, format, residual=True).check()


def test_channels_last_3d(device):
    x = maps((2, 16, 3, 5, 2), torch.bfloat16).to(device)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    weight, bias = affine(16, torch.bfloat16)
    Problem(x, 4, weight.to(device), bias.to(device), "relu").check()


@pytest.mark.parametrize(
    "weight, bias",
    [(None, torch.bfloat16), (torch.float16, None), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_parameters(device, weight, bias):
    case = problem(device, (3, 16, 5, 5), 4, torch.bfloat16)
    case.weight = None if weight is None else case.weight.to(weight)
    case.bias = None if bias is None else case.bias.to(bias)
    ours = case.check()
    for gradient, dtype in ((ours["dweight"], weight), (ours["dbias"], bias)):
        assert (gradient is None) == (dtype is None)
        assert gradient is None or gradient.dtype == dtype


@formats
@tiled
def test_parameters_of_each_sample(way, device, format):
    case = problem(device, (2, 24, 7, 9), 4, torch.bfloat16, format, residual=True)
    parameters = affine(24, torch.bfloat16, samples=(2,))
    for wanted in ((True, True), (True, False), (False, True)):
        case.weight, case.bias = (
            p.to(device) if want else None for p, want in zip(parameters, wanted, strict=True)
        )
        case.check()


@ways
def test_gradients_not_needed(way, device):
    """Needed gradients may differ by roundings when others are not: other code computes them."""
    case = problem(device, (2, 24, 7, 9), 4, residual=True)
    every = case.ours()
    without_dx = case.ours(need_dx=False)
    assert without_dx["dx"] is None
    without_dparams = case.ours(need_dparams=False)
    assert without_dparams["dweight"] is without_dparams["dbias"] is None
    torch.testing.assert_close(without_dparams["dx"], every["dx"], rtol=1e-5, atol=1e-5)
    for name in ("dweight", "dbias"):
        torch.testing.assert_close(without_dx[name], every[name], rtol=1e-5, atol=1e-5)


@formats
@ways
def test_mean_far_from_zero(way, device, format):
    """The mean is 1000 standard deviations. ReLU would turn an error of z into one of dy in dx."""
    x = (torch.randn(2, 24, 9, 9) + 1e3).to(device).contiguous(memory_format=FORMATS[format])
    weight, bias = (p.to(device) for p in affine(24))
    Problem(x, 4, weight, bias, "silu").check()


@formats
@ways
def test_rstd_where_the_mean_is_far_from_zero(way, device, format):
    """100000 standard deviations, where the mean itself is rounded by 0.004 of one."""
    x = (torch.randn(2, 24, 9, 9) + 1e5).to(device).contiguous(memory_format=FORMATS[format])
    case = Problem(x, 4, None, None, "none")
    case.ours()
    exact = (x.double().reshape(2, 4, -1).var(2, correction=0) + EPS).rsqrt()
    # Each split's mean is stored in float32.
    rtol = 1e-3 if way == "split" else 1e-6
    torch.testing.assert_close(case.rstd.double(), exact, rtol=rtol, atol=0)


@formats
@ways
def test_first_value_is_an_outlier(way, device, format):
    """The value by which a sum is shifted may itself be far from the mean."""
    case = problem(device, (2, 24, 9, 9), 4, format=format, act="none", shift=0.0)
    case.x[:, :, 0, 0] = 1e4
    case.check()


@formats
@ways
def test_no_variance(way, device, format):
    case = problem(device, (2, 24, 7, 9), 4, torch.float32, format)
    case.x[0, :6] = 0.75
    case.x[1] = -12345.678  # whose sums round
    y = case.check()["y"]
    rstd = torch.cat([case.rstd[0, :1], case.rstd[1]])
    torch.testing.assert_close(rstd, torch.full_like(rstd, EPS**-0.5), rtol=1e-6, atol=0)
    constant = case.bias.relu()[:, None, None].expand(24, 7, 9)
    assert torch.equal(y[0, :6], constant[:6]) and torch.equal(y[1], constant)


@formats
@ways
def test_not_finite(way, device, format):
    """A group with a NaN or an infinity is NaN, and no other differs by a bit."""
    case = problem(device, (2, 24, 7, 9), 4, torch.float32, format, residual=True)
    clean = case.ours()
    case.x[0, 0, 6, 8] = float("inf")
    case.x[1, 7, 3, 4] = float("nan")
    spoilt = case.ours()
    touched = torch.zeros_like(clean["y"], dtype=torch.bool)
    touched[0, :6] = touched[1, 6:12] = True
    for name in ("y", "dx"):
        assert spoilt[name][touched].isnan().all()
        assert torch.equal(spoilt[name][~touched], clean[name][~touched])
    assert spoilt["dweight"][:12].isnan().all()
    for name in ("dweight", "dbias"):
        assert torch.equal(spoilt[name][12:], clean[name][12:])


@formats
@ways
def test_samples_are_independent(way, device, format):
    """A sample has the same bits alone and in a batch."""
    case = problem(device, (2, 24, 9, 9), 4, torch.bfloat16, format, residual=True)
    together = case.ours()
    x, residual, dy, dtotal = (t[1:].clone() for t in (case.x, case.residual, case.dy, case.dtotal))
    alone = Problem(x, 4, case.weight, case.bias, "relu", residual)
    alone.dy, alone.dtotal = dy, dtotal
    alone = alone.ours()
    for name in ("total", "y", "dx"):
        assert torch.equal(alone[name][0], together[name][1]), name


def test_unaligned_addresses(device):
    """Tensors start anywhere in their storage, which rules out the widest accesses."""
    case = problem(device, (2, 16, 5, 5), 4, torch.bfloat16, "nchw")

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    case.x, case.dy, case.weight = map(shifted, (case.x, case.dy, case.weight))
    assert case.x.data_ptr() % 16
    case.check()
