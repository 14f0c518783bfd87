"""Blocks of unknown classes: what is proven runs fused, what deceives is left, nothing changes."""

import copy
import functools
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitkern
from bitkern.convert.traced import Traced
from tests.helpers import assert_accurate

C = 8


class Block(nn.Module):
    """Norms, a shared activation in place, convolutions, a residual."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, C), nn.GroupNorm(4, C)
        self.act = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(C, C, 3, padding="same", groups=2)
        self.conv2 = nn.Conv2d(C, C, 3, padding=2, dilation=2, bias=False)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        y = self.conv1(self.act(self.norm1(x)))
        return x + self.conv2(self.drop(self.act(self.norm2(y))))


def block(forward=None, cls=Block, **parts):
    """A block with random affine parameters, of a class of its own with this forward."""
    torch.manual_seed(0)
    made = cls() if forward is None else type("Own", (cls,), {"forward": forward})()
    for name, part in parts.items():
        setattr(made, name, part)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def nodes(y):
    """The names of the nodes of an autograd graph."""
    found, queue = [], [y.grad_fn]
    seen = set()
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.append(node.name())
            queue += [n for n, _ in node.next_functions]
    return found


def fused(module, *args, **kwargs):
    """How many norms run with activation and convolutions as one, and how many with the former."""
    names = nodes(module(*args, **kwargs))
    return (
        names.count("GroupNormActConvFunctionBackward"),
        names.count("GroupNormActFunctionBackward"),
    )


def images(*shape, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (2, C, 7, 5), generator=generator) + 0.5


def run(module, *inputs):
    leaves = [i.detach().requires_grad_() if isinstance(i, torch.Tensor) else i for i in inputs]
    y = module(*leaves)
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(y.shape, generator=generator).to(y)
    wanted = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)] + list(module.parameters())
    return [y.detach(), *torch.autograd.grad(y, wanted, weights, allow_unused=True)]


def assert_same(module, peer, *inputs):
    """No further from float64 than twice the peer, results and gradients."""
    exact = copy.deepcopy(peer).double()
    doubles = [i.double() if isinstance(i, torch.Tensor) else i for i in inputs]
    every = zip(run(module, *inputs), run(peer, *inputs), run(exact, *doubles), strict=True)
    for ours, theirs, truth in every:
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_accurate(ours, theirs, truth)


def converted(made):
    """The block on the kernels, and what it was."""
    peer = copy.deepcopy(made)
    keys, parts = list(made.state_dict()), list(made.modules())
    assert bitkern.convert(made) is made
    assert list(made.state_dict()) == keys
    assert all(a is b for a, b in zip(made.modules(), parts, strict=True))
    return made, peer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_fused(batch, memory_format, training):
    module, peer = converted(block())
    x = images(batch, C, 7, 5).contiguous(memory_format=memory_format)
    module.train(training), peer.train(training)
    assert fused(module, x) == (2, 0)
    assert_same(module, peer, x)
    assert isinstance(module, Block) and type(module).__name__ == "Block"
    with torch.no_grad():
        torch.testing.assert_close(module(x), peer(x), rtol=1e-4, atol=1e-4)


def functional(self, x):
    y = self.conv1(F.relu(self.norm1(x), inplace=True))
    return self.conv2(self.norm2(y).relu_()) + torch.relu(self.norm2(y))


@pytest.mark.parametrize(
    "forward, expected",
    [
        (functional, (2, 1)),
        (lambda self, x: self.conv1(F.silu(self.norm1(x))), (1, 0)),
        (lambda self, x: self.act(self.norm1(x)), (0, 1)),
        (lambda self, x: self.act(self.norm1(x)) * x, (0, 1)),
    ],
)
def test_functions(forward, expected):
    module, peer = converted(block(forward))
    assert fused(module, images()) == expected
    assert_same(module, peer, images())


def test_several_convolutions_of_one_activation():
    def forward(self, x):
        a = self.act(self.norm1(x))
        return self.conv1(a) + self.conv2(a)

    module, peer = converted(block(forward))
    assert fused(module, images()) == (1, 0)
    assert_same(module, peer, images())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_convolutions(dims, transposed, bias):
    name = f"Conv{'Transpose' if transposed else ''}{dims}d"
    options = {"output_padding": 1, "stride": 2} if transposed else {"dilation": 2}
    conv = getattr(nn, name)(C, 4, 3, padding=1, groups=2, bias=bias, **options)
    module, peer = converted(block(lambda self, x: self.conv1(self.act(self.norm1(x))), conv1=conv))
    x = images(2, C, *[5, 6, 4][:dims])
    assert fused(module, x) == (1, 0)
    assert_same(module, peer, x)


@pytest.mark.parametrize("amp", [False, True])
def test_half_precision(amp):
    module, peer = converted(block())
    x = images().bfloat16()
    if not amp:
        module.bfloat16(), peer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        assert fused(module, x) == (2, 0)
        ours, theirs = run(module, x), run(peer, x)
    exact = run(copy.deepcopy(peer).double(), x.double())
    for got, expected, truth in zip(ours, theirs, exact, strict=True):
        assert_accurate(got.to(expected.dtype), expected, truth)


class WithOptions(Block):
    def forward(self, x, scale=None, shift=None, *, twice=False, **kwargs):
        y = self.act(self.norm1(x))
        if scale is not None:
            y = y * scale
        y = self.conv1(y)
        if shift is not None:
            y = y + shift
        return self.conv2(self.act(self.norm2(y))) * (2 if twice else 1) + len(kwargs)


def test_optional_arguments():
    module, peer = converted(block(cls=WithOptions))
    x, scale, shift = images(), images(1, C, 1, 1), images(1, C, 1, 1, seed=4)
    for args, kwargs, expected in (
        ((x,), {}, (2, 0)),
        ((x, None, shift), {}, (2, 0)),
        ((x, scale), {"shift": shift}, (1, 1)),
        ((), {"x": x, "shift": shift}, (2, 0)),
        ((x,), {"twice": False}, (2, 0)),
        ((x,), {"twice": True}, (0, 2)),  # not traced: as its author wrote it
        ((x, 2.0), {}, (0, 2)),
        ((x,), {"more": 1}, (0, 2)),
    ):
        assert fused(module, *args, **kwargs) == expected
        torch.testing.assert_close(module(*args, **kwargs), peer(*args, **kwargs))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        module()


# Blocks built to deceive. Some hold still on a closer look; whatever they are, results are theirs.


def uses_the_norm_twice(self, x):
    y = self.norm1(x)
    return self.conv1(self.act(y.clone())) + y


def ignores_what_the_activation_returns(self, x):
    y = self.norm1(x)
    self.act(y)
    return self.conv1(y)


def edits_the_activation(self, x):
    y = self.act(self.norm1(x))
    z = self.conv1(y)
    return z + y.mul_(2)


def looks_at_values(self, x):
    y = self.norm1(x)
    return self.conv1(self.act(y) if x.sum() > 0 else -y)


def looks_at_shapes(self, x):
    y = self.norm1(x)
    return self.conv1(self.act(y) if x.shape[-1] > 5 else -y)


def looks_at_types(self, x):
    y = self.norm1(x)
    return self.conv1(self.act(y)) if isinstance(x, torch.Tensor) else y


def rolls_dice(self, x):
    y = self.norm1(x)
    return self.conv1(self.act(y) if random.random() < 2 else y)


def without_gradients(self, x):
    with torch.no_grad():
        y = self.act(self.norm1(x))
    return self.conv1(y) + self.conv2(x)


def without_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.conv1(self.act(self.norm1(x)))


def leaves_a_trace(self, x):
    self.last = self.norm1(x)
    return self.conv1(self.act(self.norm2(x)))


def counts(self, x):
    self.seen["calls"] = self.seen.get("calls", 0) + 1
    return self.conv1(self.act(self.norm1(x)))


def makes_tensors(self, x):
    return self.conv1(self.act(self.norm1(x))) + torch.arange(5.0)


def returns_a_number(self, x):
    return self.conv1(self.act(self.norm1(x))).sum(), float(x.sum())


@pytest.mark.parametrize(
    "forward, expected",
    [
        (uses_the_norm_twice, (0, 1)),
        (ignores_what_the_activation_returns, (0, 1)),
        (edits_the_activation, (0, 1)),
        (looks_at_values, (0, 1)),
        (looks_at_shapes, (0, 1)),
        (looks_at_types, (1, 0)),
        (rolls_dice, (0, 1)),
        (without_gradients, None),
        (without_autocast, (0, 1)),
        (leaves_a_trace, (0, 1)),
        (counts, (0, 1)),
        (makes_tensors, (0, 1)),
    ],
)
def test_deceptions(forward, expected):
    made = block(forward)
    made.seen = {}
    module, peer = converted(made)
    assert not hasattr(module, "last") and module.seen == {}
    if expected is not None:
        assert fused(module, images()) == expected
    if forward is without_gradients:
        leaf = images().requires_grad_()
        module(leaf).sum().backward()
        assert module.norm1.weight.grad is None
        return
    for seed in (3, 4):
        x = images(seed=seed)
        torch.testing.assert_close(module(x), peer(x))
        torch.testing.assert_close(module(-x), peer(-x))
        wide = torch.cat([x, x], 3)
        if forward is not makes_tensors:
            torch.testing.assert_close(module(wide), peer(wide))


def test_input_changed_after_the_norm_has_seen_it():
    def forward(self, x):
        y = self.norm1(x)
        x.add_(1)
        z = self.act(y)
        x.mul_(2)
        return self.conv1(z)

    module, peer = converted(block(forward))
    with torch.no_grad():
        torch.testing.assert_close(module(images()), peer(images()))


def test_shared_parts():
    def forward(self, x):
        y = self.conv1(self.act(self.norm1(x)))
        return self.conv1(self.act(self.norm1(y)))

    module, peer = converted(block(forward))
    assert fused(module, images()) == (2, 0)
    assert_same(module, peer, images())


SETTING = True


class WithSettings(Block):
    scale = 1
    use_act = True

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Identity()])

    def forward(self, x):
        y = self.norm1(x)
        y = self.act(y) if self.use_act and SETTING else y
        for part in self.parts:
            y = part(y)
        if self.training:
            y = y * 1
        if hasattr(self, "extra"):
            y = self.extra(y)
        return self.conv1(y) * self.scale


def settings():
    made = block(cls=WithSettings)
    made.use_act, made.scale = True, 2
    return made


def no_activation(module):
    module.use_act = False


def other_scale(module):
    module.scale = 3


def other_activation(module):
    module.act = nn.GELU()


def another_activation_of_ours(module):
    module.act = nn.SiLU()


def a_subclass(module):
    module.act = type("Loud", (nn.ReLU,), {"forward": lambda self, x: x.relu() + 1})()


def one_part_more(module):
    module.parts.append(nn.Tanh())


def one_part_by_name(module):
    module.extra = nn.Tanh()


def the_last_part(module):
    del module.parts[0]


def other_convolution(module):
    module.conv1 = nn.Sequential(module.conv1, nn.Tanh())


def reflection(module):
    module.conv1.padding_mode = "reflect"
    module.conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]


def half_in_evaluation(module):
    module.act.eval(), module.norm1.eval()


def evaluation(module):
    module.eval()


def a_forward_of_its_own(module):
    module.conv1.forward = lambda x: x * 3


def a_bias_less(module):
    module.norm1.bias = None


@pytest.mark.parametrize(
    "change",
    [
        no_activation,
        other_scale,
        other_activation,
        another_activation_of_ours,
        a_subclass,
        one_part_more,
        one_part_by_name,
        the_last_part,
        other_convolution,
        reflection,
        half_in_evaluation,
        evaluation,
        a_forward_of_its_own,
        a_bias_less,
    ],
)
def test_changed_afterwards(change):
    module, peer = converted(settings())
    torch.testing.assert_close(module(images()), peer(images()))
    for each in (module, peer):
        change(each)
    torch.testing.assert_close(module(images()), peer(images()))
    twin = copy.deepcopy(module)
    torch.testing.assert_close(twin(images()), peer(images()))


def test_setting_of_a_file_changed_afterwards(monkeypatch):
    module, peer = converted(settings().eval())
    assert fused(module, images()) == (1, 0)
    monkeypatch.setitem(globals(), "SETTING", False)
    torch.testing.assert_close(module(images()), peer(images()))


def test_active_dropout():
    module, peer = converted(block())
    for each in (module, peer):
        each.drop.p = 0.5
    results = []
    for each in (module, peer):
        torch.manual_seed(7)
        results.append(each(images()))
    torch.testing.assert_close(*results)
    assert fused(module.eval(), images()) == (2, 0)


@pytest.mark.parametrize("name", ["norm1", "act", "conv1", "drop", ""])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_see_what_they_saw(name, kind):
    module, peer = converted(block())
    seen = {}
    for each in (module, peer):
        calls = seen[each is module] = []

        def hook(part, *values, calls=calls):
            calls.append([[v.detach().clone() for v in value if v is not None] for value in values])

        getattr(each.get_submodule(name), f"register_{kind}_hook")(hook)
    if kind == "full_backward" and name in ("norm1", "act"):
        for each in (module, peer):
            each.act.inplace = False  # which PyTorch refuses to watch
    for each in (module, peer):
        each(images().requires_grad_()).sum().backward()
    torch.testing.assert_close(seen[True], seen[False])


class Escaping(nn.Module):
    """A block whose parts do half of the work each."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(C, C, 1), nn.GroupNorm(2, C))
        self.act, self.conv = nn.SiLU(), nn.Conv2d(C, C, 3)

    def forward(self, x):
        return self.conv(self.act(self.first(x)))


