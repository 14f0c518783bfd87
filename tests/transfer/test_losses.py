"""The losses of a short training by each recipe are those that were written down.

``python -m benchmarks.losses COMMIT`` compares two commits to the last bit.
"""

import json
from pathlib import Path

import pytest

from benchmarks.losses import Float64, losses

GOLDEN = Path(__file__).with_name("losses.json")


def test_losses():
    golden, found = json.loads(GOLDEN.read_text()), losses(Float64)
    assert found.keys() == golden.keys()
    for recipe, values in golden.items():
        assert found[recipe] == pytest.approx(values, rel=1e-7), recipe
