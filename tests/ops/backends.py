"""The implementations to run an operator's tests on, as (backend, device)."""

import os

import pytest

from bitkern import backends


def implementations(kernel):
    if "BITKERN_PTX" in os.environ:  # in a process of tests/backends/triton/ptx
        return pytest.mark.parametrize("name, device", [pytest.param("triton", "cpu", id="ptx")])
    params = [pytest.param("reference", "cpu", id="reference")]
    for name, device in (("cpu", "cpu"), ("triton", "cuda"), ("cuda", "cuda")):
        if kernel not in backends.BACKENDS[name].dtypes:
            continue
        marks = [pytest.mark.gpu] if device == "cuda" else []
        if device == "cpu" and backends.unavailable(name):
            marks = [pytest.mark.skip(reason=backends.unavailable(name))]
        params.append(pytest.param(name, device, id=name, marks=marks))
    return pytest.mark.parametrize("name, device", params)
