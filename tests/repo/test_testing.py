"""The error bounds themselves must reject wrong results."""

import pytest
import torch

from bitkern.testing import assert_accurate


@pytest.fixture
def results():
    exact = torch.randn(4, 64, 16, 16, dtype=torch.float64)
    return exact.bfloat16(), exact


def wrong_tile(x):
    x[1, 8:16, 3:5] = x[1, 8:16, 5:7].clone()


def swapped_channels(x):
    x[:, [2, 3]] = x[:, [3, 2]]


def biased(x):
    x += 0.02


def nan(x):
    x[0, 0, 0, 0] = float("nan")


def test_accepts_equal_rounding(results):
    peer, exact = results
    assert_accurate(peer.clone(), peer, exact)


@pytest.mark.parametrize("fault", [wrong_tile, swapped_channels, biased, nan])
def test_rejects(results, fault):
    peer, exact = results
    ours = peer.clone()
    fault(ours)
    with pytest.raises(AssertionError):
        assert_accurate(ours, peer, exact)
