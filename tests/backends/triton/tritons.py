"""Selects the Triton of a subprocess: the installed one, or that of PyTorch 2.11."""

import os

from tests import ROOT

OTHER = ROOT / "build/triton-3.6.0"  # made by the Makefile


def environment(other: bool) -> dict[str, str]:
    """Return the environment for one of the Tritons, without the interpreter."""
    found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return found | ({"PYTHONPATH": str(OTHER)} if other else {})
