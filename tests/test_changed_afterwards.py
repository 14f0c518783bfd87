"""Blocks that are changed after the conversion: results stay theirs."""

import copy

import pytest
import torch
from torch import nn

from tests.blocks import Block, block, converted, fused, images

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


class Settled(Block):
    """What the class and the file say is read as well."""

    factor = 2.0

    def scale(self, y):
        return y * self.factor

    def forward(self, x):
        return helper(self.scale(self.conv1(self.act(self.norm1(x)))))


OFFSET = 0.5


def helper(y):
    return y + OFFSET


def set_on_the_class(module, monkeypatch):
    monkeypatch.setattr(Settled, "factor", 3.0)


def set_on_the_module(module, monkeypatch):
    module.factor = 3.0


def method_of_the_class(module, monkeypatch):
    monkeypatch.setattr(Settled, "scale", lambda self, y: y - 1)


def method_of_the_module(module, monkeypatch):
    module.scale = lambda y: y - 1


def forward_of_the_class(module, monkeypatch):
    monkeypatch.setattr(Settled, "forward", lambda self, x: x)


def the_helper(module, monkeypatch):
    monkeypatch.setitem(globals(), "helper", lambda y: y - 1)


def what_the_helper_reads(module, monkeypatch):
    monkeypatch.setitem(globals(), "OFFSET", 1.5)


@pytest.mark.parametrize(
    "change",
    [
        set_on_the_class,
        set_on_the_module,
        method_of_the_class,
        method_of_the_module,
        forward_of_the_class,
        the_helper,
        what_the_helper_reads,
    ],
)
def test_code_and_settings_changed_afterwards(change, monkeypatch):
    module, peer = converted(block(cls=Settled))
    assert fused(module, images()) == (1, 0)
    for each in (module, peer):
        change(each, monkeypatch)
    torch.testing.assert_close(module(images()), peer(images()))
