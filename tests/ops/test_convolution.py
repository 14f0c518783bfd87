"""Convolutions by matrix products, which processors with matrix units get, on any processor."""

import pytest
import torch

from bitkern.ops import convolution as convolutions
from bitkern.ops.convolution import Conv, convolution, convolution_backward
from bitkern.testing import assert_accurate

# Channels in, out, kernel, size of the map, stride, padding, bias.
CASES = {
    "1x1": (24, 40, 1, (7, 5), 1, 0, False),
    "bias": (24, 40, 1, (7, 5), 1, 0, True),
    "strided": (24, 40, 1, (7, 6), 2, 0, True),
    "small map": (256, 264, 3, (6, 5), 1, 1, True),
    "small map, strided": (256, 256, 3, (14, 13), 2, 1, False),
    "two kinds of sides": (256, 256, (3, 1), (9, 8), (1, 2), (1, 0), False),
    "one pixel": (24, 40, 1, (1, 1), 1, 0, False),
    "padded 1x1": (24, 40, 1, (7, 5), 1, 1, False),
    "large map": (24, 40, 3, (7, 5), 1, 1, False),
}


def pair(n):
    return n if isinstance(n, tuple) else (n, n)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients(case, channels_last, batch, monkeypatch):
    monkeypatch.setattr(convolutions._torch, "has_amx", lambda: True)
    i, o, kernel, size, stride, padding, biased = CASES[case]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    a = (torch.randn(batch, i, *size) + 0.5).bfloat16().to(memory_format=layout)
    weight = (torch.randn(o, i, *pair(kernel)) * 0.1 + 0.02).bfloat16()
    bias = torch.randn(o).bfloat16() if biased else None
    conv = Conv(pair(stride), pair(padding), (1, 1), False, (0, 0), 1)
    ours = convolution(a, weight, bias, conv)
    peer = torch.convolution(a, weight, bias, *conv)
    exact = torch.convolution(a.double(), weight.double(), bias.double() if biased else None, *conv)
    assert ours.shape == peer.shape and ours.dtype == peer.dtype
    assert_accurate(ours, peer, exact, "result")
    dout = torch.randn_like(peer).to(memory_format=layout)
    mask = [True, True, biased]
    grads = convolution_backward(dout, a, weight, conv, mask, False)
    backward = torch.ops.aten.convolution_backward
    peers = backward(dout, a, weight, [o], *conv, mask)
    exacts = backward(dout.double(), a.double(), weight.double(), [o], *conv, mask)
    for name, *trio in zip(("da", "dweight", "dbias"), grads, peers, exacts, strict=True):
        if name != "dbias" or biased:
            assert trio[0].shape == trio[1].shape and trio[0].dtype == trio[1].dtype
            assert_accurate(*trio, name)


def test_only_wanted_gradients(monkeypatch):
    monkeypatch.setattr(convolutions._torch, "has_amx", lambda: True)
    a = torch.randn(2, 8, 5, 5).bfloat16().to(memory_format=torch.channels_last)
    weight, dout = torch.randn(4, 8, 1, 1).bfloat16(), torch.randn(2, 4, 5, 5).bfloat16()
    conv = Conv((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    for mask in ([True, False, False], [False, True, False], [False, False, True]):
        grads = convolution_backward(dout, a, weight, conv, mask, False)
        assert [grad is not None for grad in grads] == mask
