"""Converted models in the ways people train: mixed precision, checkpointing, transforms."""

import copy
import itertools
import warnings

import pytest
import timm
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune

import bitkern
from bitkern.nn import WSConv2d
from tests.peers import distance, gradients, outputs, randomize, relative, small_bit, small_timm


@pytest.fixture(params=[small_timm, small_bit], ids=["timm", "transformers"])
def pair(request):
    """Return a converted model and its original, with SiLU, whose gradient has no jumps."""
    silu = {"act_layer": nn.SiLU} if request.param is small_timm else {"hidden_act": "silu"}
    peer = request.param(**silu)
    return bitkern.convert(copy.deepcopy(peer)), peer


X = torch.randn(2, 3, 40, 33, generator=torch.Generator().manual_seed(0))


def assert_same(got, expected):
    assert relative(got[0], expected[0]) < 1e-5
    assert distance(got[1], expected[1]) < 1e-5


def test_scaled_fp16(pair):
    """GradScaler skips a step too large for fp16; the others are those of autocast."""
    results = []
    for model in pair:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        scales = []
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = outputs(model, X).float().square().sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert loss.isfinite() and scales[0] < 2.0**24 and scales[-1] == scales[-2]
        results.append(float(loss))
    assert abs(results[0] - results[1]) < 1e-2 * abs(results[1])


def test_checkpointing(pair):
    model, peer = pair
    expected = gradients(peer, X)
    for use_reentrant in (False, True):

        def forward(x, use_reentrant=use_reentrant):
            x = x.requires_grad_()  # which the reentrant kind wants
            run = torch.utils.checkpoint.checkpoint
            return run(lambda x: outputs(model, x), x, use_reentrant=use_reentrant)

        assert_same(gradients(model, X.clone(), forward=forward), expected)


@pytest.mark.parametrize("what", ["PreActBottleneck", "ResNetStage", "Sequential", "StdConv2d"])
def test_modules_wrapped_for_checkpointing(what):
    model = small_timm(act_layer=nn.SiLU)
    expected = gradients(model, X)
    bitkern.convert(model)
    apply_activation_checkpointing(model, check_fn=lambda m: type(m).__name__ == what)
    logits, grads = gradients(model, X)
    grads = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in grads.items()}
    assert_same((logits, grads), expected)


def test_checkpointing_of_timm():
    for name in ("resnetv2_50x1_bit", "nf_resnet50"):
        torch.manual_seed(0)
        model = randomize(timm.create_model(name, num_classes=3)).train()
        bitkern.convert(model)
        expected = gradients(model, X)
        model.set_grad_checkpointing()
        assert_same(gradients(model, X), expected)


def test_one_standardization_per_step(pair):
    model, peer = pair
    expected = gradients(peer, torch.cat([X, X + 1]))
    model.zero_grad()
    weights = torch.linspace(-1, 1, 20).reshape(4, 5)
    with bitkern.standardized(model):
        for x, w in zip((X, X + 1), weights.split(2), strict=True):
            (outputs(model, x) * w).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert distance(grads, expected[1]) < 1e-5


def test_a_part_without_gradients(pair):
    """A weight standardized under no_grad is not used in a part that is trained."""
    for model in pair:
        stem = model.stem if hasattr(model, "stem") else model.bit.embedder
        stem.forward = torch.no_grad()(stem.forward)
    assert_same(*(gradients(model, X) for model in pair))


def test_pruned_weights(pair):
    """The pool does not replace a weight that a hook computes before each forward."""
    for model in pair:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                prune.l1_unstructured(module, "weight", 0.3)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
    assert_same(*(gradients(m, X) for m in pair))


def test_functional_call_and_transforms(pair):
    model, peer = pair
    parameters = {n: p.detach() * 1.1 for n, p in model.named_parameters()}
    results = []
    for m in pair:

        def loss(parameters, x, m=m):
            y = functional_call(m, parameters, (x,))
            return getattr(y, "logits", y).square().sum()

        value, grads = torch.func.grad_and_value(loss)(parameters, X)[::-1]
        tangents = {n: torch.ones_like(p) for n, p in parameters.items()}
        slope = torch.func.jvp(lambda p, loss=loss: loss(p, X), (parameters,), (tangents,))[1]
        per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, X[:, None])
        results.append((value, grads, slope, per_sample))
    (value, grads, slope, per_sample), expected = results
    assert_same((value, grads), expected[:2])
    assert_same((slope, per_sample), expected[2:])
    choice = torch.func.grad(lambda x: (record.append(bitkern.explain("group_norm_act", x)), x)[1])
    record = []
    choice(torch.tensor(1.0))
    assert record[0] == ("reference", "torch.func cannot see into a kernel")


def test_a_kernel_demanded_inside_a_transform():
    norm = bitkern.nn.GroupNormAct(2, 4)
    x = torch.randn(1, 4, 3, 3)
    reason = bitkern.backends.unavailable("cpu")
    if reason:
        pytest.skip(reason)
    with bitkern.use_backend("cpu"):
        norm(x)
        with pytest.raises(RuntimeError, match="'cpu' was asked for, but torch.func cannot see"):
            torch.func.grad(lambda x: norm(x).sum())(x)


def test_second_order(pair):
    """A meta-learner's step: gradients through the gradients of all parameters."""
    found = []
    for model, dtype in itertools.product(pair, (torch.float64, torch.float32)):
        model.to(dtype)
        loss = outputs(model, X.to(dtype)).square().sum()
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        model.zero_grad()
        sum(g.square().sum() for g in grads).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    ours, ours_in_float32, exact, peer_in_float32 = found
    assert distance(ours, exact) < 1e-10
    assert distance(ours_in_float32, exact) < 4 * distance(peer_in_float32, exact)


def test_fake_tensors_and_tracers(pair):
    model, peer = pair
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert outputs(model, torch.empty(2, 3, 64, 64)).shape == (2, 5)
    with torch.no_grad():
        traced = make_fx(lambda x: outputs(model, x))(X)
        assert relative(traced(X + 1), outputs(peer, X + 1)) < 1e-5


def test_jit_trace():
    model = bitkern.fold(bitkern.convert(small_timm())).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; sizes become constants
        traced = torch.jit.trace(model, X)
        assert relative(traced(X + 1), model(X + 1)) < 1e-5


def test_weights_of_two_dtypes_in_one_pool():
    """With autocast off for a part, the pool's weight does not have the dtype it needs."""
    model = bitkern.convert(small_timm())
    stage = model.stages[1].forward

    def precise(x):
        with torch.autocast("cpu", enabled=False):
            return stage(x.float())

    model.stages[1].forward = precise
    logits, grads = gradients(model, X, torch.bfloat16)
    assert logits.isfinite().all() and all(g.isfinite().all() for g in grads.values())
    assert sum(isinstance(m, WSConv2d) for m in model.modules()) == 12
