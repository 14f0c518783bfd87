"""The layers as drop-in replacements for nn.Conv2d and nn.GroupNorm."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from bitkern import reference
from bitkern.nn import GroupNormAct, WSConv2d


@pytest.mark.parametrize("ours, theirs", [(WSConv2d, nn.Conv2d), (GroupNormAct, nn.GroupNorm)])
def test_signature_begins_as_torchs(ours, theirs):
    """Ours adds keyword-only arguments; so may newer versions of theirs."""

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


def test_copy_pickle_functional_call_and_hooks():
    net = nn.Sequential(WSConv2d(3, 8, 3, gain=True), GroupNormAct(4, 8, act="silu"))
    x = torch.randn(2, 3, 6, 6)
    expected = net(x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), expected)
    doubled = {k: v * 2 for k, v in net.state_dict().items()}
    assert not torch.equal(torch.func.functional_call(net, doubled, (x,)), expected)
    seen = []
    for module in net:
        module.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    net(x)
    assert len(seen) == 2


def test_meta_device_and_dtype():
    assert WSConv2d(3, 8, 3, device="meta", gain=True).gain.is_meta
    assert WSConv2d(3, 8, 3, dtype=torch.bfloat16, gain=True).gain.dtype == torch.bfloat16
