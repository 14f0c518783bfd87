"""Activations and instance norms that convert takes, and look-alikes that it leaves."""

import copy
import pickle

import pytest
import timm.layers as timm
import torch
from timm.layers import activations
from torch import nn
from transformers.activations import GELUActivation, GELUTanh, MishActivation

import bitkern
import bitkern.convert.libraries.timm
import bitkern.convert.libraries.transformers
from bitkern.convert import libraries
from bitkern.nn.activations import act_of
from bitkern.reference import ACTIVATIONS
from tests.peers import gradients, randomize, relative

X = torch.linspace(-5, 5, 101)


class OwnReLU(nn.ReLU):
    pass


@pytest.mark.parametrize(
    ("act", "module"),
    [
        ("relu", nn.ReLU(inplace=True)),
        ("silu", nn.SiLU()),
        ("leaky_relu", nn.LeakyReLU(inplace=True)),
        ("gelu", nn.GELU()),
        ("mish", nn.Mish()),
        ("hardswish", nn.Hardswish()),
        ("silu", activations.Swish()),
        ("gelu", activations.GELU()),
        ("mish", activations.Mish()),
        ("hardswish", activations.HardSwish()),
        ("gelu", GELUActivation(use_gelu_python=True)),
        ("mish", MishActivation()),
        (None, nn.LeakyReLU(0.2)),
        (None, nn.GELU(approximate="tanh")),
        (None, activations.GELUTanh()),
        (None, GELUTanh()),
        (None, nn.ELU()),
        (None, OwnReLU()),
    ],
    ids=str,
)
def test_act_of(act, module):
    assert act_of(module, libraries.timm.ACTS | libraries.transformers.ACTS) == act
    if act is not None:
        torch.testing.assert_close(module(X.clone()), ACTIVATIONS[act](X))


@pytest.mark.parametrize("module", [nn.LeakyReLU(0.2), nn.GELU("tanh"), OwnReLU()], ids=str)
def test_what_is_no_such_activation_is_called(module):
    model = bitkern.convert(nn.Sequential(nn.GroupNorm(2, 4), module))
    x = torch.randn(2, 4, 5, 3)
    assert type(model) is nn.Sequential
    torch.testing.assert_close(model(x), module(torch.group_norm(x, 2)))
    norm = bitkern.convert(timm.GroupNormAct(4, 2, act_layer=lambda **_: copy.deepcopy(module)))
    assert norm.fusion()[0] == "none"
    torch.testing.assert_close(norm(x), module(torch.group_norm(x, 2)))


NORMS = nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_instance_norm(dimensions, affine, training):
    peer = randomize(NORMS[dimensions - 1](6, affine=affine)).train(training)
    peer = nn.Sequential(peer, nn.LeakyReLU())
    state, model = copy.deepcopy(peer.state_dict()), bitkern.convert(copy.deepcopy(peer))
    table = bitkern.explain(model)
    assert [row.converted for row in table] == [True]
    assert isinstance(model[0], type(peer[0])) and repr(model) == repr(peer)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    model.load_state_dict(state)
    sizes = (5, 4, 3)[:dimensions]
    for shape in ((2, 6, *sizes), (6, *sizes)):  # a batch, and a sample without one
        x = (3 * torch.randn(shape) + 5).requires_grad_()
        expected = gradients(peer, x)
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(gradients(twin, x), expected, rtol=1e-4, atol=1e-4)
            assert relative(twin[0](x), peer[0](x)) < 1e-6
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 6, *sizes)
    torch.testing.assert_close(traced(x), peer(x))
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), peer(x))


@pytest.mark.parametrize("training", [True, False])
def test_instance_norm_refuses_what_pytorch_refuses(training):
    model = bitkern.convert(nn.Sequential(nn.InstanceNorm2d(6, affine=True), nn.LeakyReLU()))
    model.train(training)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        model(torch.randn(2, 6, 1, 1))
    with pytest.raises(ValueError, match="expected 3D or 4D input"):
        model(torch.randn(2, 6))
    with pytest.raises(ValueError, match="to match num_features"):
        model(torch.randn(2, 12, 3, 3))
    plain = bitkern.convert(nn.InstanceNorm2d(6))
    x = torch.randn(2, 12, 3, 3)
    with pytest.warns(UserWarning, match="does not match num_features"):
        torch.testing.assert_close(plain(x), nn.functional.instance_norm(x))


def test_instance_norm_left():
    class Own(nn.InstanceNorm2d):
        pass

    model = nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True), nn.ReLU(), Own(4))
    classes = [type(m) for m in model.modules()]
    rows = bitkern.explain(bitkern.convert(model))
    assert [type(m) for m in model.modules()] == classes
    assert not any(row.converted for row in rows)
    assert "running statistics" in rows[0].reason
    assert "a subclass of InstanceNorm2d" in rows[1].reason
    hidden = nn.InstanceNorm2d(4)
    assert "has not seen it" in bitkern.explain(hidden)[0].reason
