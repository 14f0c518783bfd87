"""The optimizer step: nothing in it reads back what the device computes."""

import dataclasses

import pytest
import torch

import bitkern
from bitkern.transfer import mixup, mixup_loss, train_batches
from bitkern.transfer.device_config import DeviceConfig
from bitkern.transfer.recipes.mixup import mix, mixed_loss
from bitkern.transfer.schedule import Schedule
from bitkern.transfer.step import AsyncScalar, TrainStep
from tests.transfer.images import image_set
from tests.transfer.net import RULE, Net, state_of
from tests.transfer.no_reads import Read, no_reads


def stepper(model, rule, device="cpu:0", precision="fp32", weight_decay=0.0):
    compute = DeviceConfig.create(device, precision, 0)
    compute.place(model)
    options = dict(lr=0.0, momentum=0.9, weight_decay=weight_decay, fused=True)
    optimizer = bitkern.optim.SGD(model.parameters(), **options)
    schedule = Schedule(15, rule, 0, 2)
    batches = train_batches(image_set(), rule, seed=0, batch_split=2, device=device)
    return TrainStep(model, optimizer, schedule, compute, iter(batches))


def bit():
    return bitkern.create_model("R26x0.5", num_classes=3, zero_head=False)


MODELS = [(Net, RULE), (bit, dataclasses.replace(RULE, resize=40, crop=32, batch_size=4))]


@pytest.mark.parametrize("model, rule", MODELS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_reads_nothing_back(model, rule, backend, precision):
    model = model()
    before = state_of(model)
    with bitkern.use_backend(backend):
        take_step = stepper(model, rule, precision=precision, weight_decay=1e-4)
        with no_reads():
            losses = [take_step(step, rule.base_lr) for step in range(2)]
    assert all(loss.isfinite() for loss in losses)
    for name, tensor in model.state_dict().items():
        assert not torch.equal(tensor, before[name]), name


class ReadInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.sum().item()


X = torch.arange(6.0).reshape(2, 3)
READS = {
    "item": lambda: X.sum().item(),
    "if": lambda: 1 if (X > 0).any() else 0,
    "to device": lambda: X.to(device=torch.device("cpu"), non_blocking=True),
    "tolist": lambda: X.tolist(),
    "where": lambda: torch.where(X > 1),
    "mask": lambda: X[X > 1],
    "assignment by a mask": lambda: X.clone().__setitem__(X > 1, torch.ones(4)),
    "repeat_interleave": lambda: X[0].repeat_interleave(torch.tensor([1, 2, 0])),
    "scalar of an operator": lambda: X.add(X, alpha=X.sum()),
    "in backward": lambda: ReadInBackward.apply(X.clone().requires_grad_()).sum().backward(),
    "mixup": lambda: mixup(X, torch.arange(2), 0.5, torch.tensor([1, 0])),
}


def sgd_step(fused):
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    optimizer = torch.optim.SGD([p], torch.tensor(0.1), momentum=0.9, fused=fused)
    with no_reads():  # not of the constructor, which checks the learning rate
        optimizer.step()


@pytest.mark.parametrize("name", READS)
def test_a_read_is_found(name):
    READS[name]()  # without the mode it is no error
    with pytest.raises(Read), no_reads():
        READS[name]()


def test_what_reads_nothing_is_none():
    with pytest.raises(Read):
        sgd_step(fused=False)
    sgd_step(fused=True)
    with no_reads():
        permutation = torch.tensor([1, 0]).to("cpu:0", non_blocking=True)
        X[permutation], X.where(X > 1, 0), X.repeat_interleave(2, 0)
        X.repeat_interleave(torch.tensor([1, 2]), 0, output_size=3)
        mix(X, permutation, torch.tensor(0.5), permutation)


@pytest.mark.parametrize("lam", [0.0, 0.31, 1.0])
def test_lambda_on_the_device_mixes_as_the_public_functions(lam):
    x, y, permutation = torch.randn(5, 3, 4, 4), torch.tensor([0, 1, 2, 1, 0]), torch.randperm(5)
    logits = torch.randn(5, 3)
    expected = mixup(x, y, lam, permutation)
    mixed = mix(x, y, torch.tensor(lam), permutation)
    for ours, theirs in zip(mixed, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    loss = mixed_loss(logits, *mixed[1:], torch.tensor(lam), RULE.loss)
    torch.testing.assert_close(loss, mixup_loss(logits, *expected[1:], lam))


def test_layers_that_a_step_leaves_out_and_the_next_does_not():
    """Theirs is the momentum of a parameter that had no gradient yet: zero."""
    model = Net()
    take_step = stepper(model, RULE)
    norm, model.norm = model.norm, torch.nn.Identity()
    take_step(0, 0.1)
    model.norm = norm
    before = norm.weight.clone()
    take_step(1, 0.1)
    assert not torch.equal(norm.weight, before)


def test_parameters_with_gaps():
    """Which the fused update of PyTorch takes for dense."""
    model, expected = Net(), Net()
    model.head.weight = torch.nn.Parameter(torch.randn(3, 9)[:, :8])
    with torch.no_grad():
        model.head.weight.copy_(expected.head.weight)
    for net in (model, expected):
        take_step = stepper(net, RULE)
        for step in range(3):
            take_step(step, 0.1)
    assert torch.equal(model.head.weight, expected.head.weight)


@pytest.mark.gpu
@pytest.mark.parametrize("model, rule", MODELS)
def test_never_waits_for_a_gpu(model, rule):
    take_step = stepper(model(), rule, "cuda", "bf16")
    take_step(0, 0.1)  # caches and workspaces come to be
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [AsyncScalar(take_step(step, 0.1)) for step in (1, 2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(0 < loss.value() < 100 for loss in losses)