def test_norm_and_activation_in_different_modules():
    module, peer = converted(block(cls=Escaping))
    assert fused(module, images()) == (1, 0)
    assert_same(module, peer, images())
    calls = []
    handle = module.first.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(module(images()), peer(images()))
    assert calls == [1]
    handle.remove()
    module.first.append(nn.Tanh()), peer.first.append(nn.Tanh())
    torch.testing.assert_close(module(images()), peer(images()))


def test_copies():
    module, peer = converted(nn.Sequential(block(), block(cls=Escaping)))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(twin[0], Traced) and fused(twin, images()) == (3, 0)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(2)
        torch.testing.assert_close(module(images()), peer(images()))
        peer_twin = copy.deepcopy(peer)
        peer_twin.load_state_dict(twin.state_dict())
        torch.testing.assert_close(twin(images()), peer_twin(images()))


def test_converting_again_changes_nothing():
    module, _ = converted(block())
    cls = type(module)
    assert type(bitkern.convert(module)) is cls and fused(module, images()) == (2, 0)


def test_compile_and_export():
    module, peer = converted(nn.Sequential(block(), block(cls=Escaping)))
    x = images()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for mode in (True, False):
        module.train(mode)
        torch.testing.assert_close(compiled(x), peer(x), rtol=1e-4, atol=1e-4)
    exported = torch.export.export(module, (x,))
    called = [str(node.target) for node in exported.graph.nodes]
    assert called.count("bitkern.group_norm_act.default") == 3
    assert "aten.relu.default" not in called
    torch.testing.assert_close(exported.module()(x), peer(x), rtol=1e-4, atol=1e-4)


