import pytest

from tests import interpreter

interpreter.switch_on()


@pytest.fixture(autouse=True)
def interpreted(request, monkeypatch):
    """The tests of the row triton on CPU tensors see Triton's interpreter."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("name") == "triton" and interpreter.INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
