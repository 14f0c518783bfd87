"""Compare SGD in one pass with standardization's backward to the same in separate steps."""

import copy
import io
import types
from collections import Counter

import pytest
import torch
from torch import nn

import bitkern
from bitkern import _torch, standardized
from bitkern.nn import WSConv2d
from bitkern.ops.detached import DetachedWeights
from bitkern.optim import SGD
from tests.nn.net import net

FUSED = {(3, 8, 3), (8, 8, 3), (8, 4, 1)}  # in, out, kernel of the layers that have the pass


def groups(model):
    """Return two parameter groups, which leave out some weights."""
    weights = [p for name, p in model.named_parameters() if p.ndim > 1 and name[0] != "2"]
    rest = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": weights, "weight_decay": 0.01}, {"params": rest, "lr": 0.001}]


def optimizer_of(model, cls=SGD, **options):
    return cls(groups(model), **{"lr": 0.003, "momentum": 0.9} | options)


def backward(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for n in (3, 1):
        x = torch.randn(n, 3, 8, 8, generator=generator, dtype=model[0].weight.dtype)
        model(x).square().mean().backward()


def separate_step(model, optimizer, seed):
    with standardized(model):
        backward(model, seed)
    optimizer.step()
    optimizer.zero_grad()


def step(model, optimizer, seed):
    with standardized(model, optimizer=optimizer):
        backward(model, seed)


def state(model, optimizer):
    return copy.deepcopy([model.state_dict(), optimizer.state_dict()])


def started(steps=1):
    model = net()
    optimizer = optimizer_of(model)
    for i in range(steps):
        step(model, optimizer, i)
    return model, optimizer


def assert_step_is_pytorchs(model, optimizer, seed):
    """Take a step, and the same with copies, PyTorch's optimizer and the state of ours."""
    theirs = copy.deepcopy(model)
    reference = optimizer_of(theirs, torch.optim.SGD)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer, seed)
    separate_step(theirs, reference, seed)
    torch.testing.assert_close(state(model, optimizer), state(theirs, reference))


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture
def fused(monkeypatch):
    """Count how often each shape of weight took the pass."""
    counts, sgd = Counter(), DetachedWeights.sgd

    def counted(self, douts, buffers, options):
        shapes = [self.weights[i].shape for i in douts]
        counts.update((inputs, filters, size) for filters, inputs, size, _ in shapes)
        sgd(self, douts, buffers, options)

    monkeypatch.setattr(DetachedWeights, "sgd", counted)
    return counts


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dampening": 0.3, "fused": True},
        {"nesterov": True, "lr": torch.tensor(0.003, dtype=torch.float64), "fused": True},
    ],
    ids=["plain", "dampening", "nesterov"],
)
def test_steps_are_those_of_pytorch(fused, backend, format, options):
    model = net().to(memory_format=format)
    optimizer = optimizer_of(model, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    with bitkern.use_backend(backend):
        for i in range(4):
            assert_step_is_pytorchs(model, optimizer, i)
            assert all(p.grad is None for name, p in model.named_parameters() if name[0] != "2")
            schedule.step()
    assert fused == dict.fromkeys(FUSED, 3)  # the first step makes the momentum


def test_bfloat16_compute(fused):
    with torch.autocast("cpu", torch.bfloat16):
        model, optimizer = started()
        assert_step_is_pytorchs(model, optimizer, 1)
    assert fused == dict.fromkeys(FUSED, 1)


def test_states_are_interchangeable_and_a_resumed_run_has_the_same_bits():
    model, optimizer = started(2)
    file = io.BytesIO()
    torch.save(state(model, optimizer), file)
    file.seek(0)
    weights, momenta = torch.load(file, weights_only=True)
    resumed, theirs = net(), net()
    resumed.load_state_dict(weights)
    theirs.load_state_dict(weights)
    again, reference = optimizer_of(resumed), optimizer_of(theirs, torch.optim.SGD)
    again.load_state_dict(copy.deepcopy(momenta))
    reference.load_state_dict(copy.deepcopy(momenta))
    step(model, optimizer, 2)
    step(resumed, again, 2)
    separate_step(theirs, reference, 2)
    assert_equal(state(model, optimizer), state(resumed, again))
    torch.testing.assert_close(state(model, optimizer), state(theirs, reference))
    again.load_state_dict(reference.state_dict())
    assert_equal(again.state_dict(), reference.state_dict())


def test_weights_may_change_between_steps():
    """Weights are loaded, averaged, or written past autograd: no old one is used."""
    model, optimizer = started()
    model[0].weight.data.mul_(-2)
    with torch.no_grad():
        model(torch.randn(1, 3, 8, 8))
    assert_step_is_pytorchs(model, optimizer, 1)


def hook_of_parameter(model, optimizer):
    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(lambda grad: 2 * grad)


def hook_after_accumulation(model, optimizer):
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", 2 * p.grad))


def clipping_hook(model, optimizer):
    optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_(model.parameters(), 1e-3))


