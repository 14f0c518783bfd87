"""convert: each layer computes what it did, and nothing else of a module changes."""

import copy
import io
import pickle

import pytest
import timm.layers as timm
import torch
import torchvision
from torch import nn
from transformers import BitConfig
from transformers.models.bit import modeling_bit as bit

import bitkern
from bitkern.nn import WSConv2d
from bitkern.testing import assert_accurate, maps, strided
from tests.peers import ConvNet, distance, gradients, randomize, relative, small_bit, small_timm


def bit_norm(act):
    return bit.BitGroupNormActivation(BitConfig(hidden_act=act, num_groups=4), 12)


LAYERS = {
    "StdConv2d": lambda: timm.StdConv2d(12, 8, 3, eps=1e-8),
    "StdConv2d groups bias": lambda: timm.StdConv2d(12, 8, (3, 2), 2, groups=4, bias=True),
    "StdConv2dSame": lambda: timm.StdConv2dSame(12, 8, (5, 3), stride=(3, 2)),
    "StdConv2dSame static": lambda: timm.StdConv2dSame(12, 8, 3),
    "ScaledStdConv2d": lambda: timm.ScaledStdConv2d(12, 8, 3, gamma=1.7, eps=1e-5, dilation=2),
    "ScaledStdConv2dSame": lambda: timm.ScaledStdConv2dSame(12, 8, 4, stride=3, gamma=0.6),
    "WeightStandardizedConv2d": lambda: bit.WeightStandardizedConv2d(12, 8, 3, padding=None),
    "WeightStandardizedConv2d same": lambda: bit.WeightStandardizedConv2d(12, 8, 4, stride=3),
    "GroupNormAct ReLU": lambda: timm.GroupNormAct(12, 4),
    "GroupNormAct SiLU": lambda: timm.GroupNormAct(12, 4, act_layer=nn.SiLU, eps=1e-3),
    "GroupNormAct GELU": lambda: timm.GroupNormAct(12, 4, act_layer=nn.GELU),
    "GroupNormAct alone": lambda: timm.GroupNormAct(12, 4, apply_act=False),
    "GroupNormAct PReLU": lambda: timm.GroupNormAct(12, 4, act_layer=nn.PReLU),
    "GroupNormAct drop": lambda: timm.GroupNormAct(12, 4, drop_layer=nn.Dropout).eval(),
    "GroupNorm1Act": lambda: timm.GroupNorm1Act(12),
    "timm GroupNorm": lambda: timm.GroupNorm(12, 3),
    "timm GroupNorm1": lambda: timm.GroupNorm1(12),
    "BitGroupNormActivation ReLU": lambda: bit_norm("relu"),
    "BitGroupNormActivation SiLU": lambda: bit_norm("silu"),
    "BitGroupNormActivation GELU": lambda: bit_norm("gelu"),
    "GroupNorm": lambda: nn.GroupNorm(6, 12),
    "GroupNorm no affine": lambda: nn.GroupNorm(6, 12, affine=False),
    "GroupNorm, ReLU": lambda: nn.Sequential(nn.GroupNorm(6, 12), nn.ReLU(inplace=True)),
    "GroupNorm1, SiLU": lambda: nn.Sequential(timm.GroupNorm1(12), nn.SiLU(), nn.ReLU()),
    "ReLU, GroupNorm": lambda: nn.Sequential(nn.ReLU(), nn.GroupNorm(6, 12), nn.ELU()),
    "GroupNorm, Mish": lambda: nn.Sequential(nn.GroupNorm(3, 12), nn.Mish(inplace=True)),
    "GroupNormAct timm's GELU": lambda: timm.GroupNormAct(12, 4, act_layer="gelu"),
    "BitGroupNormActivation Mish": lambda: bit_norm("mish"),
    "InstanceNorm": lambda: nn.InstanceNorm2d(12, eps=1e-3),
    "InstanceNorm, LeakyReLU": lambda: nn.Sequential(
        nn.InstanceNorm2d(12, affine=True), nn.LeakyReLU(inplace=True)
    ),
}


@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(layer, dtype, kind):
    model = randomize(LAYERS[layer]())
    peer, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    if dtype != torch.float32:  # the same rounded parameters for all three
        exact.load_state_dict(model.to(dtype).state_dict())
        peer.to(dtype)
    bitkern.convert(model)
    assert bitkern.explain(model)[0].converted
    results = []
    for module, cast in ((model, dtype), (peer, dtype), (exact, torch.float64)):
        x = strided(maps((3, 12, 7, 10), dtype), kind).to(cast).requires_grad_()
        y, grads = gradients(module, x)
        results.append((y, x.grad, grads))
    for got, peer, exact in list(zip(*results, strict=True))[:2]:
        assert_accurate(got, peer, exact)
    got, peer, exact = (grads for _, _, grads in results)
    if exact:
        tiny = max(1e-6, torch.finfo(dtype).eps)
        assert distance(got, exact) <= 2 * distance(peer, exact) + tiny


