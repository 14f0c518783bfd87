"""Without a GPU the kernels run under Triton's interpreter, on CPU tensors; or, compiled, on the
machine of ``tests/backends/triton/ptx``, which runs these tests in processes of its own.

Triton decides at import whether its functions are interpreted: TRITON_INTERPRET is set before the
process first imports Triton, and in these tests, but not in others, which see the package as it
is without a GPU. Interpreted kernels cannot be compiled; test_compiled.py uses other processes.
"""

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.backends.triton import tritons

HERE = Path(__file__).parent
EXECUTED = "BITKERN_PTX" in os.environ
INTERPRETED = not (torch.cuda.is_available() or EXECUTED)
_MODULES = (
    "triton",
    "bitkern.backends.triton.group_norm_act",
    "bitkern.backends.triton.weight_standardize",
)


def _interpret():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            f"Triton was imported before {__file__} could switch its interpreter on: "
            "run tests/backends/triton first or alone, or set TRITON_INTERPRET=1"
        )
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    for module in _MODULES:
        importlib.import_module(module)
    if before is None:
        del os.environ["TRITON_INTERPRET"]


def _compute_like_a_gpu():
    """The interpreter truncates float32 to bfloat16 and sums in a row; a GPU rounds to nearest and
    sums in a tree."""
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, source, dtype):
        if (source.dtype.scalar, dtype.scalar) != (float32, bfloat16):
            return cast(self, source, dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        bits = rounded.view(torch.int16).numpy().view(np.uint16).reshape(source.data.shape)
        return interpreter.TensorHandle(bits, bfloat16)

    def tree_sum(self, input):
        parts = np.moveaxis(input.handle.data, self.axis, 0)
        while len(parts) > 1:
            parts = parts[: len(parts) // 2] + parts[len(parts) // 2 :]
        total = parts.swapaxes(0, self.axis) if self.keep_dims else parts[0]
        return self.to_tensor(total, input.dtype)

    interpreter.InterpreterBuilder.cast_impl = cast_impl
    interpreter.ReduceOps.sum = tree_sum


if INTERPRETED:
    _interpret()
    _compute_like_a_gpu()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """On a GPU all tests of kernels are such as need one."""
    if torch.cuda.is_available():
        for item in items:
            if item.path.parent == HERE and "device" in getattr(item, "fixturenames", ()):
                item.add_marker("gpu")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", params=["installed", "3.6.0"])
def other_triton(request):
    """Whether to take the Triton of PyTorch 2.11 and not the installed one."""
    if request.param == "3.6.0" and not tritons.OTHER.exists():
        pytest.skip("no build/triton-3.6.0, which make test installs")
    return request.param == "3.6.0"


@pytest.fixture
def device():
    return "cpu" if INTERPRETED or EXECUTED else "cuda"


@pytest.fixture
def launches(monkeypatch):
    """Every launch: (name of the kernel, programs, constants)."""
    from bitkern.backends.triton import group_norm_act, weight_standardize
    from bitkern.backends.triton.launch import launch

    seen = []

    def recorded(kernel, programs, pointers, numbers, constants, warps):
        seen.append((kernel.__name__, programs, constants))
        launch(kernel, programs, pointers, numbers, constants, warps)

    for module in (group_norm_act, weight_standardize):
        monkeypatch.setattr(module, "launch", recorded)
    return seen
