"""Every activation behind GroupNorm: in the operators, and by itself over all of float32."""

from itertools import pairwise

import pytest
import torch

from bitkern import reference
from bitkern.backends import launchers
from bitkern.testing import affine, assert_accurate, maps, strided
from tests.ops.backends import implementations
from tests.ops.test_group_norm_act import ACTS, DTYPES, compare

every_implementation = implementations("group_norm_act", interpreted=True)
# ReLU, SiLU and none have a file of their own.
others = pytest.mark.parametrize("act", [act for act in reference.ACTIVATIONS if act not in ACTS])
NEGATIVE = [-1e30, -200, -104, -87, -60, -20, -8, -5, -3, -1, -0.1, -1e-4, -1e-38]
BANDS = [*pairwise(NEGATIVE), (-1e-38, 1e-38), *((-b, -a) for a, b in pairwise(NEGATIVE))]


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@others
def test_operators(poison, name, device, dtype, act):
    for shape, groups in (((3, 12, 5, 3), 4), ((1, 6, 33, 2), 1), ((2, 40, 7, 9), 8)):
        for kind in ("contiguous", "channels_last"):
            x = strided(maps(shape, dtype), kind)
            residual = maps(shape, dtype, seed=7, shift=-1.0)
            for other in (None, residual):
                compare(name, device, x, other, groups, *affine(shape[1]), act)
    compare(name, device, maps((4, 8), dtype), None, 4, None, None, act)


def alone(name, device, act, z):
    """Return act(z) and act'(z), by launchers: the statistics leave z unchanged, and with one
    pixel the gradient of the bias is that of z."""
    z = z.to(device).reshape(1, -1, 1)
    bias, mean, rstd = z.new_zeros(z.shape[1]), z.new_zeros(1, 1), z.new_ones(1, 1)
    run = launchers(name, "group_norm_act")
    y = run.group_norm_act_recompute(z, 1, None, bias, mean, rstd, act)
    args = None, z, 1, None, bias, mean, rstd, act
    return y.flatten(), run.group_norm_act_backward(torch.ones_like(z), *args, False, True)[2]


def pytorch(act, z):
    z = z.clone().requires_grad_()
    y = reference.ACTIVATIONS[act](z)
    return y.detach(), torch.autograd.grad(y.sum(), z)[0]


@every_implementation
@others
def test_from_one_end_of_float32_to_the_other(name, device, act):
    if name == "triton":
        pytest.skip("a GPU's fast exponential is not exact to the last bit far from 0")
    for low, high in BANDS:
        ends = torch.tensor([low, high]).abs().log10()
        z = torch.logspace(*ends.tolist(), 4001) * (1 if high > -low else -1)
        if low < 0 < high:
            z = torch.linspace(low, high, 4001)
        computed = alone(name, device, act, z), pytorch(act, z), pytorch(act, z.double())
        for what, results in zip(("act", "act'"), zip(*computed, strict=True), strict=True):
            assert_accurate(*results, f"{what} from {low} to {high}")


@every_implementation
@others
def test_kinks_and_nan(name, device, act):
    z = torch.tensor([-3.0, 0.0, 3.0, float("nan")]).repeat_interleave(33)
    y, slope = (t.cpu() for t in alone(name, device, act, z))
    expected, slopes = pytorch(act, z)
    assert torch.equal(y.isnan(), z.isnan())
    for got, peer in ((y, expected), (slope, slopes)):
        torch.testing.assert_close(got[:99], peer[:99], rtol=1e-5, atol=1e-6)
