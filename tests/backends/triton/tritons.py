"""Which Triton a process of its own sees: the installed one, or that of PyTorch 2.11."""

import os

from tests import ROOT

OTHER = ROOT / "build/triton-3.6.0"  # made by the Makefile


def environment(other: bool) -> dict[str, str]:
    """Not interpreted."""
    found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return found | ({"PYTHONPATH": str(OTHER)} if other else {})
