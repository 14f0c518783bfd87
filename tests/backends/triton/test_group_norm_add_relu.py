"""The Triton kernels of group_norm_add_relu on every way: interpreted, or on a GPU."""

import pytest
import torch

import bitkern
from bitkern import ops
from bitkern.testing import affine, maps
from tests.backends.triton.test_group_norm_act import FORMATS, dtypes, formats, set_way, way, ways
from tests.ops.test_group_norm_act import leaves_of
from tests.ops.test_group_norm_add_relu import compare

__all__ = ["set_way", "way"]  # the fixture
SHAPE = (2, 6, 9, 9)

pytestmark = pytest.mark.usefixtures("poison")


def inputs(device, shape=SHAPE, dtype=torch.float32, format="channels_last"):
    """Return x and residual, then weight and bias."""
    x, residual = maps(shape, dtype), maps(shape, dtype, 1, -1.0, constant=False)
    x, residual = (t.to(device).contiguous(memory_format=FORMATS[format]) for t in (x, residual))
    return (x, residual), [p.to(device) for p in affine(shape[1], dtype)]


def results(x, residual, weight, bias, dy, wanted=("dx", "dresidual", "dweight", "dbias")):
    """Return y and the gradients that are wanted, by name."""
    leaves = leaves_of(x, residual, weight, bias)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    x, residual, *affine = leaves.values()
    with bitkern.use_backend("triton"):
        y = ops.group_norm_add_relu(x, residual, 2, *affine)
    gradients = torch.autograd.grad(y, [leaves[name] for name in wanted], dy)
    found = {"y": y.detach()} | dict(zip(wanted, gradients, strict=True))
    assert all(t.stride() == x.stride() for t in found.values() if t.ndim > 1)
    return found


@dtypes
@formats
@ways
def test_dtypes_and_formats(way, device, dtype, format):
    (x, residual), affine = inputs(device, SHAPE, dtype, format)
    compare("triton", device, x, residual, 2, *affine)


@formats
@ways
@pytest.mark.parametrize("size, pixels", [(1, (17, 17)), (12, (5, 7))])
def test_group_sizes(way, device, format, size, pixels):
    (x, residual), affine = inputs(device, (1, 2 * size, *pixels), torch.bfloat16, format)
    compare("triton", device, x, residual, 2, *affine)


@ways
def test_gradients_not_needed(way, device):
    """Needed gradients may differ by roundings when others are not: other code computes them."""
    (x, residual), affine = inputs(device)
    args = x, residual, *affine, residual + 0.5
    every = results(*args)
    for wanted in (["dx"], ["dresidual"], ["dweight", "dbias"]):
        found = results(*args, wanted)
        for name in wanted:
            torch.testing.assert_close(found[name], every[name], rtol=1e-5, atol=1e-5)


@ways
def test_not_finite(way, device):
    """NaN in x spoils its group, in the residual only its place; where y is NaN dy passes."""
    (x, residual), affine = inputs(device)
    dy = residual + 0.5
    clean = results(x, residual, *affine, dy)
    x[0, 0, 4, 6] = float("inf")
    residual[1, 5, 3, 4] = float("nan")
    spoilt = results(x, residual, *affine, dy)
    group, place = (torch.zeros_like(clean["y"], dtype=torch.bool) for _ in range(2))
    group[0, :3] = place[1, 5, 3, 4] = True
    for name in ("y", "dresidual"):
        assert torch.equal(spoilt[name][~group & ~place], clean[name][~group & ~place])
    assert spoilt["y"][group | place].isnan().all() and spoilt["dx"][group].isnan().all()
    assert torch.equal(spoilt["dresidual"][group | place], dy[group | place])
    assert spoilt["dx"][~group].isfinite().all()
