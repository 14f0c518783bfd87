import gc

import pytest
import torch

from bitkern import ops
from bitkern.testing import poisoned_memory


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


@pytest.fixture
def poison():
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """Leave what is alive out of later garbage collections: each takes half a second or more."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def launches(monkeypatch):
    """Record how many weights each launch of weight standardization takes."""
    found, launch = [], ops.weight_standardize_all

    def counted(weights, *args, **kwargs):
        found.append(len(weights))
        return launch(weights, *args, **kwargs)

    monkeypatch.setattr(ops, "weight_standardize_all", counted)
    return found
