"""The network against timm's and transformers', and what its users do with it."""

import pytest
import timm
import torch
from transformers import BitConfig, BitForImageClassification

from bitkern.models import ARCHITECTURES, FeatureNet, ResNetV2, create_model, load_state_dict
from bitkern.nn import GroupNormAct, WSConv2d
from bitkern.testing import assert_accurate
from tests.models.helpers import PEER_EPS, randomize, small, timm_bit, with_eps
from tests.peers import relative

# Parameters with 1000 classes in millions, WS convolutions, GroupNorms: facts about BiT.
SIZES = {
    "R50x1": (25.55, 53, 49),
    "R50x3": (217.32, 53, 49),
    "R101x1": (44.54, 104, 100),
    "R101x3": (387.93, 104, 100),
    "R152x2": (236.34, 155, 151),
    "R152x4": (936.53, 155, 151),
}


@pytest.mark.parametrize("name", SIZES)
def test_size(name):
    model = create_model(name, 1000, device="meta")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    convs = sum(isinstance(m, WSConv2d) for m in model.modules())
    norms = sum(isinstance(m, GroupNormAct) for m in model.modules())
    assert (round(millions, 2), convs, norms) == SIZES[name]


def twins(name, output_stride=32):
    """Return our network and timm's with the same weights."""
    theirs = timm_bit(name, output_stride)
    ours = ResNetV2(*ARCHITECTURES[name], 7, output_stride=output_stride)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def assert_gradients_agree(ours, theirs, x, theirs_of_ours=lambda name: name):
    """In float64 and with the same eps, only another network differs by more than 1e-11."""
    ours, theirs = with_eps(ours, PEER_EPS).double(), theirs.double()
    xs = [x.double().requires_grad_() for _ in range(2)]
    logits = [model(x) for model, x in zip((ours, theirs), xs, strict=True)]
    logits[1] = getattr(logits[1], "logits", logits[1])
    assert relative(*logits) < 1e-11
    cotangent = torch.randn_like(logits[0])
    for out in logits:
        out.backward(cotangent)
    assert relative(xs[0].grad, xs[1].grad) < 1e-11
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        expected = grads.pop(theirs_of_ours(name))
        assert relative(p.grad, expected.reshape(p.shape)) < 1e-11, name
    assert not grads


@pytest.mark.parametrize(
    "name, output_stride, size",
    [
        ("R50x1", 32, (65, 97)),
        ("R50x1", 16, (33, 64)),
        ("R50x1", 8, (65, 47)),
        ("R26x0.5", 32, (32, 32)),
        ("R26x0.5", 16, (97, 65)),
        ("R26x0.5", 8, (33, 31)),
    ],
)
def test_equals_timm(name, output_stride, size):
    ours, theirs = twins(name, output_stride)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-4  # the two values of eps; measured 8e-6
    assert_gradients_agree(ours, theirs, x)


def test_equals_timms_named_model():
    theirs = randomize(timm.create_model("resnetv2_50x1_bit.goog_in21k", num_classes=5))
    ours = create_model("resnetv2_50x1_bit.goog_in21k", num_classes=5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-4
        features = theirs.forward_features(x)
        assert relative(ours.forward_features(x), features) < 1e-3
        for pre_logits in (False, True):
            expected = theirs.forward_head(features, pre_logits=pre_logits)
            assert relative(ours.forward_head(features, pre_logits), expected) < 1e-6


def test_equals_transformers():
    config = BitConfig(num_labels=7)  # its defaults are google/bit-50: R50x1, pre-activation
    theirs = randomize(BitForImageClassification(config))
    ours = ResNetV2(*ARCHITECTURES["R50x1"], 7)
    load_state_dict(ours, theirs.state_dict())
    x = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        assert relative(ours(x), theirs(x).logits) < 1e-4

    def their_name(name):
        if name.startswith("head.fc"):
            return name.replace("head.fc", "classifier.1")
        name = name.replace("stem.conv", "embedder.convolution")
        return "bit." + name.replace("stages", "encoder.stages").replace("blocks", "layers")

    assert_gradients_agree(ours, theirs, x, their_name)


@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_features_equal_timms(output_stride):
    ours, full = twins("R26x0.5", output_stride)
    x = torch.randn(2, 3, 65, 97)
    expected = full.forward_intermediates(x, intermediates_only=True)
    info = full.feature_info
    net = with_eps(FeatureNet(ours), PEER_EPS)
    assert net.channels == [f["num_chs"] for f in info]
    assert net.reductions == [f["reduction"] for f in info]
    maps = net(x)
    for got, want in zip(maps, expected, strict=True):
        assert got.shape == want.shape
        assert relative(got, want) < 1e-5


def test_features_at_chosen_stages():
    model = small()
    x = torch.randn(2, 3, 64, 64)
    every = FeatureNet(model)(x)
    net = FeatureNet(model, (-3, 1))
    assert (net.channels, net.reductions) == ([256, 128], [8, 4])
    assert [tuple(m.shape) for m in net(x)] == [(2, 256, 8, 8), (2, 128, 16, 16)]
    assert all(torch.equal(got, every[i]) for got, i in zip(net(x), (2, 1), strict=True))
    assert len(net.stages) == 2  # what it does not need would get no gradient
    stem = FeatureNet(model, [0])
    assert torch.equal(stem(x)[0], every[0]) and len(stem.stages) == 0
    for bad in ((5,), (-6,), ()):
        with pytest.raises(ValueError, match=r"out_indices: expected some of 0 to 4, got"):
            FeatureNet(model, bad)


def test_feature_net_from_its_name():
    net = create_model("R26x0.5", features_only=True, out_indices=(2, 4), output_stride=16)
    assert (net.channels, net.reductions) == ([256, 1024], [8, 16])
    net.set_grad_checkpointing()
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    sum(m.sum() for m in net(x)).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_head():
    model = small()
    assert torch.equal(model.get_classifier().weight, model.state_dict()["head.fc.weight"])
    x = torch.randn(2, 3, 40, 40)
    features = model.forward_features(x)
    assert features.shape == (2, 1024, 2, 2) and features.min() == 0
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
    torch.testing.assert_close(model.forward_head(features), model(x))

    model.reset_classifier(4)
    assert model.num_classes == 4
    assert model(x).tolist() == [[0.0] * 4] * 2  # BiT starts a new head at zero
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features.mean((2, 3)))
    model.to(torch.bfloat16).reset_classifier(3)
    assert model.get_classifier().weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="num_classes: expected 0 or more, got -1"):
        model.reset_classifier(-1)


