"""The Triton kernels of group_norm_add_relu against float64: interpreted, or on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from bitkern.backends.triton import group_norm_add_relu as kernels
from bitkern.testing import affine, assert_accurate, maps
from tests.backends.triton.test_group_norm_act import (
    EPS,
    FORMATS,
    dtypes,
    formats,
    set_way,
    way,
    ways,
)

__all__ = ["set_way", "way"]  # the fixture
SHAPE = (2, 6, 9, 9)

pytestmark = pytest.mark.usefixtures("poison")


class Problem:
    def __init__(self, device, shape, groups, dtype=torch.float32, format="nchw"):
        def tensor(seed, shift):
            x = maps(shape, dtype, seed, shift, constant=seed == 0).to(device)
            return x.contiguous(memory_format=FORMATS[format]) if len(shape) == 4 else x

        self.x, self.residual, self.dy = tensor(0, 3.0), tensor(1, -1.0), tensor(2, 0.5)
        self.groups = groups
        self.weight, self.bias = (p.to(device) for p in affine(shape[1], dtype))

    def ours(self, **needs):
        args = self.groups, self.weight, self.bias
        y, mean, rstd = kernels.group_norm_add_relu_forward(self.x, self.residual, *args, EPS)
        needs = {f"need_{name}": needs.get(name, True) for name in ("dx", "dresidual", "dparams")}
        gradients = kernels.group_norm_add_relu_backward(
            self.dy, self.x, y, *args, mean, rstd, **needs
        )
        for out in (y, *gradients[:2]):
            assert out is None or out.stride() == self.x.stride()
        names = ("y", "dx", "dresidual", "dweight", "dbias")
        return dict(zip(names, (y, *gradients), strict=True))

    def of(self, g, dtype):
        """Compute with PyTorch's normalization and autograd in ``dtype``, for the gradient g."""
        inputs = {"dx": self.x, "dweight": self.weight, "dbias": self.bias}
        inputs = {
            name: t.to(dtype).detach().requires_grad_()
            for name, t in inputs.items()
            if t is not None
        }
        x, weight, bias = (inputs.get(name) for name in ("dx", "dweight", "dbias"))
        norm = torch.group_norm(x, self.groups, weight, bias, EPS)
        gradients = torch.autograd.grad(norm, list(inputs.values()), g.to(dtype))
        y = F.relu(norm.detach() + self.residual.to(dtype))
        return {"y": y} | dict(zip(inputs, gradients, strict=True))

    def check(self):
        ours = self.ours()
        g = torch.where(ours["y"] <= 0, 0.0, self.dy)
        assert torch.equal(ours["dresidual"], g)
        peer, exact = self.of(g, self.x.dtype), self.of(g, torch.float64)
        for name in exact:
            assert_accurate(ours[name], peer[name].to(ours[name].dtype), exact[name], name)
        return ours


@dtypes
@formats
@ways
def test_dtypes_and_formats(way, device, dtype, format):
    Problem(device, SHAPE, 2, dtype, format).check()


@formats
@ways
@pytest.mark.parametrize("size, pixels", [(1, (17, 17)), (12, (5, 7))])
def test_group_sizes(way, device, format, size, pixels):
    Problem(device, (1, 2 * size, *pixels), 2, torch.bfloat16, format).check()


@ways
def test_gradients_not_needed(way, device):
    """Needed gradients may differ by roundings when others are not: other code computes them."""
    case = Problem(device, SHAPE, 2, format="channels_last")
    every = case.ours()
    produced = {"dx": ["dx"], "dresidual": ["dresidual"], "dparams": ["dweight", "dbias"]}
    for wanted in (["dx"], ["dresidual"], ["dparams"]):
        found = case.ours(**{need: need in wanted for need in produced})
        for need, names in produced.items():
            for name in names:
                assert (found[name] is None) == (need not in wanted)
                if found[name] is not None:
                    torch.testing.assert_close(found[name], every[name], rtol=1e-5, atol=1e-5)


@ways
def test_not_finite(way, device):
    """NaN in x spoils its group, in the residual only its place; where y is NaN dy passes."""
    case = Problem(device, SHAPE, 2, format="channels_last")
    clean = case.ours()
    case.x[0, 0, 4, 6] = float("inf")
    case.residual[1, 5, 3, 4] = float("nan")
    spoilt = case.ours()
    group, place = (torch.zeros_like(clean["y"], dtype=torch.bool) for _ in range(2))
    group[0, :3] = place[1, 5, 3, 4] = True
    for name in ("y", "dresidual"):
        assert torch.equal(spoilt[name][~group & ~place], clean[name][~group & ~place])
    assert spoilt["y"][group | place].isnan().all() and spoilt["dx"][group].isnan().all()
    assert torch.equal(spoilt["dresidual"][group | place], case.dy[group | place])
    assert spoilt["dx"][~group].isfinite().all()
