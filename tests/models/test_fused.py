"""The fused network against the textbook one: the same gradients, much less kept for backward."""

import pytest
import timm
import torch

import bitkern
from bitkern.models import ARCHITECTURES, ResNetV2
from bitkern.testing import assert_accurate
from tests.models.helpers import randomize, small
from tests.peers import kept_bytes


def textbook(model, x):
    """Run the network as papers draw it: module by module, sums where they are."""
    x = model.stem(x)
    for stage in model.stages:
        for block in stage.blocks:
            a = block.norm1(x)
            shortcut = x if block.downsample is None else block.downsample(a)
            branch = block.conv1(a)
            branch = block.conv2(block.norm2(branch))
            branch = block.conv3(block.norm3(branch))
            x = branch + shortcut
    return model.forward_head(model.norm(x))


def gradients(model, x, forward, amp=False):
    model.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        logits = forward(x)
    logits.float().square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return grads | {"logits": logits.detach(), "x": x.grad}


CASES = [("R26x0.5", 48, False), ("R26x0.5", 48, True), ("R50x1", 32, False), ("R50x1", 32, True)]


@pytest.mark.parametrize("name, size, amp", CASES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_equal_the_textbook(backend, name, size, amp):
    model = randomize(ResNetV2(*ARCHITECTURES[name], 7))
    x = torch.randn(2, 3, size, size + 3).contiguous(memory_format=torch.channels_last)
    with bitkern.use_backend(backend):
        got = gradients(model, x, model, amp)
        expected = gradients(model, x, lambda x: textbook(model, x), amp)
    model.double()
    exact = gradients(model, x.double(), lambda x: textbook(model, x))
    assert got.keys() == expected.keys() == exact.keys()
    for name, grad in got.items():  # as near to float64 as the textbook way's at this precision
        assert_accurate(grad, expected[name], exact[name], name)


def test_float64_equals_to_the_last_digits():
    model = small().double()
    x = torch.randn(2, 3, 33, 40, dtype=torch.float64)
    expected = gradients(model, x, lambda x: textbook(model, x))
    for enable in (True, False):
        model.set_recompute(enable)
        torch.testing.assert_close(gradients(model, x, model), expected)
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(model, x, model), expected)


def test_frozen_layers_compute_no_gradient():
    model = small().double()
    for name, p in model.named_parameters():
        p.requires_grad_("stages.1" in name or name.startswith("head"))
    x = torch.randn(2, 3, 33, 40, dtype=torch.float64)
    expected = gradients(model, x, lambda x: textbook(model, x))
    torch.testing.assert_close(gradients(model, x, model), expected)


def test_hooks_inside_a_block_fire():
    model, seen = small(), []
    for name, module in model.named_modules():
        if isinstance(module, bitkern.nn.WSConv2d | bitkern.nn.GroupNormAct):
            module.register_forward_hook(lambda m, args, out, name=name: seen.append(name))
    x = torch.randn(1, 3, 32, 32)
    logits = model(x)
    assert len(seen) == len(set(seen)) == 29 + 25
    torch.testing.assert_close(logits, textbook(model, x))


def test_bytes_kept_for_backward():
    """docs/memory.md quotes this: R50x1, batch 4 at 224, bf16 autocast."""
    x = torch.randn(4, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    model = bitkern.create_model("R50x1", num_classes=1000)
    peer = timm.create_model("resnetv2_50x1_bit", num_classes=1000)
    # Sums, what conv1 and conv2 return, the stem's maps, standardized weights: 137.6 of 209.7 MB.
    assert kept_bytes(model, x) <= min(145e6, 0.66 * kept_bytes(peer, x))