def test_nothing_else_changes():
    model = small_timm()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    model.stages[0].requires_grad_(False)
    model.norm.eval()
    model.to(memory_format=torch.channels_last)
    flags = [(p.requires_grad, p.dtype, p.stride()) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    types = [type(m) for m in model.modules()]
    state, shown = {k: v.clone() for k, v in model.state_dict().items()}, repr(model)
    assert bitkern.convert(model) is model
    assert all(a is b for a, b in zip(modules.values(), model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters.values(), model.parameters(), strict=True))
    assert [(p.requires_grad, p.dtype, p.stride()) for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(isinstance(m, t) for m, t in zip(model.modules(), types, strict=True))
    assert repr(model) == shown
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    model.load_state_dict(state)
    classes = [type(m) for m in model.modules()]
    bitkern.convert(model)
    assert [type(m) for m in model.modules()] == classes


def test_optimizer_goes_on():
    model, x = small_timm(act_layer=nn.SiLU), torch.randn(2, 3, 40, 40)
    peer = copy.deepcopy(model)
    for m in (model, peer):
        optimizer = torch.optim.SGD(m.parameters(), 1e-3, momentum=0.9)
        for step in range(3):
            if step == 1 and m is model:
                bitkern.convert(m)
            gradients(m, x)
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), peer.parameters(), strict=True):
        assert relative(p, q) < 1e-5, name


@pytest.mark.parametrize("make", [small_timm, small_bit])
def test_copies(make):
    model, x = bitkern.convert(make()).eval(), torch.randn(1, 3, 40, 40)
    expected = gradients(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        averaged.module,
    ):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        torch.testing.assert_close(gradients(other, x), expected)


def test_save_pretrained(tmp_path):
    model, x = bitkern.convert(small_bit()).eval(), torch.randn(1, 3, 40, 40)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=1e-4, atol=1e-4)


def hooked(model, x):
    """Return the modules whose hooks fire, in order, and whether their outputs are there."""
    seen, handles = {}, []
    for name, module in model.named_modules():

        def hook(module, args, output, name=name):
            seen[name] = getattr(output, "logits", output)

        handles.append(module.register_forward_hook(hook))
    model(x)
    for handle in handles:
        handle.remove()
    return {name: output for name, output in seen.items() if isinstance(output, torch.Tensor)}


@pytest.mark.parametrize("make", [small_timm, small_bit])
def test_hooks_on_every_module_fire(make):
    model, x = make().eval(), torch.randn(2, 3, 40, 40)
    expected = hooked(model, x)
    seen = hooked(bitkern.convert(model), x)
    assert list(seen) == list(expected)
    for name, output in seen.items():
        assert relative(output, expected[name]) < 1e-5, name


@pytest.mark.parametrize("where", ["stages", "stages.0.blocks", "stages.0.blocks.1.norm1.act"])
def test_hooks_on_one_module_fire(where):
    """Hooks on containers and inside fused layers, which a fused path could skip."""
    model, x = small_timm().eval(), torch.randn(2, 3, 40, 40)
    expected, seen = model(x), []
    bitkern.convert(model)
    model.get_submodule(where).register_forward_hook(lambda *args: seen.append(where))
    assert relative(model(x), expected) < 1e-5
    assert seen == [where]


