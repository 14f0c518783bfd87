"""ws_conv2d: the standardized weight meets the convolution."""

import pytest
import torch
import torch.nn.functional as F

import bitkern
from bitkern import ops, reference
from bitkern.testing import assert_accurate, maps, strided
from tests.ops.backends import implementations

every_implementation = implementations("weight_standardize")
CASES = [
    dict(),
    dict(stride=2, padding=1),
    dict(padding=(2, 1), dilation=2, groups=2),
    dict(padding="same"),
]


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(name, device, dtype, case):
    groups = case.get("groups", 1)
    x = maps((2, 8, 9, 8), dtype, shift=0.5).to(device)
    w = (torch.randn(6, 8 // groups, 3, 3) * 0.05 + 0.3).to(device, dtype)
    b = torch.randn(6).to(device, dtype)

    def run(fn, dtype):
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x, w, b)]
        y = fn(*leaves, **case)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    def peer(x, w, b, **case):
        w = reference.weight_standardize(w)
        return F.conv2d(x, w, b, **case)

    with bitkern.use_backend(name):
        ours = run(ops.ws_conv2d, dtype)
    results = ours, run(peer, dtype), run(reference.ws_conv2d, torch.float64)
    torch.testing.assert_close(results[2], run(peer, torch.float64))
    for result in zip(*results, strict=True):
        assert_accurate(*(t.cpu() for t in result))


@every_implementation
def test_autocast(name, device):
    x, w = maps((2, 8, 6, 6)).to(device), torch.randn(4, 8, 3, 3, device=device, requires_grad=True)
    with bitkern.use_backend(name), torch.autocast(device, torch.bfloat16):
        y = ops.ws_conv2d(x, w, torch.zeros(4, device=device))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert w.grad.dtype == torch.float32
    # Standardized in float32 and rounded once.
    expected = F.conv2d(x.bfloat16(), reference.weight_standardize(w).bfloat16())
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


@every_implementation
def test_float32_weight_beside_16_bit_maps(name, device):
    x, w = maps((2, 8, 6, 6), torch.bfloat16).to(device), torch.randn(4, 8, 1, 1, device=device)
    with bitkern.use_backend(name):
        assert ops.ws_conv2d(x, w).dtype == torch.bfloat16


@every_implementation
@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_the_weight_is_in_the_layout_of_the_maps(monkeypatch, name, device, kind):
    seen = []
    conv2d = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, w, *a: seen.append(w) or conv2d(x, w, *a))
    x = strided(maps((2, 8, 6, 6)), kind).to(device)
    with bitkern.use_backend(name):
        y = ops.ws_conv2d(x, torch.randn(4, 8, 3, 3, device=device))
    format = torch.channels_last if kind == "channels_last" else torch.contiguous_format
    assert seen[0].is_contiguous(memory_format=format)
    assert y.is_contiguous(memory_format=format)


def test_batch_of_none_and_unbatched():
    w = torch.randn(4, 8, 3, 3)
    assert ops.ws_conv2d(torch.randn(0, 8, 6, 6), w).shape == (0, 4, 4, 4)
    assert ops.ws_conv2d(torch.randn(8, 6, 6), w).shape == (4, 4, 4)


X, WEIGHT = torch.ones(1, 8, 3, 3), torch.ones(2, 8, 1, 1)


@pytest.mark.parametrize(
    "error, message, x, weight",
    [
        (ValueError, "x: expected 8 channels", X[:, :4], WEIGHT),
        (ValueError, r"x: expected shape \(N, C", torch.ones(4), WEIGHT),
        (ValueError, r"weight: expected shape \(O, I, kh", X, torch.ones(2, 8)),
        (TypeError, "x: expected the dtype of weight", X, WEIGHT.bfloat16()),
    ],
)
def test_errors(error, message, x, weight):
    with pytest.raises(error, match=message):
        ops.ws_conv2d(x, weight)
