"""All weights at once: per forward pass and per optimizer step."""

import gc
import weakref

import pytest
import torch
from torch import nn

import bitkern
from bitkern import ops, standardized
from bitkern.nn import WSConv2d
from bitkern.nn.standardized import per_forward
from bitkern.ops.detached import DetachedWeights
from tests.nn.net import net


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


@pytest.mark.parametrize("context", [nothing, per_forward, standardized])
def test_a_layer_whose_result_nobody_uses_has_no_gradient(context, batches):
    """The gradient is None, not zeros, with which weight decay would change the weight."""
    model = nn.ModuleList([WSConv2d(3, 8, 1), WSConv2d(3, 8, 3)])
    with context(model):
        model[0](batches[0])
        model[1](batches[0]).sum().backward()
    assert model[0].weight.grad is None and model[1].weight.grad.any()


def test_one_launch_per_kind(launches, batches):
    model = net()
    with per_forward(model):
        model(batches[0])
    assert len(launches) == 4


def test_nested_forward_takes_the_weights_of_the_step(batches):
    model = bitkern.create_model("R26x0.5", num_classes=3, zero_head=False)
    with standardized(model):
        a = model.stages[0].blocks[0].conv1.standardize(batches[0])
        model(torch.randn(1, 3, 32, 32)).sum().backward()
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


def test_an_error_inside_leaves_no_gradient_and_does_not_lose_later_ones(batches):
    for used in (True, False):
        model = net()
        with pytest.raises(ZeroDivisionError), standardized(model):
            loss = model(batches[0]).sum()
            if used:
                loss.backward()
                loss = model(batches[0]).sum()
            raise ZeroDivisionError
        assert model[0].weight.grad is None
        loss.backward()
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


def misused(form):
    return pytest.raises(RuntimeError, match=rf"standardized: {form}(.|\n)*optimizer\.step\(\)")


def test_a_block_around_the_forward_pass_alone_raises(batches):
    model = net()
    with misused("no backward pass of the convolutions inside the block"), standardized(model):
        loss = model(batches[0]).square().sum()
    loss.backward()  # and what arrives later is not lost
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = net()
    expected(batches[0]).square().sum().backward()
    for name, p in expected.named_parameters():
        assert (p.grad is None) == (name not in got), name
        assert p.grad is None or torch.allclose(got[name], p.grad, atol=1e-5), name


