"""The kernel that hub/assemble.py writes, loaded as the library ``kernels`` does.

What uses it is a process of its own, in which there is no bitkern: see :func:`alone`.
"""

import ast
import copy
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitkern.testing import affine, assert_accurate, maps
from hub.assemble import HERE, assemble
from tests.process import python

kernels = pytest.importorskip("kernels", reason="kernels is not installed")
ROOT = HERE.parent
OPERATORS = "add_group_norm_act group_norm_act group_norm_add_relu weight_standardize ws_conv2d"


ALONE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("bitkern.testing", "bitkern/testing.py")
sys.modules |= {"bitkern": None, spec.name: importlib.util.module_from_spec(spec)}
spec.loader.exec_module(sys.modules[spec.name])
from tests.repo import test_hub
"""


def alone(program, *arguments, **environment):
    """Call a function of this file where bitkern cannot be imported."""
    code = ALONE + f"test_hub.{program.__name__}(*{arguments!r})"
    python("-c", code, **{"HF_HUB_OFFLINE": "1"} | environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return assemble(tmp_path_factory.mktemp("hub") / "kernel")


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_sources_give_the_same_bytes(folder, tmp_path):
    assert contents(folder) == contents(assemble(tmp_path / "again"))
    with pytest.raises(FileExistsError):
        assemble(tmp_path / "again")


def test_the_library_takes_what_describes_it(folder):
    from kernels._rust import Build, Digest, Metadata

    backends = [str(backend).lower() for backend in Build.open(folder).general.backends]
    assert {path.name for path in (folder / "build").iterdir()} == {f"torch-{b}" for b in backends}
    for backend in backends:
        variant = folder / "build" / f"torch-{backend}"
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))
        assert metadata.id.isidentifier()
        assert str(metadata.backend.backend_type).lower() == backend
        assert (str(metadata.name), metadata.version) == ("bitkern", 0)
        assert metadata.license == "Apache-2.0"


def test_imports(folder):
    """Imports are relative, or of the standard library, PyTorch, and the Triton it brings."""
    files = list(folder.rglob("*.py"))
    assert len(files) > 80
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
                assert ast.unparse(node.args[0]) in ("'triton'", "f'{__name__}.{kernel}'"), path
            elif isinstance(node, ast.Constant | ast.Attribute):
                assert not re.search(r"bitkern(::\w|\._C)|torch\.ops\.bit", ast.unparse(node)), path
            packages = {name.partition(".")[0] for name in names}
            assert packages <= {*sys.stdlib_module_names, "torch", "triton"}, path


def test_no_name_is_left_undefined(folder):
    python("-m", "ruff", "check", "--isolated", "--no-cache", "--select", "E9,F", folder)


def standardized(weight, eps=1e-10):
    var, mean = torch.var_mean(weight, (1, 2, 3), keepdim=True, correction=0)
    return (weight - mean) / (var + eps).sqrt()


PEERS = {
    "group_norm_act": lambda x, r, w, b, f: F.silu(F.group_norm(x, 2, w, b)),
    "add_group_norm_act": lambda x, r, w, b, f: (x + r, F.relu(F.group_norm(x + r, 2, w, b))),
    "group_norm_add_relu": lambda x, r, w, b, f: F.relu(F.group_norm(x, 2, w, b) + r),
    "weight_standardize": lambda x, r, w, b, f: standardized(f),
    "ws_conv2d": lambda x, r, w, b, f: F.conv2d(x, standardized(f), padding=1),
}


def results(function, dtype):
    """Return outputs and gradients of a function of the operators' inputs."""
    inputs = maps((2, 8, 5, 5)), maps((2, 8, 5, 5), seed=2), *affine(8), maps((4, 8, 3, 3), seed=3)
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    outs = function(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    sum((out * maps(out.shape, dtype, seed=4)).sum() for out in outs).backward()
    return [*outs, *(x.grad for x in inputs if x.grad is not None)]


def operators(folder):
    kernel = kernels.get_local_kernel(Path(folder))
    assert {*kernel.__all__} == {*OPERATORS.split(), "Choice", "explain", "layers", "use_backend"}
    choice = kernel.explain("group_norm_act", torch.ones(2, 4))
    assert choice == ("reference", "there are no kernels for cpu tensors")
    with pytest.raises(ValueError, match="expected one of auto, reference, triton, got 'cpu'"):
        kernel.use_backend("cpu").__enter__()
    ours = {
        "group_norm_act": lambda x, r, w, b, f: kernel.group_norm_act(x, 2, w, b, act="silu"),
        "add_group_norm_act": lambda x, r, w, b, f: kernel.add_group_norm_act(x, r, 2, w, b),
        "group_norm_add_relu": lambda x, r, w, b, f: kernel.group_norm_add_relu(x, r, 2, w, b),
        "weight_standardize": lambda x, r, w, b, f: kernel.weight_standardize(f),
        "ws_conv2d": lambda x, r, w, b, f: kernel.ws_conv2d(x, f, padding=1),
    }
    for name, peer in PEERS.items():
        exact, others = results(peer, torch.float64), results(peer, torch.float32)
        for backend in ("auto", "triton"):
            with kernel.use_backend(backend):
                each = zip(results(ours[name], torch.float32), others, exact, strict=True)
                for i, tensors in enumerate(each):
                    assert_accurate(*tensors, f"{name}, {backend}, {i}")


class Conv(nn.Conv2d):
    def forward(self, input):
        return self._conv_forward(input, standardized(self.weight), self.bias)


class Beside(nn.Sequential):
    """Runs layers side by side on the same input."""

    def forward(self, x):
        return [layer(x) for layer in self]


def network():
    from timm import layers
    from transformers import BitConfig
    from transformers.models.bit import modeling_bit as bit

    config = BitConfig(num_groups=2)
    net = Beside(
        Conv(8, 8, 3),
        nn.GroupNorm(2, 8),
        layers.StdConv2d(8, 8, 3, stride=2),
        layers.ScaledStdConv2d(8, 8, 3),
        layers.GroupNormAct(8, 2),
        layers.GroupNormAct(8, 2, act_layer=nn.Tanh),
        bit.WeightStandardizedConv2d(8, 8, 3, stride=2),
        bit.BitGroupNormActivation(config, 8),
        bit.BitGroupNormActivation(config, 8, apply_activation=False),
    )
    for norm in (module for module in net if isinstance(module, nn.GroupNorm)):
        norm.weight.data, norm.bias.data = affine(8)
    return net


def outcome(net, dtype):
    net = net.to(dtype)
    net.zero_grad()
    x = maps((2, 8, 5, 5), dtype).requires_grad_()
    outs = net(x)
    sum((y * maps(y.shape, dtype, seed=4)).sum() for y in outs).backward()
    return [*outs, x.grad, *(p.grad for p in net.parameters())]


def layer_names(layers):
    return {name for name, value in vars(layers).items() if getattr(value, "has_backward", None)}


def layers_of_a_network(folder):
    net = network()
    exact = outcome(copy.deepcopy(net), torch.float64)
    others = outcome(copy.deepcopy(net), torch.float32)
    mapping = {}
    for cls in {*map(type, net)}:
        name = "WSConv2d" if cls is Conv else cls.__name__
        kernels.replace_kernel_forward_from_hub(cls, name)
        mapping[name] = {"cpu": kernels.LocalLayerRepository(Path(folder), layer_name=name)}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        kernels.kernelize(net, mode=mode, device="cpu", use_fallback=False)
    kernel = kernels.get_local_kernel(Path(folder))
    public = {name for name in layer_names(kernel.layers) if not name.startswith("_")}
    assert public == {*mapping}
    for module in net:
        assert module.forward.__func__.__module__ == kernel.layers.__name__
    for backend in ("auto", "triton"):
        with kernel.use_backend(backend):
            for run in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
                for i, ours in enumerate(outcome(run, torch.float32)):
                    assert_accurate(ours, others[i], exact[i], f"{backend}, {i}")


class Activated(nn.GroupNorm):
    def forward(self, input):
        return super().forward(input).tanh()


def subclass_with_its_own_forward(folder):
    kernels.replace_kernel_forward_from_hub(nn.GroupNorm, "GroupNorm")
    layer = kernels.LocalLayerRepository(Path(folder), layer_name="GroupNorm")
    net = nn.Sequential(Activated(2, 8))
    with kernels.use_kernel_mapping({"GroupNorm": {"cpu": layer}}, inherit_mapping=False):
        kernels.kernelize(net, mode=kernels.Mode.TRAINING, device="cpu", use_fallback=False)
    with pytest.raises(TypeError, match="kernelize: Activated has a forward of its own"):
        net(torch.ones(2, 8, 3, 3))


def in_the_place_of_older_versions(folder):
    """Check that older versions of the library find the same kernel in their place."""
    kernel = kernels.get_local_kernel(Path(folder), backend="cpu")
    path = Path(folder) / "build/torch-cpu/bitkern/__init__.py"
    spec = importlib.util.spec_from_file_location("bitkern_of_an_old_version", path)
    old = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(old)
    assert old.__all__ == kernel.__all__
    assert all(getattr(old, name) is getattr(kernel, name) for name in old.__all__)


@pytest.mark.parametrize(
    "program",
    [operators, layers_of_a_network, subclass_with_its_own_forward, in_the_place_of_older_versions],
)
def test_without_bitkern(program, folder):
    alone(program, str(folder), TRITON_INTERPRET="1")


def two_builds(folder, other):
    """Check that each build computes its own result, also after the other is loaded."""
    x = torch.ones(1, 2, 4)
    first, second = (kernels.get_local_kernel(Path(path)) for path in (folder, other))
    assert first.__name__ != second.__name__
    with first.use_backend("triton"), second.use_backend("triton"):
        for kernel, y in ((first, 0.0), (second, 1.0), (first, 0.0)):
            norm = kernel.group_norm_act
            for run in (norm, torch.compile(norm, fullgraph=True, backend="aot_eager")):
                assert run(x, 1, act="none").unique().tolist() == [y]


def test_two_builds_in_a_process(folder, tmp_path):
    package = shutil.copytree(
        Path(importlib.util.find_spec("bitkern").origin).parent, tmp_path / "bitkern"
    )
    launcher = package / "backends/triton/group_norm_act.py"
    text, marker = launcher.read_text(), "        return out, y, mean, rstd\n    partial"
    assert marker in text
    launcher.write_text(text.replace(marker, marker.replace(" y,", " y + 1.0,")))
    other = assemble(tmp_path / "other", package)
    alone(two_builds, str(folder), str(other), TRITON_INTERPRET="1")


def test_the_card_names_what_there_is(folder):
    card = (folder / "README.md").read_text()
    tree = ast.parse((HERE / "torch-ext/bitkern/layers.py").read_text())
    layers = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    for name in (*OPERATORS.split(), *(name for name in layers if not name.startswith("_"))):
        assert f"`{name}`" in card
