"""fold: plain convolutions that compute what the standardized ones did."""

import copy

import pytest
import timm.layers as timm
import torch
from torch import nn
from torch.nn.utils import prune
from transformers.models.bit import modeling_bit as bit

import bitkern
from bitkern.nn import WSConv2d
from bitkern.testing import assert_accurate, maps, strided
from tests.peers import outputs, randomize, relative, small_bit, small_dpt, small_timm

LAYERS = {
    "WSConv2d": (lambda: WSConv2d(12, 8, 3), nn.Conv2d),
    "WSConv2d groups": (lambda: WSConv2d(12, 8, (3, 2), 2, groups=4), nn.Conv2d),
    "WSConv2d unbiased": (lambda: WSConv2d(12, 8, 3, eps_outside=True, unbiased=True), nn.Conv2d),
    "WSConv2d gain": (lambda: WSConv2d(12, 8, 3, gain=True, scale=0.3, eps=1e-5), nn.Conv2d),
    "circular": (lambda: WSConv2d(12, 8, 3, padding=1, padding_mode="circular"), nn.Conv2d),
    "StdConv2d": (lambda: timm.StdConv2d(12, 8, 3), nn.Conv2d),
    "ScaledStdConv2d": (lambda: timm.ScaledStdConv2d(12, 8, 3, gamma=1.7), nn.Conv2d),
    "StdConv2dSame static": (lambda: timm.StdConv2dSame(12, 8, 3), nn.Conv2d),
    "StdConv2dSame": (lambda: timm.StdConv2dSame(12, 8, (4, 3), stride=3), timm.Conv2dSame),
    "ScaledStdConv2dSame": (lambda: timm.ScaledStdConv2dSame(12, 8, 4, 2), timm.Conv2dSame),
    "transformers": (lambda: bit.WeightStandardizedConv2d(12, 8, 3, padding=None), nn.Conv2d),
    "transformers same": (lambda: bit.WeightStandardizedConv2d(12, 8, 3, stride=2), None),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(layer, dtype, memory_format):
    make, cls = LAYERS[layer]
    model = bitkern.convert(randomize(make())).to(dtype, memory_format=memory_format)
    model.weight.requires_grad_(False)
    exact = copy.deepcopy(model).double()
    x = strided(maps((3, 12, 9, 10), dtype), "channels_last")
    unfolded, layout = model(x), model.weight.stride()
    assert bitkern.fold(model) is model
    assert isinstance(model, nn.Conv2d) and not isinstance(model, WSConv2d)
    assert cls is None or type(model) is cls
    assert dict(model.named_parameters()).keys() <= {"weight", "bias"}
    assert model.weight.stride() == layout and not model.weight.requires_grad
    assert_accurate(model(x), unfolded, exact(x.double()))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))


@pytest.mark.parametrize(
    "make", [lambda: bitkern.create_model("R26x0.5"), small_timm, small_bit, small_dpt]
)
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "autocast"])
def test_model(make, amp):
    model = bitkern.convert(randomize(make())).eval()
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        expected = outputs(model, x)
        got = outputs(bitkern.fold(model), x)
    assert not any(isinstance(m, WSConv2d) for m in model.modules())
    assert relative(got, expected) < (1e-2 if amp else 1e-5)


def test_the_trained_model_is_untouched_by_a_folded_copy():
    model = bitkern.convert(small_timm())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    folded = bitkern.fold(copy.deepcopy(model))
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert folded.state_dict().keys() == state.keys()
    bitkern.fold(folded)  # nothing left to do
    bitkern.fold(nn.Linear(2, 2))


class OwnConv(WSConv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_bad_input():
    cases = [
        (small_timm(), r"fold: stem.conv \(StdConv2d\) is not converted: bitkern.convert"),
        (nn.Sequential(nn.ReLU(), OwnConv(1, 1, 2)), r"fold: 1 \(OwnConv\) is of a subclass"),
        (
            nn.utils.parametrizations.weight_norm(WSConv2d(1, 1, 2)),
            r"fold: the module \(ParametrizedWSConv2d\) is of a subclass",
        ),
        (
            prune.l1_unstructured(WSConv2d(2, 2, 3), "weight", 0.5),
            r"fold: the module \(WSConv2d\) computes or shards its weight",
        ),
    ]
    for model, message in cases:
        state = model.state_dict()
        with pytest.raises(ValueError, match=message):
            bitkern.fold(model)
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    with pytest.raises(TypeError, match="fold: expected an nn.Module, got str"):
        bitkern.fold("R50x1")
