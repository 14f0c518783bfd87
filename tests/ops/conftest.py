import pytest

from tests import interpreter

interpreter.switch_on()


@pytest.fixture(autouse=True)
def interpreted(request, monkeypatch):
    """Let the tests of Triton on CPU tensors see its interpreter."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("name") == "triton" and interpreter.INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
