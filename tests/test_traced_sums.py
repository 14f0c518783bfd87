"""Residual sums before a norm, also across blocks, computed with it."""

import copy
import pickle

import pytest
import torch
from torch import nn

import bitkern
from tests.blocks import assert_same, block, converted, fused, images, nodes, run
from tests.peers import relative


def chain(count=3):
    return nn.Sequential(*[block() for _ in range(count)])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_across_blocks(memory_format):
    module, peer = converted(chain())
    x = images().contiguous(memory_format=memory_format)
    assert fused(module, x) == (6, 0)
    assert nodes(module(x)).count("AddBackward0") == 1  # of the last block
    exact = run(copy.deepcopy(peer).double(), x.double())
    for ours, theirs, truth in zip(run(module, x), run(peer, x), exact, strict=True):
        assert relative(ours, truth) <= 2 * relative(theirs, truth) + 1e-6
    table = {row.name: row.reason for row in bitkern.explain(module)}
    assert table["1.norm1"].startswith("residual sum") and table["0.norm1"].startswith("norm")
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert nodes(twin(x)).count("AddBackward0") == 1
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), peer(x), rtol=1e-4, atol=1e-4)


def test_blocks_that_are_looked_at_are_called():
    module, peer = converted(chain())
    calls = []
    handle = module[1].register_forward_hook(lambda *_: calls.append(1))
    assert nodes(module(images())).count("AddBackward0") == 3
    assert_same(module, peer, images())
    assert calls
    handle.remove()
    assert nodes(module(images())).count("AddBackward0") == 1
    module[1].compile(backend="eager")
    torch.testing.assert_close(module(images()), peer(images()))
    assert nodes(module(images())).count("AddBackward0") == 3
    module[2].act, peer[2].act = nn.GELU(), nn.GELU()
    torch.testing.assert_close(module(images()), peer(images()))
    del module[0], peer[0]
    torch.testing.assert_close(module(images()), peer(images()))


def adds(self, x):
    total = self.conv1(x) + x
    return self.conv2(self.act(self.norm1(total))) * total


def adds_in_place(self, x):
    total = self.conv1(x)
    total += x
    return self.conv2(self.act(self.norm1(total))) * total


def adds_in_place_what_is_used_again(self, x):
    y = x * 2
    total = y
    total += self.conv1(x)
    return self.conv2(self.act(self.norm1(total))) * y


def changes_the_sum_first(self, x):
    total = self.conv1(x) + x
    changed = self.act(total)
    return self.conv2(self.act(self.norm1(total))) + changed


def adds_what_does_not_fit(self, x):
    return self.conv2(self.act(self.norm1(self.conv1(x) + x[:, :, :1])))


@pytest.mark.parametrize(
    "forward",
    [
        adds,
        adds_in_place,
        adds_in_place_what_is_used_again,
        changes_the_sum_first,
        adds_what_does_not_fit,
    ],
)
def test_sums(forward):
    module, peer = converted(block(forward))
    # torch.fx takes += for a sum of its own: that the first operand changes shows in the proof.
    kept = forward is not adds_in_place_what_is_used_again
    assert fused(module, images()) == ((1, 0) if kept else (0, 1))
    assert any("AddBackward" in name for name in nodes(module(images()))) == (
        forward not in (adds, adds_in_place)
    )
    assert_same(module, peer, images())
    with torch.no_grad():
        torch.testing.assert_close(module(images()), peer(images()))
