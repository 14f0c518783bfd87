"""The Triton kernels of weight_standardize against float64: interpreted, or on a GPU if any."""

import functools
import math

import pytest
import torch

from bitkern.backends.triton import config
from bitkern.backends.triton import weight_standardize as kernels
from bitkern.variant import Variant
from tests.backends import standardization
from tests.backends.standardization import DTYPES, FORMATS, SGD, SHAPES, VARIANTS

Problem = functools.partial(standardization.Problem, kernels)

pytestmark = pytest.mark.usefixtures("poison")

variants = pytest.mark.parametrize("variant", VARIANTS)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_weight_dtypes(device, dtype):
    Problem(device, SHAPES[1:3], dtype, **VARIANTS["nfnet"]).check()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("out_format", FORMATS)
def test_formats(device, format, out_format):
    # 41 times the float32 nearest to 1/41 is less than 1.
    shapes = [(2, 24, 3, 3), (2, 5, 3, 2), (2, 41, 3, 3)]
    formats = {"format": format, "out_format": out_format}
    Problem(device, shapes, out_dtype=torch.bfloat16, **formats).check()


@pytest.mark.parametrize("length", [1, 2, 9, 27, 64, 147, 576, 1152, 8192, 8200, 9216, 73728])
@pytest.mark.parametrize("variant", ["bit", "jax"])
def test_lengths(device, length, variant):
    Problem(device, [(8, length, 1, 1)], **VARIANTS[variant]).check()


@pytest.mark.parametrize("length", [576, 8200])
def test_std_where_the_mean_is_far_from_zero(device, length):
    weight = (torch.randn(4, length, 1, 1) + 1e5).to(device)
    variant = Variant(1e-10, False, False)
    _, stats = kernels.weight_standardize_forward(
        [weight], None, [1.0], variant, torch.float32, False
    )
    exact = weight.double().flatten(1).std(1, correction=0)
    torch.testing.assert_close(stats[1].double(), exact, rtol=1e-6, atol=0)


@variants
def test_many_layers_are_one_launch(device, variant, launches):
    """Layers have the same bits as alone, where their tiles are the same."""
    many = Problem(device, SHAPES, out_dtype=torch.bfloat16, **VARIANTS[variant])
    if variant == "original":  # the unbiased variance of one element is not a number
        many.weights, many.douts, many.scales = many.weights[:4], many.douts[:4], many.scales[:4]
    many.check()
    names = [name for name, _, _ in launches if name != "weight_standardize_store_pointers"]
    assert names == ["weight_standardize_forward_all", "weight_standardize_backward_all"]


def test_many_layers_with_other_gradients(device):
    """Gradients are summed in 32 bits and have another layout than the weights."""
    shapes = [(2, 24, 3, 3), (2, 5, 3, 2), (3, 8, 1, 1)] * 30  # several lots of addresses
    Problem(
        device, shapes, out_dtype=torch.bfloat16, dout_dtype=torch.float32, format="channels_last",
        out_format="channels_last", dout_format="oihw", gain=True,
    ).check()  # fmt: skip


@pytest.mark.parametrize("options", SGD)
@pytest.mark.parametrize("variant", VARIANTS)
def test_sgd(device, variant, options):
    layers = 4 if variant == "original" else 5  # of one element there is no unbiased variance
    case = Problem(device, SHAPES[:layers], **VARIANTS[variant] | {"gain": False})
    case.check_sgd(SGD[options])


@pytest.mark.parametrize("format, dout_format", [list(FORMATS), list(FORMATS)[::-1]])
def test_sgd_of_other_formats(device, format, dout_format):
    shapes = [(3, 520, 3, 3), (2, 5, 3, 2), (3, 8, 1, 1)]
    case = Problem(device, shapes, format=format, dout_format=dout_format)
    case.check_sgd(SGD["dampening"])


@pytest.mark.parametrize("variant", ["bit", "jax", "nfnet"])
@pytest.mark.parametrize("layers", [1, 2])
def test_no_variance(device, layers, variant):
    case = Problem(device, [(4, 16, 3, 3)] * layers, **VARIANTS[variant])
    standardization.check_no_variance(case, 0.25)


def test_not_finite_stays_in_its_filter(device):
    case = Problem(device, [(40, 64, 1, 1), (4, 16, 3, 3)])
    standardization.check_not_finite_stays_in_its_filter(case, (7, 2))


def test_unaligned_addresses(device, launches):
    def shifted(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    case = Problem(device, [(4, 16, 3, 3), (40, 64, 1, 1)])
    case.weights = [shifted(w) for w in case.weights]
    case.check()
    case.weights, case.douts, case.scales = case.weights[:1], case.douts[:1], case.scales[:1]
    case.check()


def test_no_filters(device):
    for shapes in ([(0, 4, 3, 3)], [(0, 4, 3, 3), (2, 4, 3, 3)]):
        case = Problem(device, shapes)
        out, dweight, _ = case.ours()[0]
        assert out.shape == dweight.shape == (0, 4, 3, 3)
    case.check()


def test_tables_are_made_once(device):
    """Only the first call does what synchronizes and cannot be captured in a CUDA graph."""
    case = Problem(device, [(2, 24, 3, 3), (2, 5, 3, 2)])
    kernels._layer_tables.cache_clear()
    for _ in range(3):
        case.ours()
    assert kernels._layer_tables.cache_info().misses == 1


@pytest.mark.parametrize("length", [1, 8, 63, 64, 255, 256, 257, 4608, 8192, 8193, 73728])
@pytest.mark.parametrize("filters", [1, 64, 100, 2048])
def test_tiles(filters, length):
    aligned = length % 8 == 0
    of_step = config.SGD_TILES[config.filter_kind(length, aligned, config.SGD_TILES)]
    kind = config.FILTER_TILES[config.filter_kind(length, aligned)]
    alone, warps = config.filter_tile(filters, length, aligned)
    for tile in (of_step, kind, alone):
        assert tile.whole == (length <= tile.block and length % 8 == 0)
        assert tile.aligned == (length % 8 == 0)
        assert tile.filters * tile.block <= 8192
    assert 1 <= warps <= config.FILTER_WARPS
    # As many programs as there are filters, until they fill a device.
    assert math.ceil(filters / alone.filters) >= min(filters, 64)
