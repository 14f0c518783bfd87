"""The kernels run on a GPU, under Triton's interpreter, or compiled on the machine of ``ptx``,
which runs these tests in separate processes. ``test_compiled.py`` uses other processes too.
"""

from pathlib import Path

import pytest
import torch

from tests import interpreter
from tests.backends.triton import tritons

HERE = Path(__file__).parent
interpreter.switch_on()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark all tests of kernels as ``gpu`` on a machine with one."""
    if torch.cuda.is_available():
        for item in items:
            if item.path.parent == HERE and "device" in getattr(item, "fixturenames", ()):
                item.add_marker("gpu")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if interpreter.INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", params=["installed", "3.6.0"])
def other_triton(request):
    """Return True to use the Triton of PyTorch 2.11, False for the installed one."""
    if request.param == "3.6.0" and not tritons.OTHER.exists():
        pytest.skip("no build/triton-3.6.0, which make test installs")
    return request.param == "3.6.0"


@pytest.fixture
def device():
    return "cpu" if interpreter.INTERPRETED or interpreter.EXECUTED else "cuda"


@pytest.fixture
def launches(monkeypatch):
    """Record every launch as (name of the kernel, programs, constants)."""
    from bitkern.backends.triton import group_norm_act, weight_standardize
    from bitkern.backends.triton.launch import launch

    seen = []

    def recorded(kernel, programs, pointers, numbers, constants, warps):
        seen.append((kernel.__name__, programs, constants))
        launch(kernel, programs, pointers, numbers, constants, warps)

    for module in (group_norm_act, weight_standardize):
        monkeypatch.setattr(module, "launch", recorded)
    return seen
