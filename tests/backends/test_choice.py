"""The choice of an implementation, and the words for it."""

import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import bitkern
from bitkern import backends, ops
from bitkern.backends import triton
from tests.process import python


def printed(code, **env):
    return python("-c", code, **env).stdout.strip()


def test_use_backend_nests_and_restores():
    assert backends.requested() == "auto"
    with bitkern.use_backend("reference"):
        with bitkern.use_backend("auto"):
            assert backends.requested() == "auto"
        assert backends.requested() == "reference"
    assert backends.requested() == "auto"


def test_names_keep_their_references():
    """PyTorch 2.11 takes one whenever a name is handed to it."""
    name = "".join(("refer", "ence"))
    before = sys.getrefcount(name)
    for _ in range(10):
        with bitkern.use_backend(name):
            pass
    assert sys.getrefcount(name) >= before


def test_unknown_names():
    with pytest.raises(ValueError, match="use_backend: expected one of auto, .* got 'gpu'"):
        with bitkern.use_backend("gpu"):
            pass
    with pytest.raises(ValueError, match="op_name: expected one of .* got 'conv'"):
        bitkern.explain("conv", torch.ones(1))
    with pytest.raises(ValueError, match="expected the operator's tensors, got none"):
        bitkern.explain("group_norm_act")


def test_explain():
    x = torch.ones(1, 8, 2, 2)
    with bitkern.use_backend("reference"):
        assert bitkern.explain("group_norm_act", x) == ("reference", "asked for")
    choice = bitkern.explain("group_norm_act", x.double())
    assert choice.name == "reference"
    assert "not torch.float64" in choice.reason or "did not load" in choice.reason
    assert bitkern.explain("group_norm_act", x.to("meta")) == (
        "reference",
        "there are no kernels for meta tensors",
    )


def test_a_demand_that_cannot_be_met_is_an_error():
    with bitkern.use_backend("triton"):
        with pytest.raises(RuntimeError, match="backend 'triton' was asked for, but"):
            ops.group_norm_act(torch.ones(1, 8, 2, 2, dtype=torch.float64), 4)
    with bitkern.use_backend("cuda"):
        with pytest.raises(RuntimeError, match="the cuda kernels do not run on cpu tensors"):
            ops.weight_standardize(torch.ones(2, 8))


TOY = """
import types

import torch
from bitkern import backends, create_model, explain, ops, reference, use_backend


class Toy(backends.Backend):
    name, devices, auto = "toy", ("cpu",), ("cpu",)
    dtypes = {"group_norm_act": (torch.float32,)}
    calls = 0

    def launchers(self, kernel):
        assert kernel == "group_norm_act"
        def forward(*arguments):
            Toy.calls += 1
            return reference.group_norm_act_forward(*arguments)
        backward = reference.group_norm_act_backward
        return types.SimpleNamespace(
            group_norm_act_forward=forward, group_norm_act_backward=backward
        )


x = torch.randn(2, 8, 3, 3, requires_grad=True)
bare = explain("weight_standardize", x)
backends.register(Toy())
for name in ("auto", "toy"):
    with use_backend(name):
        y = ops.group_norm_act(x, 4)
        y.sum().backward()
        print(*explain("group_norm_act", x), sep=": ")
assert Toy.calls == 2
torch.testing.assert_close(y, reference.group_norm_act(x, 4))
print(*explain("group_norm_act", x.double()), sep=": ")
print(explain("weight_standardize", x).name == bare.name)
args = x, x, 4
torch.testing.assert_close(ops.group_norm_add_relu(*args), reference.group_norm_add_relu(*args))
print(explain("group_norm_add_relu", x, x).name == bare.name)
try:
    with use_backend("toy"):
        ops.group_norm_add_relu(*args)
except RuntimeError as error:
    print(error)
before = Toy.calls
model = create_model("R26x0.5", num_classes=3)
torch.compile(model, backend="aot_eager")(torch.randn(1, 3, 32, 32)).sum().backward()
model(torch.randn(1, 3, 32, 32)).sum().backward()
assert Toy.calls >= before + 2 * 25  # the norms of eight blocks, and the last
try:
    backends.register(Toy())
except ValueError as error:
    print(error)
"""


