"""The implementations to run an operator's tests on, as (backend, device)."""

import pytest

from bitkern import backends
from tests import interpreter


def implementations(kernel, interpreted=False, reference=True):
    """Parametrize a test by the backends that run here.

    ``interpreted``: where there is no GPU, Triton runs on CPU tensors. ``reference=False``: kernels
    alone.
    """
    if interpreter.EXECUTED:
        return pytest.mark.parametrize("name, device", [pytest.param("triton", "cpu", id="ptx")])
    params = [pytest.param("reference", "cpu", id="reference")] if reference else []
    for name, device in (("cpu", "cpu"), ("triton", "cuda"), ("cuda", "cuda")):
        if kernel not in backends.BACKENDS[name].dtypes:
            continue
        marks = [pytest.mark.gpu] if device == "cuda" else []
        if name == "triton" and interpreted and interpreter.INTERPRETED:
            device, marks = "cpu", []
        elif device == "cpu" and backends.unavailable(name):
            marks = [pytest.mark.skip(reason=backends.unavailable(name))]
        params.append(pytest.param(name, device, id=name, marks=marks))
    return pytest.mark.parametrize("name, device", params)