def test_torch_fx_and_checkpointing_and_transforms():
    module, peer = converted(block())
    x = images()
    graph = torch.fx.symbolic_trace(module)
    assert any(node.target == "act" for node in graph.graph.nodes)
    torch.testing.assert_close(graph(x), peer(x))
    again = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    torch.testing.assert_close(again, peer(x))
    state = {name: p.detach() * 2 for name, p in module.named_parameters()}
    call = torch.func.functional_call
    torch.testing.assert_close(call(module, state, (x,)), call(peer, state, (x,)))
    with bitkern.use_backend("reference"):
        (first,) = torch.autograd.grad(
            module(x.requires_grad_()).square().sum(), x, create_graph=True
        )
        first.sum().backward()


def test_explain():
    table = bitkern.explain(bitkern.convert(nn.Sequential(block(), block(uses_the_norm_twice))))
    rows = {row.name: row for row in table}
    assert rows["0"].converted and rows["0.norm1"].reason.endswith("convolution as one")
    assert "its result has 2 uses in Own" in rows["1.norm1"].reason
    for forward, reason in (
        (looks_at_values, "torch.fx cannot follow its forward"),
        (rolls_dice, "draws random numbers"),
        (leaves_a_trace, "changes last"),
        (without_autocast, "autocast"),
    ):
        rows = bitkern.explain(bitkern.convert(block(forward)))
        assert any(reason in row.reason for row in rows), list(rows)


