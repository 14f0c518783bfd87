"""Whether a function does what a block does: results and gradients on random input, in float64."""

import contextlib
import copy
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitkern import _torch
from bitkern.convert.tracing import Case, Forward, Parameters, original_forward
from bitkern.convert.watching import Unproven

SIZES = 8, 16, 32  # pixels of the images tried, one after the other: some networks want large ones
BATCH = 2
IN_FLOAT64: dict[str, Any] = {"device": "cpu", "dtype": torch.float64}
LARGEST = 200_000_000  # parameters of a copy
TOLERANCE = 1e-9  # relative; rounding of float64 in some thousand operations
_CHANNELS = "in_channels", "num_channels", "num_features"
_DIMENSIONS = (
    *((cls, 1) for cls in (nn.Conv1d, nn.ConvTranspose1d, nn.InstanceNorm1d)),
    *((cls, 3) for cls in (nn.Conv3d, nn.ConvTranspose3d, nn.InstanceNorm3d)),
)


class Deceived(Unproven):
    """What torch.fx has seen of a module is not what it does."""


def in_float64(module: nn.Module) -> nn.Module:
    """A copy on the CPU, in float64, without hooks; of meta tensors with values yet to be given."""
    twin = copy.deepcopy(module)
    if any(t.is_meta for t in (*twin.parameters(), *twin.buffers())):
        twin.to_empty(device="cpu")
    twin.to(**IN_FLOAT64)
    for part in twin.modules():
        _torch.drop_hooks(part)
    return twin


def twin_of(block: nn.Module) -> nn.Module:
    """A copy to trace and to compare with: on the CPU, in float64, with random parameters, without
    hooks."""
    try:
        elements = sum(parameter.numel() for parameter in block.parameters())
        if elements > LARGEST:
            raise Unproven(f"a copy to compare with would have {elements} parameters")
        twin = in_float64(block)
        _randomize(twin)
    except Unproven:
        raise
    except Exception as error:  # of whatever the parts are
        raise Unproven("it cannot be copied, to be compared with") from error
    return twin


def prove(
    twin: nn.Module, graph: fx.Graph, parameters: Parameters, case: Case, function: Forward
) -> None:
    """Raise Unproven unless a function of a graph agrees in a case with a block, as its twin is."""
    for part in twin.modules():
        vars(part)["training"] = case.training
    try:
        with one_thread():
            _prove(twin, graph, parameters, case, function)
    except Unproven:
        raise
    except Exception as error:  # of a function that does something else
        raise Deceived(f"what torch.fx traced fails ({error})") from error


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For work in which threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _prove(
    twin: nn.Module, graph: fx.Graph, parameters: Parameters, case: Case, function: Forward
) -> None:
    error: Exception | None = None
    for size in SIZES:
        inputs = _inputs(graph, twin, size)
        arguments = iter(inputs)
        given = zip(parameters.names, parameters.constants, case.tensors, strict=True)
        kwargs = {name: next(arguments) if has else const for name, const, has in given}
        try:
            theirs = functools.partial(original_forward(twin), twin, **kwargs)
            expected = _run(theirs, twin, inputs, case)
        except Exception as failure:  # of any kind, since the shapes are guessed
            error = failure
            continue
        ours = functools.partial(function, twin, *inputs)
        _compare(_run(ours, twin, inputs, case), expected)
        return
    raise Unproven(f"it takes no random input to be compared with ({error})")


def _randomize(twin: nn.Module) -> None:
    """Parameters that leave nothing out: none is 0 or 1, filters keep the scale of what passes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            fan = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 1
            scale = 1 / math.sqrt(max(fan, 1))
            parameter.uniform_(-2 * scale, 2 * scale, generator=generator)


def _inputs(graph: fx.Graph, block: nn.Module, size: int) -> list[Tensor]:
    modules = dict(block.named_modules(remove_duplicate=False))
    generator = torch.Generator().manual_seed(1)
    shapes: list[tuple[int, ...]] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            shape = next(_shapes(node, modules, size), None)
            shapes.append(shape or (shapes[0] if shapes else (BATCH, 8, size, size)))
    return [
        torch.randn(shape, generator=generator, **IN_FLOAT64, requires_grad=True)
        for shape in shapes
    ]


def _shapes(node: fx.Node, modules: dict[str, nn.Module], size: int) -> Iterator[tuple[int, ...]]:
    """What the modules at which a symbol arrives first would take."""
    seen, queue = {node}, [node]
    while queue:
        for user in queue.pop(0).users:
            called = [user] if user.op == "call_module" else user.all_input_nodes
            paths = [str(node.target) for node in called if node.op in ("call_module", "get_attr")]
            parts = (p for path in paths if path in modules for p in modules[path].modules())
            yield from filter(None, (_shape(part, size, modules) for part in parts))
            if user not in seen:
                seen.add(user)
                queue.append(user)


def _shape(part: Any, size: int, modules: dict[str, nn.Module]) -> tuple[int, ...] | None:
    if isinstance(part, nn.Linear):
        return BATCH, part.in_features
    channels = next((vars(part)[n] for n in _CHANNELS if n in vars(part)), None)
    if not isinstance(channels, int):
        return None
    of = (part, *modules.values())
    dimensions = next((n for m in of for cls, n in _DIMENSIONS if isinstance(m, cls)), 2)
    return BATCH, channels, *[size] * dimensions


def _run(call: Any, twin: nn.Module, inputs: Sequence[Tensor], case: Case) -> list[Any]:
    """The kinds of results, these, and the gradients of inputs and parameters if recorded."""
    state = copy.deepcopy(twin.state_dict())  # running statistics move
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(case.grad):
        torch.manual_seed(2)
        value = call()
        results = list(_tensors(value))
        found: list[Any] = [*results]
        used = [r for r in results if r.requires_grad]
        if case.grad and used:
            leaves = [*inputs, *(p for p in twin.parameters() if p.requires_grad)]
            weights = [torch.randn_like(r) for r in used]
            found += torch.autograd.grad(used, leaves, weights, allow_unused=True)
    found += twin.buffers()
    found = [t if t is None else t.detach().clone() for t in found]
    twin.load_state_dict(state)
    return [_kinds(value), *found]


def _kinds(value: Any) -> Any:
    """The types of what a forward returns, and whether it has a history."""
    if isinstance(value, Tensor):
        return Tensor, value.requires_grad
    if isinstance(value, list | tuple):
        return type(value), [_kinds(item) for item in value]
    return type(value), [(k, _kinds(v)) for k, v in value.items()] if value is not None else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif value is not None:
        raise Unproven(f"its forward returns {type(value).__name__}")


def _compare(found: list[Any], expected: list[Any]) -> None:
    (kinds, *found), (expected_kinds, *expected) = found, expected
    if kinds != expected_kinds or len(found) != len(expected):
        raise Deceived("what torch.fx traced returns something else than its forward")
    norms = [float(t.norm()) for t in expected if t is not None and t.is_floating_point()]
    if not all(map(math.isfinite, norms)):
        raise Unproven("its results on random input are not finite")
    allowed = TOLERANCE * max(norms, default=0.0)  # a gradient may be 0 but for rounding
    for ours, theirs in zip(found, expected, strict=True):
        if ours is None or theirs is None:
            same = ours is theirs
        elif theirs.is_floating_point():
            same = ours.shape == theirs.shape and float((ours - theirs).norm()) <= allowed
        else:
            same = torch.equal(ours, theirs)
        if not same:
            raise Deceived("what torch.fx traced is not what its forward does")
