"""The kernels that ship, compiled for two GPUs by two Tritons, executed: the numerical tests of
``tests/backends/triton`` and ``tests/ops``, in processes of their own."""

import json
import shutil

import pytest

from tests import ROOT
from tests.backends.triton import fake_driver, shipped, tritons
from tests.process import python

pytestmark = pytest.mark.skipif(
    shutil.which(fake_driver.COMPILER) is None, reason=f"no C compiler {fake_driver.COMPILER}"
)

NORMS = ("group_norm_act", "group_norm_add_relu")
OPERATORS = (*NORMS, "activations", "weight_standardize", "ws_conv2d", "group_norm_act_conv")
KERNELS = [f"tests/backends/triton/test_{name}.py" for name in (*NORMS, "weight_standardize")]
KERNELS += ["tests/backends/triton/ptx/counted.py"]
OPS = [f"tests/ops/test_{name}.py" for name in OPERATORS]
# Inductor's own code does not run on the machine.
ALL = "triton or (ptx and not compile)"
# Each kernel once.
SELECTION = (
    "(test_dtypes_and_formats and bfloat16 and channels_last)"
    " or (test_group_sizes and 12) or test_unaligned_addresses"
    " or (test_many_layers_are_one_launch and jax)"
)


def execute(files, tests, target, triton):
    """Run tests on the machine; return what the kernels did, by name."""
    if triton == "3.6.0" and not tritons.OTHER.exists():
        pytest.skip("no build/triton-3.6.0, which make test installs")
    folder = str(fake_driver.build())
    driver = {"LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder}
    # A cache of its own: what lies there is not machine code.
    options = {"BITKERN_PTX": target, "TRITON_CACHE_DIR": str(ROOT / "build/ptx")}
    plugins = "-p", "tests.backends.triton.ptx.plugin", "-p", "no:cacheprovider"
    done = python(
        *("-m", "pytest", *plugins, "-q", "--tb=short", "-k", tests, *files),
        env=tritons.environment(triton == "3.6.0"), OMP_NUM_THREADS="1", **driver, **options,
    )  # fmt: skip
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("executed: "))
    return json.loads(line.removeprefix("executed: "))


def test_a_selection():
    assert execute(KERNELS, SELECTION, "sm_90", "3.6.0").keys() >= {
        "weight_standardize_forward_all"
    }


# Two of eight combinations, for each takes minutes: another is tried by writing it here.
@pytest.mark.sweep
@pytest.mark.parametrize(
    "files, target, triton", [(KERNELS, "sm_80", "installed"), (OPS, "sm_90", "3.6.0")]
)
def test_all(files, target, triton):
    executed = execute(files, ALL, target, triton)
    if files is KERNELS:
        assert executed.keys() == shipped.KERNELS