def test_meta_device_and_dtypes():
    with torch.device("meta"):
        module = bitkern.convert(block())
    assert isinstance(module, Traced)
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    assert fused(module, images()) == (2, 0)
    assert isinstance(bitkern.convert(block().half()), Traced)


def test_modes_and_random_state_are_left():
    made = block()
    made.norm1.eval()
    random_state, python_state = torch.get_rng_state(), random.getstate()
    threads = torch.get_num_threads()
    bitkern.convert(made)
    assert [m.training for m in made.modules()].count(False) == 1
    assert torch.equal(random_state, torch.get_rng_state()) and python_state == random.getstate()
    assert torch.get_num_threads() == threads


# Classes of one's own.


class TheirConv(nn.Conv2d):
    """As many papers write it: Bessel's correction, eps beside the root."""

    factor = 1.0

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)
        return self.factor * F.conv2d(x, w, self.bias, self.stride, self.padding)


class TheirNorm(nn.GroupNorm):
    def forward(self, x):
        return F.silu(super().forward(x))


def test_classes():
    torch.manual_seed(0)
    made = nn.Sequential(TheirConv(3, C, 3), TheirNorm(2, C), nn.Conv2d(C, C, 1))
    peer = copy.deepcopy(made)
    conv = functools.partial(bitkern.nn.WSConv2d, eps=1e-5, eps_outside=True, unbiased=True)
    norm = functools.partial(bitkern.nn.GroupNormAct, act="silu")
    bitkern.convert(made, classes={TheirConv: conv, TheirNorm: norm})
    assert type(made[0]) is bitkern.nn.WSConv2d and type(made[1]) is bitkern.nn.GroupNormAct
    assert fused(made, images(2, 3, 9, 8)) == (1, 0)
    assert_same(made, peer, images(2, 3, 9, 8))


