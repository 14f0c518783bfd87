"""Launches by Triton's real launcher, recorded by a fake driver, since no GPU is here."""

import json
import shutil

import pytest
from triton.compiler import make_backend

from bitkern.backends.triton import launch
from tests.backends.triton import fake_driver, shipped

# Launches of forward, recomputation and backward; one more in backward sums over the samples.
COUNTS = {
    "on chip": (1, 1, 2), "whole": (1, 1, 2), "split": (2, 1, 3), "split, one sample": (2, 1, 2),
    "unaligned": (1, 1, 2), "fp32": (1, 1, 2), "one weight": (1, None, 1),
    "weights": (2, None, 2), "add, on chip": (1, None, 2), "add, split": (2, None, 3),
}  # fmt: skip

pytestmark = pytest.mark.skipif(
    shutil.which(fake_driver.COMPILER) is None, reason=f"no C compiler {fake_driver.COMPILER}"
)


@pytest.fixture(scope="module")
def launches(other_triton):
    """Return {(repeat, case, call): ([kernel …], [module …])}; arguments are already checked."""
    printed = json.loads(fake_driver.run("launches", other_triton))
    assert not other_triton or printed["triton"] == "3.6.0"
    return {
        (line["repeat"], line["case"], line["call"]): (line["launches"], line["modules"])
        for line in printed["result"]
    }


def test_number_of_launches(launches):
    for (_, case, call), (names, _) in launches.items():
        expected = COUNTS[case][["forward", "recompute", "backward"].index(call)]
        assert len(names) == expected, (case, call, names)


def test_our_launch_is_tritons(launches):
    """The second call, which does not ask Triton, runs the kernels that the first one ran."""
    for (repeat, case, call), launched in launches.items():
        assert launched == launches[0, case, call], (repeat, case, call)


def test_specializations(launches):
    """A kernel compiled for aligned addresses, or another dtype, is not launched with others."""
    for other in ("unaligned", "fp32"):
        for call in ("forward", "recompute"):
            assert launches[1, other, call][1] != launches[1, "on chip", call][1]


def test_numbers_of_every_type(other_triton):
    """An int and a float of NumPy's are floats to the kernels, whichever comes first."""
    assert json.loads(fake_driver.run("numbers", other_triton))["result"] == []


def test_warm_calls_are_captured(other_triton):
    """CUDA graphs capture warm calls, also at odd addresses; other calls are refused."""
    refused = json.loads(fake_driver.run("capture", other_triton))["result"]
    assert refused == [[False, 0], [False, 1], [False, 2]]


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_options_are_known_to_each_backend(name):
    """The compiler refuses a launch with others."""
    target = shipped.TARGETS[name]
    options = launch.options(4, target.backend == "hip")
    known = make_backend(target).parse_options(dict(options))
    assert options.items() <= vars(known).items()