class Traced(nn.Module):
    """A wrapper that counts calls, put in the place of a block."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, x):
        self.calls += 1
        return self.module(x)


@pytest.mark.parametrize(
    "where",
    ["blocks.1", "blocks.0.downsample", "blocks.1.conv2", "blocks.1.norm3", "blocks.1.drop_path"],
)
def test_a_module_wrapped_afterwards(where):
    """A fused path must not skip the wrapper."""
    model, x = small_timm().eval(), torch.randn(2, 3, 40, 40)
    expected = gradients(model, x)[0]
    bitkern.convert(model)
    wrapper = Traced(model.stages[0].get_submodule(where))
    model.stages[0].set_submodule(where, wrapper)
    assert relative(gradients(model, x)[0], expected) < 1e-5
    assert wrapper.calls == 1


def test_explain():
    before = bitkern.explain(small_timm())
    assert not any(row.converted for row in before)
    assert "bitkern.convert has not seen it" in str(before)
    table = bitkern.explain(bitkern.convert(small_timm(act_layer=nn.ELU)))
    rows = {row.name: row for row in table}
    assert rows["stem.conv"].layer == "timm StdConv2d" and rows["stem.conv"].converted
    assert "then ELU" in rows["norm"].reason
    alone = bitkern.explain(bitkern.convert(nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU())))
    assert 'torch.compile(model, backend="bitkern") fuses what follows' in alone[0].reason
    assert not rows["head.fc"].converted
    assert "  12 timm StdConv2d " in str(table)
    plain = bitkern.explain(nn.Linear(2, 2))
    assert plain == () and str(plain) == ""
    assert bitkern.explain("group_norm_act", torch.randn(1, 2, 3)).name in ("cpu", "reference")


class OwnNorm(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x) + 1


def test_what_is_left():
    parametrized = nn.utils.parametrizations.weight_norm(timm.StdConv2d(4, 4, 1))
    hidden = nn.GroupNorm(2, 4)
    hidden.forward = hidden.forward
    model = nn.ModuleList([OwnNorm(2, 4), parametrized, nn.BatchNorm2d(4), hidden])
    classes = [type(m) for m in model]
    rows = bitkern.explain(bitkern.convert(model))
    assert [type(m) for m in model] == classes
    assert not any(row.converted for row in rows)
    assert "OwnNorm" in rows[0].layer and "subclass of GroupNorm" in rows[0].reason
    assert "subclass of StdConv2d" in rows[1].reason
    assert "put over" in rows[-1].reason


def test_bad_input():
    with pytest.raises(TypeError, match="convert: expected an nn.Module, got dict"):
        bitkern.convert({})
    with pytest.raises(TypeError, match="convert: 0 is compiled by TorchScript: convert it before"):
        bitkern.convert(nn.Sequential(torch.jit.script(nn.GroupNorm(2, 4))))
    with pytest.raises(TypeError, match="the module is compiled by torch.compile"):
        bitkern.convert(torch.compile(nn.GroupNorm(2, 4)))
    for layer in (nn.GroupNorm(2, 4), timm.StdConv2d(3, 4, 3)):
        name = f"torch.jit.script cannot compile {'GroupNorm' if layer.bias is not None else ''}"
        with pytest.raises(RuntimeError, match=name):
            torch.jit.script(bitkern.convert(nn.Sequential(layer)))
    with pytest.raises(ValueError, match="ws=True.*no nn.Conv2d of Linear|nn.Conv2d of Linear"):
        bitkern.convert(nn.Linear(2, 2), ws=True)


def test_ws_turns_a_users_network():
    model = ConvNet()
    parameters, x = dict(model.named_parameters()), torch.randn(4, 3, 9, 8)
    model.stem.eval()
    bitkern.convert(model, ws=True)
    standardized = [n for n, m in model.named_modules() if isinstance(m, WSConv2d)]
    assert standardized == ["stem.0", "conv1"]
    assert type(model.bn2).__name__ == "GroupNorm" and model.bn2.num_groups == 8
    assert dict(model.named_parameters()) == parameters and not dict(model.named_buffers())
    assert not model.stem.training and model.bn1.training
    alone = model(x[:1])
    gradients(model, x)
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(model(x)[:1], alone)
    norm, conv = model.stem[1], model.stem[0]
    weight = bitkern.reference.weight_standardize(conv.weight)
    y = torch.group_norm(torch.conv2d(x, weight, conv.bias), 8, norm.weight, norm.bias).relu()
    torch.testing.assert_close(model.stem(x), y)


def test_ws_proves_by_fx_or_sequential():
    resnet = bitkern.convert(torchvision.models.resnet18(), ws=True)
    assert sum(isinstance(m, WSConv2d) for m in resnet.modules()) == 20
    assert not any(isinstance(m, nn.BatchNorm2d) for m in resnet.modules())

    class Branches(nn.Module):  # that torch.fx cannot follow
        def __init__(self):
            super().__init__()
            shared = nn.Conv2d(4, 4, 1)
            depthwise = nn.Conv2d(4, 4, 1, groups=4)  # a filter of one weight would be nothing
            self.a = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), shared, nn.BatchNorm2d(4))
            self.b = nn.Sequential(shared, depthwise, nn.BatchNorm2d(4))

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else self.b(x)

    model = bitkern.convert(Branches(), ws=True)
    names = [n for n, m in model.named_modules() if isinstance(m, WSConv2d)]
    assert names == ["a.0"]


def test_says_when_there_was_nothing_to_convert():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with pytest.warns(UserWarning, match="nothing in Sequential runs on bitkern.* its 1 BatchNorm"):
        bitkern.convert(plain)
    assert {"convert", "create_model", "models", "transfer"} <= {*dir(bitkern)}