def test_a_backend_from_outside_in_one_file():
    assert printed(TOY).splitlines() == [
        "toy: the toy kernels serve cpu tensors",
        "toy: asked for",
        "reference: the toy kernels take float32, not torch.float64; the cpu kernels take float32, "
        "bfloat16 and float16, not torch.float64",
        "True",
        "True",
        "backend 'toy' was asked for, but backend toy has no kernel for group_norm_add_relu",
        "backend: expected a new name, got 'toy'",
    ]


def test_environment():
    code = "from bitkern import backends; print(backends.requested())"
    assert printed(code, BITKERN_BACKEND="reference") == "reference"
    code = (
        "from bitkern import backends\n"
        "try: backends.requested()\n"
        "except ValueError as error: print(error)"
    )
    assert "BITKERN_BACKEND: expected one of auto" in printed(code, BITKERN_BACKEND="gpu")


def test_import_is_light():
    """Nothing heavy is imported before it is needed."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import bitkern, bitkern.nn\n"
        "heavy = ('triton', 'torchvision', 'matplotlib', 'sklearn', 'PIL', 'bitkern._C',\n"
        "         'torch._dynamo', 'bitkern.models', 'bitkern.transfer')\n"
        "print([m for m in heavy if m in set(sys.modules) - before])"
    )
    assert printed(code) == "[]"


def test_works_without_extension_and_triton():
    """Every operator runs, on the reference, and info says why."""
    code = (
        "import sys\n"
        "sys.modules['bitkern._C'] = sys.modules['triton'] = None\n"
        "import torch, bitkern\n"
        "from bitkern.cli.info import report\n"
        "x = torch.randn(2, 8, 4, 4, requires_grad=True)\n"
        "y = bitkern.ops.group_norm_act(x, 4)\n"
        "bitkern.ops.ws_conv2d(y, torch.randn(3, 8, 1, 1)).sum().backward()\n"
        "print(bitkern.explain('weight_standardize', torch.ones(2, 2)).reason)\n"
        "print(report())"
    )
    out = printed(code)
    assert "the compiled extension bitkern._C was not built" in out.splitlines()[0]
    assert "triton did not load" in out
    assert out.count("reference") >= 4


def test_info_names_every_operator():
    from bitkern.cli.info import collect

    rows = collect()["operators"]
    assert {r["operator"] for r in rows} == set(backends.OPERATORS)
    assert all(r["reason"] for r in rows)


class _Nested(torch.autograd.Function):
    """Nests backward passes so deeply that autograd continues in another thread."""

    @staticmethod
    def forward(ctx, x, depth, seen):
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append((threading.get_ident(), backends.requested()))
        if ctx.depth:
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                _Nested.apply(x, ctx.depth - 1, ctx.seen).sum().backward()
        return grad, None, None


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_use_backend_holds_in_the_threads_of_backward(name):
    """A GPU's backward pass runs in another thread; with checkpoints so do forward passes."""
    seen = []
    with bitkern.use_backend(name):
        _Nested.apply(torch.ones(1, requires_grad=True), 70, seen).sum().backward()
    assert {asked for _, asked in seen} == {name}
    assert len({thread for thread, _ in seen}) > 1
    with bitkern.use_backend("reference"):
        pass
    seen.clear()
    _Nested.apply(torch.ones(1, requires_grad=True), 70, seen).sum().backward()
    assert {asked for _, asked in seen} == {"auto"}


def test_triton_that_does_not_start_says_why(monkeypatch):
    """Triton needs a C compiler when it first talks to a GPU."""

    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler")

    fake = SimpleNamespace(runtime=SimpleNamespace(driver=Driver()))
    monkeypatch.setattr(triton, "load", lambda: (fake, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = backends.BACKENDS["triton"].unavailable()
    assert reason == "triton did not start (Failed to find C compiler)"
