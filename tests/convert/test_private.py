"""Gradients of each sample by Opacus, against one backward pass for each sample."""

import copy

import pytest
import timm
import torch
from torch import nn
from transformers.models.bit import modeling_bit as bit

import bitkern
from bitkern.nn import GroupNormAct, WSConv2d
from tests.peers import outputs, randomize, relative, small_bit, small_timm

opacus = pytest.importorskip("opacus", reason="opacus is not installed")
pytest.importorskip("bitkern.private")
GRAD_SAMPLERS = opacus.GradSampleModule.GRAD_SAMPLERS
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning:opacus"),
]


def conv(*args, **options):
    return lambda: WSConv2d(*args, eps=1e-5, **options)


def converted(make):
    return lambda: bitkern.convert(nn.Sequential(make()))[0]


GAIN = {"gain": True, "scale": 0.5, "eps_outside": True, "unbiased": True}
LAYERS = {
    "conv": conv(4, 6, 3, 2, (1, 2), groups=2, **GAIN),
    "conv 1x1": conv(4, 6, 1, bias=False),
    "conv same": conv(4, 8, (3, 2), 1, "same", 2),
    "conv reflect": conv(4, 8, 3, padding=2, padding_mode="reflect"),
    "norm": lambda: GroupNormAct(2, 4, act="silu"),
    "GroupNorm": converted(lambda: nn.GroupNorm(2, 4)),
    "InstanceNorm2d": converted(lambda: nn.InstanceNorm2d(4, affine=True)),
    "timm StdConv2dSame": converted(lambda: timm.layers.StdConv2dSame(4, 8, 3, 2)),
    "timm ScaledStdConv2d": converted(lambda: timm.layers.ScaledStdConv2d(4, 8, 3)),
    "timm GroupNormAct": converted(lambda: timm.layers.GroupNormAct(4, 2, act_layer=nn.Tanh)),
    "transformers": converted(lambda: bit.WeightStandardizedConv2d(4, 8, 3, 2, padding="SAME")),
}
MODELS = {
    "bitkern": lambda: bitkern.create_model("R26x0.5", num_classes=5, zero_head=False),
    "timm": lambda: bitkern.convert(small_timm()),
    "transformers": lambda: bitkern.convert(small_bit()),
}


def loss_of(module, x):
    y = outputs(module, x)
    return (y * torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype).view(y[0].shape)).square().sum()


def check(model, x, bound):
    wrapped = opacus.GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    loss_of(wrapped, x).backward()
    ours = [p.grad_sample for p in wrapped.parameters()]
    for i in range(len(x)):
        expected = torch.autograd.grad(loss_of(model, x[i : i + 1]), [*model.parameters()])
        for got, grad in zip(ours, expected, strict=True):
            assert got.dtype == grad.dtype and relative(got[i], grad) < bound


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers(make, dtype, bound):
    layer = randomize(make()).to(dtype)
    assert type(layer) in GRAD_SAMPLERS
    x = torch.randn(3, 4, 7, 6, dtype=dtype) + 0.5
    check(layer, x, bound)
    check(layer, x.contiguous(memory_format=torch.channels_last), bound)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models(make):
    model = randomize(make()).double()
    check(model, torch.randn(2, 3, 40, 33).double(), 1e-9)
    for module in model.modules():
        own = any(p.requires_grad for p in module.parameters(recurse=False))
        assert not own or type(module) in GRAD_SAMPLERS


def test_frozen_parameters_and_an_empty_batch():
    layers = nn.Sequential(conv(3, 8, 3, gain=True)(), GroupNormAct(2, 8), conv(8, 4, 1)())
    for parameter in (layers[0].weight, layers[1].weight, layers[2].bias):
        parameter.requires_grad_(False)
    wrapped = opacus.GradSampleModule(layers, loss_reduction="sum")
    for samples in (2, 0):
        wrapped.zero_grad()
        loss_of_batch = wrapped(torch.randn(samples, 3, 5, 5)).square().sum()
        loss_of_batch.backward()
        for p in wrapped.parameters():
            assert not p.requires_grad or p.grad_sample.shape == (samples, *p.shape)


def test_what_cannot_be_repeated_is_refused():
    norm = timm.layers.GroupNormAct(4, 2, drop_layer=nn.Dropout)
    wrapped = opacus.GradSampleModule(converted(lambda: norm)())
    with pytest.raises(NotImplementedError, match="expected GroupNormAct with an activation alone"):
        wrapped(torch.randn(2, 4, 3, 3)).sum().backward()


def test_privacy_engine():
    """A step of private training is that of Opacus without our samplers."""
    x, labels = torch.randn(8, 3, 9, 9), torch.arange(8) % 4
    weights = []
    for mode in ("hooks", "functorch"):
        torch.manual_seed(0)
        model = nn.Sequential(
            WSConv2d(3, 8, 3), GroupNormAct(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 4),
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        data = torch.utils.data.TensorDataset(x, labels)
        engine = opacus.PrivacyEngine()
        model, optimizer, loader = engine.make_private(
            module=model, optimizer=optimizer, noise_multiplier=1.0, max_grad_norm=0.1,
            data_loader=torch.utils.data.DataLoader(data, batch_size=8),
            grad_sample_mode=mode, poisson_sampling=False,
        )  # fmt: skip
        for batch, targets in loader:
            nn.functional.cross_entropy(model(batch), targets).backward()
            optimizer.step()
        assert engine.get_epsilon(delta=1e-3) > 0
        weights.append(list(model.parameters()))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
