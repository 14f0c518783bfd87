"""Blocks that are not what a trace shows, or are changed after it: results stay theirs."""

import copy
import random

import pytest
import torch
from torch import nn

import bitkern
from tests.blocks import Block, assert_same, block, converted, fused, images


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
