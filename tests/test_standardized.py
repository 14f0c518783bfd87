"""All weights at once: per forward pass and per optimizer step."""

import gc
import weakref

import pytest
import torch
from torch import nn

import bitkern
from bitkern import ops, standardized
from bitkern.nn import GroupNormAct, WSConv2d
from bitkern.nn.standardized import per_forward


def net():
    """Layers of four kinds: plain, with gain, another eps, frozen."""
    torch.manual_seed(0)
    return nn.Sequential(
        WSConv2d(3, 8, 3, padding=1, bias=False),
        GroupNormAct(4, 8),
        WSConv2d(8, 8, 1, gain=True, scale=0.7),
        GroupNormAct(2, 8, act="silu"),
        WSConv2d(8, 8, 3, eps=1e-5, eps_outside=True),
        WSConv2d(8, 8, 1).requires_grad_(False),
        WSConv2d(8, 4, 1),
    )


def gradients(model, batches, context):
    model.zero_grad()
    with context(model):
        for x in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
                loss = model(x.float()).square().mean() / len(batches)
            loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def nothing(model):
    return bitkern.use_backend("auto")


@pytest.fixture
def batches():
    return [torch.randn(n, 3, 8, 8) for n in (3, 1, 2)]


@pytest.mark.parametrize("context", [per_forward, standardized])
def test_float64_gradients_are_exact(context, batches):
    model = net().double()
    batches = [x.double() for x in batches]
    model.forward = lambda x: nn.Sequential.forward(model, x.double())
    expected = gradients(model, batches, nothing)
    if context is per_forward:  # a graph serves one backward pass
        got = gradients(model, batches[:1], context)
        expected = gradients(model, batches[:1], nothing)
    else:
        got = gradients(model, batches, context)
    assert got.keys() == expected.keys() and "5.weight" not in got
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_micro_batches_in_float32_and_bfloat16(backend, batches):
    model = net()
    with bitkern.use_backend(backend):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            batches = [x.to(dtype) for x in batches]
            expected = gradients(model, batches, nothing)
            got = gradients(model, batches, standardized)
            for name, grad in expected.items():
                assert (got[name] - grad).norm() <= tolerance * grad.norm(), (dtype, name)


def test_one_launch_per_kind(monkeypatch, batches):
    calls = []
    launch = ops.weight_standardize_all
    monkeypatch.setattr(
        ops, "weight_standardize_all", lambda *a, **k: calls.append(1) or launch(*a, **k)
    )
    model = net()
    with per_forward(model):
        model(batches[0])
    assert len(calls) == 4


def test_nested_forward_takes_the_weights_of_the_step(batches):
    model = bitkern.create_model("R26x0.5", num_classes=3, zero_head=False)
    with standardized(model):
        a = model.stages[0].blocks[0].conv1.standardize(batches[0])
        model(torch.randn(1, 3, 32, 32))
        assert model.stages[0].blocks[0].conv1.standardize(batches[0]) is a
    assert model.stages[0].blocks[0].conv1.standardize(batches[0]) is not a


def test_hooks_of_parameters_fire_once_a_step(batches):
    model, seen = net(), []
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    with standardized(model):
        for x in batches:
            model(x).sum().backward()
    weights = ["0.weight", "2.weight", "2.gain", "4.weight", "6.weight"]
    assert sorted(name for name in seen if name in weights) == sorted(weights)


def test_an_error_inside_leaves_no_gradient(batches):
    model = net()
    with pytest.raises(ZeroDivisionError), standardized(model):
        model(batches[0]).sum().backward()
        raise ZeroDivisionError
    assert model[0].weight.grad is None
    model(batches[0]).sum().backward()  # and the model works on
    assert model[0].weight.grad is not None


def test_a_step_leaves_nothing_behind(batches):
    model = net()
    with standardized(model):
        weight = weakref.ref(model[0].standardize(batches[0]))
        model(batches[0]).sum().backward()
    gc.collect()
    assert weight() is None


def test_frozen_layers_and_no_grad(batches):
    model = net().requires_grad_(False)
    model[6].requires_grad_()
    with standardized(model):
        model(batches[0]).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["6.weight", "6.bias"]
    with torch.no_grad(), standardized(model):
        assert not model(batches[0]).requires_grad


def test_a_layer_outside_the_module_standardizes_its_own(batches):
    other = WSConv2d(3, 4, 1)
    with standardized(net()):
        assert torch.equal(other.standardize(batches[0]), ops.weight_standardize(other.weight))
