"""The CUDA kernels of weight_standardize, executed without a GPU, against float64."""

import copy
import functools
import shutil

import pytest
import torch

from tests.backends import standardization
from tests.backends.standardization import DTYPES, FORMATS, VARIANTS

pytest.importorskip("cuda.bindings.nvrtc", reason="no NVRTC, which PyTorch for CUDA brings")
from tests.backends.cuda import launches  # noqa: E402

COMPILER = launches.COMPILER[0]
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler {COMPILER}"),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return launches.Host(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def problem(host):
    launchers = host.launchers(launches.KERNELS.read_text())
    return functools.partial(standardization.Problem, launchers, "cpu")


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


def part(case, layers):
    fewer = copy.copy(case)
    for name in ("weights", "gains", "douts", "scales"):
        setattr(fewer, name, getattr(case, name)[layers])
    return fewer


def test_more_layers_than_a_table_holds(problem):
    """The bits are those of the layers in other tables, or alone. Layers without filters are among
    them."""
    layers = 2 * 256 + 1
    shapes = [(0 if i % 255 in (0, 1, 7) else 1, 2 + i % 3, 3, 1 + i % 2) for i in range(layers)]
    case = problem(shapes, out_dtype=torch.bfloat16, gain=True, out_format="channels_last")
    results = case.ours()
    alone = [slice(i, i + 1) for i in (2, 254, 257, 509, 512)]
    for some in [*alone, *(slice(i, i + 100) for i in range(0, layers, 100))]:
        for together, separate in zip(results[some], part(case, some).ours(), strict=True):
            assert all(map(torch.equal, together, separate)), some


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


@pytest.mark.parametrize(
    "right, wrong, at, found",
    [
        ("__syncthreads();", "", 0, "race: "),
        ("__syncthreads();", "", 1, "race: "),
        ("k < size", "k <= size", 2, "out of bounds"),
        ("columns) * rows", "columns) * columns", 0, "race: "),
    ],
)
def test_what_is_wrong_is_found(host, right, wrong, at, found):
    parts = launches.KERNELS.read_text().split(right)
    parts[at : at + 2] = [parts[at] + wrong + parts[at + 1]]
    spoilt = host.launchers(right.join(parts))
    case = standardization.Problem(spoilt, "cpu", [(2, 24, 3, 3)], out_format="channels_last")
    with pytest.raises(RuntimeError, match=f"weight_standardize: LaunchFault: bitkern.*{found}"):
        case.ours()