def test_freeze_backbone():
    model = small()
    model.freeze_backbone()
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    model(x).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"head.fc.weight", "head.fc.bias"} and x.grad is not None


def test_grad_checkpointing_gives_the_same_gradients():
    model = small()
    x = torch.randn(2, 3, 40, 56)
    runs, calls = [], []
    model.stages[2].blocks[1].conv2.register_forward_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        calls.clear()
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        runs.append([leaf.grad, *(p.grad for p in model.parameters())])
        assert len(calls) == 1 + enable  # computed again in backward
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("batch", [0, 1])
def test_smallest_batches(batch):
    model = small()
    x = torch.randn(batch, 3, 33, 47, requires_grad=True)
    y = model(x)
    assert y.shape == (batch, 7)
    y.square().sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_channels_last():
    x = torch.randn(2, 3, 49, 64)
    other = small().to(memory_format=torch.channels_last)
    features = other.forward_features(x.contiguous(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert relative(other.forward_head(features), small()(x)) < 1e-5

    # In float64, because one ReLU that rounding turns over moves the float32 gradients by 1e-2.
    grads = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = small().to(torch.float64, memory_format=memory_format)
        images = x.to(torch.float64, memory_format=memory_format).requires_grad_()
        model(images).square().sum().backward()
        grads.append([images.grad, *(p.grad for p in model.parameters())])
    assert all(relative(b, a) < 1e-11 for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_accurate_as_timms(dtype):
    ours, theirs = twins("R26x0.5")
    x = torch.randn(4, 3, 64, 64, dtype=dtype)
    with torch.no_grad():
        logits, peer = ours.to(dtype)(x), theirs.to(dtype)(x)
        exact = ours.double()(x.double())
    assert_accurate(logits, peer, exact)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_autocast_is_as_accurate_as_timms(memory_format):
    ours, theirs = twins("R26x0.5")
    x = torch.randn(4, 3, 65, 96).contiguous(memory_format=memory_format)
    with torch.autocast("cpu", torch.bfloat16):
        logits, peer = ours(x), theirs(x)
    logits.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in ours.parameters())
    assert_accurate(logits, peer, ours.double()(x.double()))


def test_hooks_see_the_sums_of_blocks():
    model = small()
    seen = {}
    for name in ("stages.1", "stages.1.blocks.0", "stages.1.blocks.1"):
        hook = lambda module, args, out, name=name: seen.update({name: (args[0], out)})  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    x = torch.randn(1, 3, 32, 32)
    _, first, second, _, _ = FeatureNet(model)(x)
    assert torch.equal(seen["stages.1"][0], first) and torch.equal(seen["stages.1"][1], second)
    assert torch.equal(seen["stages.1.blocks.0"][1], seen["stages.1.blocks.1"][0])
    assert torch.equal(seen["stages.1.blocks.1"][1], second)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"width": 0.7}, "width: 64 * width must be a multiple of 32, got width 0.7"),
        ({"output_stride": 4}, "output_stride: expected 8, 16 or 32, got 4"),
        ({"num_classes": -2}, "num_classes: expected 0 or more, got -2"),
        ({"in_chans": 0}, "in_chans: expected 1 or more, got 0"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError) as error:
        ResNetV2((2, 2, 2, 2), **{"width": 0.5} | kwargs)
    assert str(error.value) == message
