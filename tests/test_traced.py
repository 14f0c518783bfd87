"""Blocks of unknown classes: what is proven runs fused, what deceives is left, nothing changes."""

import copy
import operator
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitkern
from bitkern.convert.traced import Traced
from tests.blocks import Block, C, assert_same, block, converted, fused, images, nodes, run
from tests.helpers import assert_accurate


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


def test_blocks_compiled_one_by_one_are_compiled_once():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    peer = block()
    for _ in range(10):
        module = torch.compile(bitkern.convert(block()), backend=backend, fullgraph=True)
        torch.testing.assert_close(module(images()), peer(images()), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


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


def ends(add):
    def forward(self, x):
        shortcut = x * 2
        y = self.norm2(self.conv1(self.act(self.norm1(x))))
        return self.act(add(y, shortcut))

    return forward


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "add", [operator.iadd, operator.add, torch.add, lambda a, b: a.add_(b), lambda a, b: b + a]
)
def test_sum_and_relu_behind_a_norm(add, memory_format):
    module, peer = converted(block(ends(add)))
    x = images().contiguous(memory_format=memory_format)
    assert "GroupNormAddReluFunctionBackward" in nodes(module(x))
    assert_same(module, peer, x)
    calls = []
    for each in (module, peer):
        each.act.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(module(x), peer(x))
    assert len(calls) == 4


def adds_with_a_factor(self, x):
    return self.act(torch.add(self.norm2(self.conv1(x)), x, alpha=2))


def adds_a_number(self, x):
    return self.act(self.norm2(self.conv1(x)) + 1)


def adds_to_the_shortcut(self, x):
    shortcut = x * 1
    shortcut += self.norm2(self.conv1(x))
    return self.act(shortcut) + shortcut


def adds_a_smaller_one(self, x):
    return self.act(self.norm2(self.conv1(x)) + x[:, :1])


def uses_the_sum_twice(self, x):
    total = self.norm2(self.conv1(x)) + x
    return F.relu(total) + total


def changes_what_the_norm_saw(self, x):
    y = self.conv1(x)
    z = self.norm2(y)
    y.zero_()
    return self.act(z + x)


@pytest.mark.parametrize(
    "forward",
    [
        adds_with_a_factor,
        adds_a_number,
        adds_to_the_shortcut,
        adds_a_smaller_one,
        uses_the_sum_twice,
        changes_what_the_norm_saw,
    ],
)
def test_other_sums_behind_a_norm(forward):
    module, peer = converted(block(forward))
    with torch.no_grad():
        torch.testing.assert_close(module(images()), peer(images()))
    if forward is not changes_what_the_norm_saw:
        assert "GroupNormAddReluFunctionBackward" not in nodes(module(images()))
        assert_same(module, peer, images())
