"""Blocks that are not what a trace shows: results stay theirs."""

import collections
import copy
import random
import threading

import pytest
import torch
from torch import nn

import bitkern
from tests.blocks import assert_same, block, converted, fused, images


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


@pytest.mark.parametrize(
    "forward, expected",
    [
        (uses_the_norm_twice, (0, 1)),
        (ignores_what_the_activation_returns, (0, 1)),
        (edits_the_activation, (0, 1)),
        (looks_at_values, (0, 1)),
        (looks_at_shapes, (0, 1)),
        (looks_at_types, (0, 1)),
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


def test_copied_in_a_way_of_its_own():
    cls = type("Own", (type(block()),), {"__getstate__": lambda self: self.__dict__ | {"extra": 1}})
    module, peer = converted(block(cls=cls))
    assert fused(module, images()) == (0, 2)
    assert copy.deepcopy(module).extra == copy.deepcopy(peer).extra == 1


SEEN = []


class Straight(torch.autograd.Function):
    """A backward that clips."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-1e-3, 1e-3)


def asks_a_buffer(self, x):
    y = self.conv1(self.act(self.norm1(x)))
    return y * 2 if self.flag else y


def asks_a_parameter(self, x):
    y = self.conv1(self.act(self.norm1(x)))
    return y * 2 if next(self.parameters()).requires_grad else y


def appends(self, x):
    SEEN.append(len(SEEN))
    return self.conv1(self.act(self.norm1(x)))


def prints(self, x):
    print("called")
    return self.conv1(self.act(self.norm1(x)))


def catches(self, x):
    try:
        large = bool(x.abs().max() > 100)
    except Exception:
        large = False
    y = self.conv1(self.act(self.norm1(x)))
    return y * 2 if large else y


def clips_gradients(self, x):
    return Straight.apply(self.conv1(self.act(self.norm1(x))))


def records_gradients(self, x):
    with torch.enable_grad():
        return self.conv1(self.act(self.norm1(x)))


def asks_autocast(self, x):
    y = self.conv1(self.act(self.norm1(x)))
    return y * 2 if torch.is_autocast_enabled("cpu") else y


def reads_a_closure():
    factors = [2.0]
    return lambda self, x: self.conv1(self.act(self.norm1(x))) * factors[0]


@pytest.mark.parametrize(
    "forward",
    [
        asks_a_buffer,
        asks_a_parameter,
        appends,
        prints,
        catches,
        clips_gradients,
        records_gradients,
        asks_autocast,
        reads_a_closure(),
    ],
)
def test_left(forward, capsys):
    made = block(forward)
    made.register_buffer("flag", torch.tensor(False))
    SEEN.clear()
    module, peer = converted(made)
    table = {row.name: row.reason for row in bitkern.explain(module)}
    assert table["norm1"].startswith("norm by a kernel alone")
    before = len(SEEN), capsys.readouterr()
    torch.testing.assert_close(module(images() * 1000), peer(images() * 1000), rtol=1e-4, atol=1e-3)
    assert len(SEEN) - before[0] == 2 * (forward is appends)
    assert capsys.readouterr().out.count("called") == 2 * (forward is prints)


def test_hooks_on_all_modules():
    module, peer = converted(block())
    names = {True: [], False: []}
    for each in (module, peer):
        seen = names[each is module]
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda part, *_, seen=seen: seen.append(type(part).__name__)
        )
        each(images())
        hook.remove()
    assert [n.removesuffix("Act") for n in names[True]] == names[False]


def test_result_types():
    def forward(self, x):
        return collections.OrderedDict(y=self.conv1(self.act(self.norm1(x))))

    module, peer = converted(block(forward))
    assert type(module(images())) is type(peer(images())) is collections.OrderedDict


def test_float32_under_autocast_is_converted_by_the_convolution():
    module, peer = converted(block())
    with torch.autocast("cpu", torch.bfloat16):
        assert module.conv1(images()).dtype == torch.bfloat16
        y, expected = module(images()), peer(images())
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.2)


def test_other_threads_do_not_notice():
    module, errors, done = nn.Sequential(*[block() for _ in range(4)]), [], threading.Event()

    def work():
        while not done.is_set():
            try:
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    torch.ones(2) @ torch.ones(2)
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    bitkern.convert(module)
    done.set()
    thread.join()
    assert not errors and "__getattribute__" not in vars(nn.Module)
    assert fused(module, images()) == (8, 0)
