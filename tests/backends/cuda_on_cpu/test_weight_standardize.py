"""The CUDA kernels of weight_standardize, executed on a CPU, against float64."""

import copy
import functools
import re

import pytest
import torch

from tests import ROOT
from tests.backends import standardization
from tests.backends.cuda_on_cpu import build
from tests.backends.standardization import DTYPES, FORMATS, VARIANTS

KERNEL = ROOT / "csrc/cuda/weight_standardize.cu"

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(scope="module")
def problem():
    return functools.partial(standardization.Problem, build.launchers(), "cpu")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_variants_and_dtypes(problem, dtype, out_dtype, variant):
    shapes = [(3, 1024, 3, 3), (5, 3, 7, 7), (4, 64, 1, 1)]
    problem(shapes, dtype, out_dtype, **VARIANTS[variant]).check()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("out_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formats(problem, dtype, format, out_format):
    shapes = [(2, 24, 3, 3), (2, 5, 3, 2), (3, 130, 2, 5)]
    problem(shapes, out_dtype=dtype, format=format, out_format=out_format, gain=True).check()


@pytest.mark.parametrize("length", [1, 2, 9, 27, 147, 255, 256, 257, 1152, 8200, 73728])
@pytest.mark.parametrize("variant", ["bit", "jax"])
def test_lengths(problem, length, variant):
    problem([(3, length, 1, 1)], **VARIANTS[variant]).check()


@pytest.mark.parametrize("shape", [(3, 17), (2, 6, 5), (2, 3, 2, 3, 2)])
def test_other_dimensions(problem, shape):
    problem([shape]).check()


def alone(case, layer):
    one = copy.copy(case)
    for name in ("weights", "gains", "douts", "scales"):
        setattr(one, name, getattr(case, name)[layer : layer + 1])
    return one


def test_more_layers_than_a_table_holds(problem):
    """The bits are those of the layers alone. Layers without filters are among them."""
    layers = 2 * 256 + 1
    shapes = [(0 if i % 255 in (0, 1, 7) else 1, 2 + i % 3, 3, 1 + i % 2) for i in range(layers)]
    case = problem(shapes, out_dtype=torch.bfloat16, gain=True, out_format="channels_last")
    for layer, results in enumerate(case.ours()):
        for together, separate in zip(results, alone(case, layer).ours()[0], strict=True):
            assert torch.equal(together, separate), layer


@pytest.mark.parametrize("shapes", [[(0, 4, 3, 3)], [(0, 4, 3, 3)] * 3, [(0, 4, 3, 3)] * 300])
def test_no_filters(problem, shapes):
    problem(shapes).check()


@pytest.mark.parametrize("variant", ["bit", "jax", "nfnet"])
def test_no_variance(problem, variant):
    case = problem([(4, 16, 3, 3)] * 2, **VARIANTS[variant])
    standardization.check_no_variance(case, 0.3)


def test_not_finite_stays_in_its_filter(problem):
    case = problem([(5, 64, 1, 1), (4, 16, 3, 3)])
    standardization.check_not_finite_stays_in_its_filter(case, (3, 2))


@pytest.mark.parametrize("barrier", [0, 1])
def test_a_missing_barrier_is_found(barrier, tmp_path):
    text = KERNEL.read_text()
    places = [match.span() for match in re.finditer(r"__syncthreads\(\);", text)]
    assert len(places) == 2, "those of block_sum"
    start, end = places[barrier]
    (tmp_path / KERNEL.name).write_text(text[:start] + text[end:])
    spoilt = build.launchers([tmp_path / KERNEL.name], tmp_path)
    with pytest.raises(AssertionError):
        standardization.Problem(spoilt, "cpu", [(2, 24, 3, 3)]).check()
