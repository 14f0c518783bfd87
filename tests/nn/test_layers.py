"""The layers as drop-in replacements for nn.Conv2d and nn.GroupNorm."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitkern import reference
from bitkern.nn import GroupNormAct, WSConv2d
from bitkern.testing import affine, assert_accurate, maps


@pytest.mark.parametrize("ours, theirs", [(WSConv2d, nn.Conv2d), (GroupNormAct, nn.GroupNorm)])
def test_signature_begins_as_torchs(ours, theirs):
    """bitkern adds keyword-only arguments; newer versions of PyTorch may too."""

    def positional(layer):
        parameters = inspect.signature(layer).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]

    assert positional(ours) == positional(theirs)


def test_conv_state_dict_and_result():
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
    ws = WSConv2d(6, 8, 3, stride=2, padding=1, groups=2)
    ws.load_state_dict(conv.state_dict(), strict=True)
    x = torch.randn(2, 6, 9, 7)
    expected = reference.ws_conv2d(x, conv.weight, conv.bias, 2, 1, 1, 2)
    torch.testing.assert_close(ws(x), expected)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode):
    options = dict(padding=(1, 2), padding_mode=mode, bias=False)
    conv, ws = nn.Conv2d(4, 8, 3, **options), WSConv2d(4, 8, 3, **options)
    ws.load_state_dict(conv.state_dict())
    conv.weight.data = reference.weight_standardize(conv.weight.data)
    x = torch.randn(2, 4, 9, 7)
    torch.testing.assert_close(ws(x), conv(x))


def test_gain_is_a_parameter():
    ws = WSConv2d(4, 8, 3, gain=True, scale=0.5, eps=1e-5)
    assert ws.gain.shape == (8, 1, 1, 1)
    assert set(ws.state_dict()) == {"weight", "bias", "gain"}
    with torch.no_grad():
        ws.gain.copy_(torch.randn(8, 1, 1, 1))
    x = torch.randn(2, 4, 5, 5)
    expected = reference.ws_conv2d(x, ws.weight, ws.bias, eps=1e-5, gain=ws.gain, scale=0.5)
    torch.testing.assert_close(ws(x), expected)
    assert set(WSConv2d(4, 8, 3).state_dict()) == {"weight", "bias"}


def test_group_norm_state_dict_and_result():
    norm, ours = nn.GroupNorm(4, 8), GroupNormAct(4, 8)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(8))
        norm.bias.copy_(torch.randn(8))
    ours.load_state_dict(norm.state_dict(), strict=True)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(ours(x), norm(x).relu())
    assert "act='relu'" in repr(ours)
    with pytest.raises(ValueError, match="act: expected one of relu, silu, .*none, got 'tanh'"):
        GroupNormAct(4, 8, act="tanh")


def modulated(norm, x, scale, shift):
    """Compute a modulated norm operation by operation."""
    parameters = (None if p is None else p.to(x.dtype) for p in (norm.weight, norm.bias))
    z, pixels = F.group_norm(x, norm.num_groups, *parameters, norm.eps), [1] * (x.ndim - 2)
    z = z if scale is None else z * (1 + scale.reshape(*x.shape[:2], *pixels))
    return F.silu(z if shift is None else z + shift.reshape(*x.shape[:2], *pixels))


@pytest.mark.parametrize("own", [True, False], ids=["affine", "not affine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_and_shift(own, dtype):
    for shape in ((3, 8, 5, 3), (1, 8), (0, 8, 3)):
        norm, x = GroupNormAct(4, 8, affine=own, act="silu"), maps(shape, dtype)
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        scale, shift = affine(8, dtype, samples=shape[:1])
        with_pixels = shift.reshape(*shape[:2], *[1] * (len(shape) - 2))
        for given in ((scale, with_pixels), (scale, None), (None, shift)):
            results = []
            for fn, to in ((norm, dtype), (modulated, dtype), (modulated, torch.float64)):
                leaves = [t if t is None else t.to(to).requires_grad_() for t in (x, *given)]
                y = fn(*leaves) if fn is norm else fn(norm, *leaves)
                wanted = [*(t for t in leaves if t is not None), *norm.parameters()]
                grads = torch.autograd.grad(y, wanted, torch.cos(x.to(to)))
                results.append([y, *grads])
            every = [*zip(*results, strict=True)]
            # The others are sums of terms that cancel.
            for ours, peer, exact in every[:2]:
                assert_accurate(ours, peer, exact)
            for ours, peer, exact in every[2:]:
                allowed = 2 * (peer - exact).norm() + 1e-4 * exact.norm()
                assert ours.dtype == peer.dtype and (ours - exact).norm() <= allowed


@pytest.mark.parametrize(
    "error, message, given",
    [
        (ValueError, r"scale: .* \(2, 8\) or \(2, 8, 1, 1\) .*, got \(8,\)", [torch.ones(8)]),
        (ValueError, r"shift: .*, got \(1, 8\)", [None, torch.ones(1, 8)]),
        (TypeError, "scale: expected a floating dtype", [torch.ones(2, 8, dtype=torch.int)]),
        (ValueError, "shift: expected the device", [None, torch.ones(2, 8, device="meta")]),
    ],
)
def test_scale_and_shift_that_do_not_fit(error, message, given):
    with pytest.raises(error, match=message):
        GroupNormAct(4, 8)(torch.ones(2, 8, 3, 3), *given)


def test_copy_and_pickle():
    net = nn.Sequential(WSConv2d(3, 8, 3, gain=True), GroupNormAct(4, 8, act="silu"))
    x = torch.randn(2, 3, 6, 6)
    expected = net(x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), expected)


def test_meta_device_and_dtype():
    assert WSConv2d(3, 8, 3, device="meta", gain=True).gain.is_meta
    assert WSConv2d(3, 8, 3, dtype=torch.bfloat16, gain=True).gain.dtype == torch.bfloat16
