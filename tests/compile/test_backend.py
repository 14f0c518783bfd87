"""``torch.compile(model, backend="bitkern")`` in the ways people use it."""

import copy
import operator
import warnings

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bitkern
from tests.compile.nodes import fused
from tests.compile.random_networks import CONVS, check
from tests.peers import distance, gradients, relative, small_timm

X = torch.randn(2, 3, 40, 33, generator=torch.Generator().manual_seed(0))


def compiled(module, **options):
    return torch.compile(module, backend="bitkern", **options)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize("start", range(0, 120, 40))
def test_random_networks(start):
    """A case that fails is replayed by ``python -m tests.compile.random_networks SEED``."""
    run = sum(check(seed) for seed in range(start, start + 40))
    assert run > 20


@pytest.mark.sweep
@pytest.mark.parametrize("start", (120, 1000, 1100, 1200))
def test_more_random_networks(start):
    for seed in range(start, start + 100):
        check(seed)


def test_is_found_by_its_name():
    assert "bitkern" in torch._dynamo.list_backends(exclude_tags=())
    # Not an nn.Sequential, which PyTorch 2.11 does not compile in place.
    model, x = Described(lambda m, y: m.conv1(F.relu(y))), torch.randn(2, 8, 5, 6)
    expected = model(x)
    model.compile(backend="bitkern")
    torch.testing.assert_close(model(x), expected)
    assert fused(model, x) == (1, 0)


def test_options():
    with pytest.raises(Exception, match="options: expected {'inner': 'inductor'} or none"):
        compiled(net(), options={"inner": "cudagraphs"})(X)


class Described(nn.Module):
    """A norm and what follows, in the ways in which people write it."""

    def __init__(self, after):
        super().__init__()
        self.norm, self.after = nn.GroupNorm(2, 8), after
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        return self.after(self, self.norm(x))


WAYS = {
    "several convolutions": (lambda m, y: m.conv1(y.relu()).sum() + m.conv2(y.relu()), None),
    "one activation": (lambda m, y: (lambda a: (m.conv1(a), m.conv2(a)))(F.relu(y)), (1, 0)),
    "activation also returned": (lambda m, y: (lambda a: (a, m.conv1(a)))(F.silu(y)), (0, 1)),
    "norm also returned": (lambda m, y: (y, m.conv1(F.relu(y))), (0, 1)),
    "dropout in between": (lambda m, y: m.conv1(F.dropout(F.gelu(y), 0.0)), (1, 0)),
    "a product with the sigmoid": (lambda m, y: m.conv1(y * torch.sigmoid(y)), (1, 0)),
    "an activation of no kernel": (lambda m, y: m.conv1(torch.tanh(y)), (0, 1)),
    "another slope": (lambda m, y: m.conv1(F.leaky_relu(y, 0.2)), (0, 1)),
    "early return": (lambda m, y: y if y.shape[0] > 1 else m.conv1(F.relu(y)), (0, 1)),
    "in place": (lambda m, y: m.conv1(F.relu_(y)), (1, 0)),
    "cast to its own dtype": (lambda m, y: m.conv1(F.silu(y.float()).to(torch.float32)), (1, 0)),
}


