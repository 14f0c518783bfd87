"""Whole models of timm and transformers, converted and folded, against what they were."""

import copy

import pytest
import timm
import torch

import bitkern
from bitkern.nn import WSConv2d
from tests.compile.nodes import fused
from tests.peers import (
    distance,
    from_timm,
    gradients,
    outputs,
    relative,
    small_bit,
    small_dpt,
    small_timm,
)

SMOOTH = ["nfnet_l0", "dm_nfnet_f0", "efficientnet_b0_gn"]  # SiLU or GELU
TIMM = {  # side of the images, standardized convolutions, norms
    "resnetv2_50x1_bit": (48, 53, 49),
    "nfnet_l0": (32, 57, 0),
    "dm_nfnet_f0": (33, 57, 0),
    "vit_small_r26_s32_224": (64, 29, 29),
    "resnet50_gn": (48, 0, 53),
    "resnetv2_50d_gn": (48, 0, 51),
    "efficientnet_b0_gn": (48, 0, 49),
    "nf_resnet50": (48, 53, 0),
    "regnety_040_sgn": (48, 0, 71),
}
LARGE = ["dm_nfnet_f0", "vit_small_r26_s32_224", "regnety_040_sgn"]
TRANSFORMERS = {
    "BiT": (small_bit, 47, 12, 10),
    "BiT with SAME padding": (lambda: small_bit(global_padding="same"), 47, 12, 10),
    "BiT with SiLU": (lambda: small_bit(hidden_act="silu"), 47, 12, 10),
    "DPT-hybrid": (small_dpt, 64, 52, 52),
}


def assert_near(got, peer, exact):
    """Assert a relative L2 distance from float64 of at most twice the peer's, plus a rounding.

    The largest of a handful of logits would be chance, as is a rounding of float32.
    """
    tiny = max(1e-6, torch.finfo(got.dtype).eps)
    assert relative(got, exact) <= 2 * relative(peer, exact) + tiny


def check(model, x, convs, norms, smooth):
    """Check a converted model: float32 as near to float64 as the peer, float64 equal to it."""
    model.eval()
    peer = copy.deepcopy(model)
    assert bitkern.convert(model) is model
    assert sum(isinstance(m, WSConv2d) for m in model.modules()) == convs
    assert sum(isinstance(m, torch.nn.GroupNorm) for m in model.modules()) == norms
    assert all(row.converted for row in bitkern.explain(model) if "GroupNorm" in row.layer)

    logits, grads = gradients(model, x)
    peer_logits, peer_grads = gradients(peer, x)
    folded = bitkern.fold(copy.deepcopy(model))
    with torch.no_grad():
        folded_logits = outputs(folded, x)
    exact_logits, exact_grads = gradients(peer.double(), x.double())
    # Where a ReLU's input is 0 up to rounding, one derivative in thousands is another, for the
    # peer's float32 as well: whole gradients move by up to a percent.
    allowed = 2 * distance(peer_grads, exact_grads) + 1e-6
    assert distance(grads, exact_grads) <= (allowed if smooth else max(allowed, 2e-2))
    assert_near(logits, peer_logits, exact_logits)
    assert (logits - peer_logits).abs().max() < 1e-3
    assert (folded_logits - logits).abs().max() < 1e-4
    again, again_grads = gradients(model.double(), x.double())
    torch.testing.assert_close(again, exact_logits, rtol=1e-10, atol=1e-10)
    assert distance(again_grads, exact_grads) < 1e-10


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.sweep] * (name in LARGE)) for name in TIMM]
)
def test_timm(name):
    size, convs, norms = TIMM[name]
    options = {"img_size": size} if name.startswith("vit") else {}
    x = torch.randn(1, 3, size, size)
    check(from_timm(name, **options), x, convs, norms, name in SMOOTH)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    make, size, convs, norms = TRANSFORMERS[name]
    x = torch.randn(2, 3, size, size)
    check(make(), x, convs, norms, "SiLU" in name)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"avg_down": True, "stem_type": "deep"}], ids=str)
def test_blocks_with_odd_sizes(options, amp, memory_format):
    act = torch.nn.SiLU
    model = small_timm(act_layer=act, **options).to(memory_format=memory_format)
    x = torch.randn(3, 3, 37, 45).contiguous(memory_format=memory_format)
    peer = copy.deepcopy(model)
    bitkern.convert(model)
    logits, grads = gradients(model, x, amp)
    peer_logits, peer_grads = gradients(peer, x, amp)
    exact_logits, exact_grads = gradients(peer.double(), x.double())
    assert_near(logits, peer_logits, exact_logits)
    assert distance(grads, exact_grads) <= 2 * distance(peer_grads, exact_grads) + 1e-6


@pytest.mark.parametrize("make", [small_timm, small_bit])
def test_one_launch_and_one_node_per_pair(make, launches, monkeypatch):
    """The fused path standardizes once, and keeps nothing but sums and conv outputs."""
    model = bitkern.convert(make())
    monkeypatch.setattr("bitkern.nn.layers.standardize_for", None)
    found = fused(lambda x: outputs(model, x), torch.randn(1, 3, 40, 40))
    assert launches == [12] and found[0] == 3 * 3


def test_features():
    x = torch.randn(1, 3, 64, 64)
    for options in ({}, {"feature_cls": "getter"}, {"feature_cls": "fx"}, {"feature_cls": "hook"}):
        options |= {"features_only": True, "out_indices": (1, 3)}
        model = timm.create_model("resnetv2_50x1_bit", **options).eval()
        peer = copy.deepcopy(model)
        got, expected = bitkern.convert(model)(x), peer(x)
        for maps in zip(got, expected, peer.double()(x.double()), strict=True):
            assert_near(*maps)
    model = from_timm("resnetv2_50x1_bit").eval()
    peer = copy.deepcopy(model)
    bitkern.convert(model)
    got, expected = model.forward_intermediates(x)[1], peer.forward_intermediates(x)[1]
    exact = peer.double().forward_intermediates(x.double())[1]
    for maps in zip(got, expected, exact, strict=True):
        assert_near(*maps)


@pytest.mark.parametrize("trace", ["torchvision", "timm", "torch.fx"])
def test_traced_by_fx_after_conversion(trace):
    from timm.layers import create_feature_extractor as timm_extractor
    from torchvision.models.feature_extraction import create_feature_extractor

    model = small_timm().eval()
    peer = copy.deepcopy(model)
    bitkern.convert(model)
    x = torch.randn(2, 3, 40, 33)
    if trace == "torch.fx":
        got, expected = torch.fx.symbolic_trace(model)(x), peer(x)
    else:
        extract = timm_extractor if trace == "timm" else create_feature_extractor
        got, expected = (extract(m, ["stages.0", "norm"])(x) for m in (model, peer))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_hidden_states_of_transformers():
    model = small_bit().eval()
    peer = copy.deepcopy(model)
    bitkern.convert(model)
    x = torch.randn(1, 3, 48, 48)
    for options in ({"output_hidden_states": True}, {"return_dict": False}):
        got, expected = model(x, **options), peer(x, **options)
        torch.testing.assert_close(got[:], expected[:], rtol=1e-4, atol=1e-4)