def test_classes_that_compute_something_else():
    made = nn.Sequential(TheirConv(3, C, 3), TheirNorm(2, C))
    far, advice = r"does not compute what 0 \(TheirConv\)", "eps_outside=True, unbiased=True"
    with pytest.raises(ValueError, match=rf"{far}.*eps=1e-05, {advice}\) does"):
        bitkern.convert(made, classes={TheirConv: bitkern.nn.WSConv2d})
    with pytest.raises(ValueError, match=r"act='silu'\) does"):
        bitkern.convert(made, classes={TheirNorm: bitkern.nn.GroupNormAct})
    made[0].factor = 1.1
    with pytest.raises(ValueError, match="no variant of WSConv2d does"):
        bitkern.convert(made, classes={TheirConv: bitkern.nn.WSConv2d})
    assert type(made[0]) is TheirConv and type(made[1]) is TheirNorm


def test_classes_bad_input():
    made = nn.Sequential(TheirConv(3, C, 3))
    for classes, error, match in (
        ({TheirNorm: bitkern.nn.GroupNormAct}, ValueError, "no TheirNorm in Sequential"),
        ({TheirConv: nn.Conv2d}, TypeError, "expected WSConv2d or GroupNormAct"),
        ({TheirConv: functools.partial(bitkern.nn.WSConv2d, bias=True)}, TypeError, "keywords"),
        ({nn.Linear: bitkern.nn.WSConv2d}, TypeError, r"a subclass of nn\.Conv2d"),
        ({TheirConv: bitkern.nn.GroupNormAct}, TypeError, r"a subclass of nn\.GroupNorm"),
    ):
        with pytest.raises(error, match=f"^classes: .*{match}"):
            bitkern.convert(made, classes=classes)