@pytest.mark.parametrize("after, nodes", WAYS.values(), ids=WAYS)
def test_what_follows_a_norm(after, nodes):
    model = Described(after)
    x = torch.randn(2, 8, 5, 6)
    run = compiled(model, fullgraph=True)
    got, expected = run(x), model(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    if nodes is not None:
        first = got if isinstance(got, torch.Tensor) else sum(o.sum() for o in got)
        assert fused(lambda: first) == nodes


STANDARDIZED = {
    "timm": "Variant(eps=1e-06, eps_outside=False, unbiased=False), scale 1",
    "nfnet": "Variant(eps=1e-06, eps_outside=False, unbiased=False), scale 0.353553",
    "var_mean": "Variant(eps=1e-10, eps_outside=False, unbiased=False), scale 1",
    "outer": "Variant(eps=1e-05, eps_outside=True, unbiased=True), scale 1",
}


@pytest.mark.parametrize("name", CONVS)
def test_standardized_weights_are_recognized(name):
    model = nn.Sequential(CONVS[name](8, 8), CONVS[name](8, 8))
    peer = copy.deepcopy(model)
    run, x = compiled(model, fullgraph=True), torch.randn(2, 8, 5, 4)
    y, grads = gradients(model, x, forward=run)
    expected, expected_grads = gradients(peer, x)
    assert relative(y, expected) < 1e-5 and distance(grads, expected_grads) < 1e-5
    rows = [r for r in bitkern.explain(run) if "tandardization" in f"{r.layer} {r.reason}"]
    if name in STANDARDIZED:
        assert [row.converted for row in rows] == [True] * 2
        assert all(row.reason.endswith(STANDARDIZED[name]) for row in rows)
    elif name == "scaled":
        assert [row.converted for row in rows] == [False] * 2
        assert "computed from parameters, but is no weight standardization" in rows[0].reason
    else:
        assert rows == []


def test_all_weights_of_a_kind_in_one_launch(launches):
    model = small_timm()
    compiled(model, fullgraph=True)(X)
    assert launches == [sum(isinstance(m, timm.layers.StdConv2d) for m in model.modules())]


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(where, dtype):
    """A norm keeps its input's dtype, as in a converted network."""

    def inside(module):
        def run(x):
            with torch.autocast("cpu", dtype):
                return module(x)

        return run

    model = small_timm()
    peer = bitkern.convert(copy.deepcopy(model))
    if where == "inside":
        run, other, amp = compiled(inside(model), fullgraph=True), inside(peer), None
    else:
        run, other, amp = compiled(model, fullgraph=True), peer, dtype
    x = X.contiguous(memory_format=torch.channels_last)
    y, grads = gradients(model, x, amp, forward=run)
    expected, expected_grads = gradients(peer, x, amp, forward=other)
    assert y.dtype == expected.dtype == dtype
    assert relative(y, expected) < 1e-2 and distance(grads, expected_grads) < 3e-2
    with torch.autocast("cpu", dtype, enabled=where == "outside"):
        assert fused(run, x)[0] > 8


def test_sizes_are_symbolic_from_the_second_on():
    model = net()
    run = compiled(model, fullgraph=True)
    for shape in ((2, 3, 8, 8), (3, 3, 9, 7), (4, 3, 10, 6), (5, 3, 12, 9)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(x), model(x))
    assert [row.layer for row in bitkern.explain(run)].count("graph") == 2


def test_modes_and_memory_format():
    model = small_timm()
    run = compiled(model, fullgraph=True)
    x = X.contiguous(memory_format=torch.channels_last)
    for training in (True, False):
        model.train(training)
        expected = model(x)
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                assert relative(run(x), expected) < 1e-5
    maps = nn.Sequential(nn.GroupNorm(1, 3), nn.ReLU())
    assert compiled(maps)(x).is_contiguous(memory_format=torch.channels_last)


def test_explain():
    model = net()
    assert "no graph has been compiled" in str(bitkern.explain(compiled(model)))

    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            x = self.net(x)
            torch._dynamo.graph_break()
            return self.net[3:](F.pad(x, (0, 0, 0, 0, 0, 4)))

    run = compiled(Breaks())
    run(X)
    rows = {row.name: row for row in bitkern.explain(run)}
    assert rows["net.1"].reason == "norm, activation and convolution as one"
    broken = [row for row in bitkern.explain(run) if row.layer == "graph break"]
    assert len(broken) == 1 and not broken[0].converted and "graph_break" in broken[0].reason


@torch._dynamo.config.patch(recompile_limit=2)
def test_the_recompile_limit_is_told():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = net(), 0

        def forward(self, x):
            return self.net(x) * self.calls

    model = Counts()
    run = compiled(model)
    for model.calls in (1.5, 2.5, 3.5):
        torch.testing.assert_close(run(X), model(X))
    assert "recompile limit" in [row.layer for row in bitkern.explain(run)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    """A checkpointed part keeps its input alone and runs again in backward."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.body = nn.Sequential(
                nn.GroupNorm(2, 8), nn.SiLU(), timm.layers.StdConv2d(8, 8, 3), nn.Tanh()
            )

        def forward(self, x):
            return checkpoint(self.body, self.stem(x), use_reentrant=reentrant)

    model = Checkpointed()
    peer = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = compiled(model)
        y, grads = gradients(model, X, forward=run)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            run(X)
    expected, expected_grads = gradients(peer, X)
    assert relative(y, expected) < 1e-5 and distance(grads, expected_grads) < 1e-5
    if not reentrant:
        assert sum(t.shape[2:] == (38, 31) for t in kept) == 0, "tanh's result is kept"
        assert "norm" in [row.layer for row in bitkern.explain(run)]


def test_hooks_copies_and_export():
    model = small_timm()
    seen = []
    model.stages[0].blocks[0].register_forward_hook(lambda *_: seen.append(1))
    run = compiled(model)
    expected = model(X)
    assert relative(run(X), expected) < 1e-5 and len(seen) == 2
    twin = copy.deepcopy(model)
    assert relative(compiled(twin)(X), expected) < 1e-5
    ema = torch.optim.swa_utils.AveragedModel(model)
    ema.update_parameters(model)
    assert relative(compiled(ema)(X), expected) < 1e-5
    program = torch.export.export(net(), (X,))
    assert relative(program.module()(X), net()(X)) < 1e-5


def test_bitkern_models_and_standardized():
    model = bitkern.create_model("R26x0.5", num_classes=3, zero_head=False)
    peer = copy.deepcopy(model)
    run = compiled(model, fullgraph=True)
    for m, forward in ((model, run), (peer, peer)):
        with bitkern.standardized(m):
            for x in X.split(1):
                forward(x).square().sum().backward()
    grads = ({n: p.grad for n, p in m.named_parameters()} for m in (model, peer))
    assert distance(*grads) < 1e-5
    converted = bitkern.convert(small_timm())
    assert relative(compiled(converted)(X), converted(X)) < 1e-5


def test_second_derivatives():
    model = net().double()
    x = X.double().requires_grad_()

    def penalty(call):
        (dx,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *model.parameters()], allow_unused=True)

    torch.testing.assert_close(penalty(compiled(model)), penalty(model))


@pytest.mark.sweep
@pytest.mark.parametrize("training", [True, False])
def test_inductor_behind_it(training):
    model = small_timm().train(training)
    run = torch.compile(model, backend="bitkern", options={"inner": "inductor"})
    if training:
        y, grads = gradients(model, X, forward=run)
        expected, expected_grads = gradients(copy.deepcopy(model), X)
        assert relative(y, expected) < 1e-5 and distance(grads, expected_grads) < 1e-4
    else:
        with torch.no_grad():
            assert relative(run(X), model(X)) < 1e-5


@pytest.mark.sweep
def test_frozen_weights_are_standardized_once():
    model = small_timm().eval()
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        run = compiled(model, options={"inner": "inductor"})
        assert relative(run(X), model(X)) < 1e-5
        with torch.profiler.profile() as profile:
            run(X)
    called = {event.key for event in profile.key_averages()}
    assert "bitkern::group_norm_act" in called and "bitkern::weight_standardize" not in called


def test_a_list_of_augmented_operators():
    """``changes`` knows every in-place operator of Python."""
    from bitkern.compile.graph import _AUGMENTED

    found = {n for n in dir(operator) if n.startswith("i") and f"__{n}__" in dir(operator)}
    assert found - {"index", "inv", "invert"} == _AUGMENTED