def test_a_gradient_after_the_block_is_carried_to_the_weight(batches):
    model, expected = net(), net()
    with standardized(model):
        model(batches[0]).square().sum().backward()
        late = model(batches[1]).square().sum()
    late.backward()
    for x in batches[:2]:
        expected(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert ours.grad is theirs.grad is None or torch.allclose(ours.grad, theirs.grad, atol=1e-4)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_step_inside_raises(optimizer, batches):
    model = net()
    optimizer = optimizer(model.parameters(), 0.1)
    with misused("an optimizer step inside the block"), standardized(model):
        for x in batches:
            model(x).sum().backward()
            optimizer.step()
    optimizer.step()  # outside it may


def test_a_step_of_another_model_inside_does_not(batches):
    model, other = net(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    with standardized(model):
        model(batches[0]).sum().backward()
        other(torch.ones(2)).sum().backward()
        optimizer.step()
    assert model[0].weight.grad is not None


def test_a_changed_parameter_inside_raises(batches):
    model = net()
    with misused("a parameter has changed inside the block"), standardized(model):
        model(batches[0]).sum().backward()
        with torch.no_grad():  # an update by hand, of those that have a gradient by now
            model[1].weight -= 0.1 * model[1].weight.grad
    for change in (
        lambda p: p.requires_grad_(False).mul_(2).requires_grad_(),
        lambda p: setattr(p, "data", p.data * 2),
    ):
        model = net()
        with misused("a weight has changed inside the block"), standardized(model):
            model(batches[0]).sum().backward()
            change(model[0].weight)
            model(batches[0]).sum().backward()


def test_a_graph_of_the_backward_pass_is_refused(batches):
    model = net()
    with pytest.raises(RuntimeError, match="expected backward without create_graph=True"):
        with standardized(model):
            model(batches[0]).sum().backward(create_graph=True)


def test_a_gradient_penalty_inside(batches):
    """Second derivatives reach the weights: they are linear in what the block collects."""
    results = []
    for context in (nothing, standardized):
        model, x = net().double(), batches[0].double().requires_grad_()
        with context(model):
            loss = model(x).square().sum()
            (dx,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + dx.square().sum()).backward()
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results)


class Doubled(nn.Module):
    def forward(self, weight):
        self.calls = getattr(self, "calls", 0) + 1
        return 2 * weight + 1


@pytest.mark.parametrize("context", [nothing, per_forward, standardized])
@pytest.mark.parametrize("kind", ["own", "spectral", "weight", "gain", "old weight"])
def test_computed_weights_are_computed_once_a_forward(kind, context, batches):
    def make():
        model = net().double()
        if kind == "spectral":
            nn.utils.parametrizations.spectral_norm(model[2])
        elif kind == "weight":
            nn.utils.parametrizations.weight_norm(model[2])
        elif kind == "old weight":
            nn.utils.weight_norm(model[2])
        else:
            name = "gain" if kind == "gain" else "weight"
            nn.utils.parametrize.register_parametrization(model[2], name, Doubled())
        return model

    model, expected = make(), make()
    x = batches[0].double()
    with context(model):
        model(x).square().sum().backward()
    expected(x).square().sum().backward()
    if kind == "own":
        assert model[2].parametrizations.weight[0].calls == 2  # one when it was registered
    grads = ([p.grad for p in m.parameters()] for m in (model, expected))
    torch.testing.assert_close(*map(list, grads))


@pytest.mark.parametrize("context", [nothing, per_forward, standardized])
def test_a_weight_that_is_handed_in_is_used(context, batches):
    class Masked(WSConv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight * self.mask, self.bias)

    conv = Masked(3, 8, 3)
    conv.mask = (torch.rand_like(conv.weight) > 0.5).float()
    model = nn.Sequential(conv, WSConv2d(8, 4, 1))
    with context(model):
        y = conv(batches[0])
        model(batches[0]).sum().backward()
    expected = ops.ws_conv2d(batches[0], conv.weight * conv.mask, conv.bias)
    torch.testing.assert_close(y, expected)
    assert conv.weight.grad[conv.mask == 0].eq(0).all() and conv.weight.grad.any()


@pytest.mark.parametrize("context", [per_forward, standardized])
def test_a_weight_that_its_layer_brings_is_not_read_before(context, batches):
    """Layers load their weight when called, as accelerate's offloading and diffusers do."""
    model, expected = net(), net()
    for kind, conv in (("forward", model[2]), ("forward", model[4]), ("meta", model[6])):
        stored, forward = conv.weight.data.clone(), conv.forward
        absent = torch.full_like(stored, float("nan"))
        if kind == "meta":
            absent = absent.to("meta")

        def brought(x, conv=conv, stored=stored, forward=forward, absent=absent):
            conv.weight = nn.Parameter(stored)
            y = forward(x)
            conv.weight = nn.Parameter(absent)
            return y

        conv.weight = nn.Parameter(absent)
        conv.forward = brought
    with torch.no_grad(), context(model):
        got = model(batches[0]), model(batches[1])
    torch.testing.assert_close(got, (expected(batches[0]), expected(batches[1])))


def test_a_weight_changed_between_layers_is_standardized_anew(batches):
    """A hook of an outer module changes the weight; the shared weights do not know it."""
    model, expected = net(), net()

    def change(module, args):
        with torch.no_grad():
            model[4].weight.mul_(0.5).add_(torch.linspace(0, 1, 9).view(3, 3))

    model[3].register_forward_pre_hook(change)
    with torch.no_grad(), per_forward(model):
        got = model(batches[0])
    with torch.no_grad():
        expected[4].weight.copy_(model[4].weight)
    torch.testing.assert_close(got, expected(batches[0]))


def test_gradients_are_not_copied_on_their_way(batches, monkeypatch):
    made, backward = [], DetachedWeights.backward

    def recorded(self, douts):
        grads = backward(self, douts)
        made.extend(grad.data_ptr() for by_layer in grads for grad in by_layer.values())
        return grads

    monkeypatch.setattr(DetachedWeights, "backward", recorded)
    model = net()
    with standardized(model):
        model(batches[0]).sum().backward()
    assert {p.grad.data_ptr() for p in (model[0].weight, model[2].gain)} <= set(made)