def looking_hook(model, optimizer):
    optimizer.register_step_post_hook(lambda *_: None)


def maximize(model, optimizer):
    for group in optimizer.param_groups:
        group["maximize"] = True


def no_momentum(model, optimizer):
    for group in optimizer.param_groups:
        group["momentum"] = 0


def shared_memory(model, optimizer):
    torch.manual_seed(1)
    model[5] = WSConv2d(8, 8, 3, eps=1e-5, eps_outside=True, unbiased=True, scale=0.3, padding=1)
    model[5].weight = model[4].weight
    model[0].weight.data = model[0].weight.data.transpose(2, 3)  # of its own, but not dense
    with torch.no_grad():
        model[6].weight.grad = torch.ones_like(model[6].weight)  # of something else


@pytest.mark.parametrize(
    "change",
    [
        hook_of_parameter, hook_after_accumulation, clipping_hook, looking_hook, maximize,
        no_momentum, shared_memory,
    ],
)  # fmt: skip
def test_where_there_is_no_pass_the_step_is_that_of_pytorch(fused, change):
    model = net()
    theirs = copy.deepcopy(model)
    optimizer, reference = optimizer_of(model), optimizer_of(theirs, torch.optim.SGD)
    separate_step(model, optimizer, 0)
    separate_step(theirs, reference, 0)
    change(model, optimizer)
    change(theirs, reference)
    step(model, optimizer, 1)
    separate_step(theirs, reference, 1)
    assert_equal(state(model, optimizer), state(theirs, reference))
    assert not fused


def test_other_dtypes_and_layouts_of_momentum(fused):
    for dtype in (torch.float64, torch.bfloat16):
        model = net().to(dtype)
        step(model, optimizer := optimizer_of(model), 0)
        step(model, optimizer, 1)
    model, optimizer = started()
    model.to(memory_format=torch.channels_last)
    assert_step_is_pytorchs(model, optimizer, 1)
    assert fused == {(8, 4, 1): 1}  # whose two layouts are one


def test_distributed_data_parallel_has_the_gradients(fused, monkeypatch):
    model, optimizer = started()
    ddp = types.SimpleNamespace(find_unused_parameters=False, static_graph=False)
    seen = iter([None] * 3)  # not in the first layers of the block, which standardize all
    monkeypatch.setattr(_torch, "active_ddp", lambda: next(seen, ddp))
    step(model, optimizer, 1)
    assert not fused


def test_a_layer_that_is_not_used_does_not_decay(fused):
    model = nn.ModuleList([WSConv2d(3, 8, 1), WSConv2d(3, 8, 1)])
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    x = torch.randn(2, 3, 4, 4)
    for used in (model, model, model[:1]):
        before = copy.deepcopy(model.state_dict())
        with standardized(model, optimizer=optimizer):
            sum(layer(x).square().sum() for layer in used).backward()
    assert torch.equal(before["1.weight"], model[1].weight)
    assert not torch.equal(before["0.weight"], model[0].weight)
    assert fused == {(3, 8, 1): 3}


def test_autograd_sees_that_weights_have_changed():
    model, optimizer = started()
    loss = (model[0].weight ** 2).sum()
    step(model, optimizer, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_error_in_the_block_takes_no_step():
    model, optimizer = started()
    before = state(model, optimizer)
    with pytest.raises(KeyboardInterrupt), standardized(model, optimizer=optimizer):
        backward(model, 1)
        raise KeyboardInterrupt
    assert_equal(before, state(model, optimizer))


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_is_refused(fused):
    """The scaler raises: the block has taken its step with gradients of a scaled loss."""
    model = net()
    optimizer, scaler = optimizer_of(model, fused=fused), torch.amp.GradScaler("cpu")
    with standardized(model, optimizer=optimizer):
        scaler.scale(model(torch.randn(1, 3, 8, 8)).sum()).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(optimizer)


def test_other_optimizers_are_refused():
    class Other(SGD):
        pass

    model = net()
    for cls in (torch.optim.SGD, torch.optim.AdamW, Other):
        with pytest.raises(TypeError, match=f"expected bitkern.optim.SGD, got {cls.__name__}"):
            with standardized(model, optimizer=cls(model.parameters(), lr=0.1)):
                pass
    with pytest.raises(RuntimeError, match="no backward pass"):
        with standardized(model, optimizer=optimizer_of(model)):
            model(torch.randn(1, 3, 8, 8))


def test_without_standardized_layers():
    model = nn.Linear(3, 2)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = model.weight.clone()
    with standardized(model, optimizer=optimizer):
        model(torch.randn(4, 3)).sum().backward()
    assert not torch.equal(model.weight, before) and model.weight.grad is None


def test_backends_from_elsewhere_need_no_step(fused, monkeypatch):
    from bitkern.backends import cpu

    monkeypatch.delattr(cpu, "weight_standardize_sgd")
    started(2)
    assert not fused
