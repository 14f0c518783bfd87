"""What a module's forward does with its parts, as torch.fx sees it, and what that depends on.

torch.fx runs the Python code once on symbols and records what happens to them: one path through
it. Which path depends on what the code reads besides: the mode, whether gradients are recorded,
which arguments are there, attributes. A trace says all it has read, so that it is taken again only
where it would be the same; what cannot be watched makes it fail.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import operator
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from bitkern import _torch

MISSING = object()
Forward = Callable[..., Any]


class Unproven(Exception):
    """Why a module is left as it is, in a few words."""


class Deceived(Unproven):
    """What torch.fx has seen of a module is not what it does."""


class Case(NamedTuple):
    """What decides which way a forward takes, besides what it reads."""

    training: bool
    grad: bool
    tensors: tuple[bool, ...]  # which parameters are tensors; the others have their constants


class Read(NamedTuple):
    """A name that a forward has looked at: of a module, by its path, or of a file's globals."""

    of: str | dict[str, Any]
    name: str
    value: Any

    def holds(self, scope: dict[str, Any]) -> bool:
        value = scope.get(self.name, MISSING)
        return value is self.value or type(value) is type(self.value) and value == self.value


class Trace(NamedTuple):
    """A graph, and what it depends on."""

    graph: fx.Graph
    reads: tuple[Read, ...]


class Parameters:
    """The parameters of a forward, apart from self and from variadic ones, which stay empty."""

    def __init__(self, forward: Forward) -> None:
        _, *parameters = inspect.signature(forward).parameters.values()
        variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        named = [p for p in parameters if p.kind not in variadic]
        if any(p.kind is inspect.Parameter.POSITIONAL_ONLY for p in named):
            raise Unproven("its forward has positional-only parameters")
        self.names = tuple(p.name for p in named)
        defaults = [None if p.default is inspect.Parameter.empty else p.default for p in named]
        self.constants = tuple(defaults)
        self.positional = sum(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in named)
        if not named or sum(default is None for default in defaults) > 5:
            raise Unproven("its forward has no parameters, or too many to try all cases")
        if not all(map(_simple, defaults)):
            raise Unproven("its forward has defaults that cannot be compared")

    def cases(self) -> Iterator[tuple[bool, ...]]:
        """Which may be tensors: the first is, those without default or with None may be."""
        choices = [(True, False) if constant is None else (False,) for constant in self.constants]
        choices[0] = (True,)
        found: list[tuple[bool, ...]] = [()]
        for options in choices:
            found = [(*some, option) for some in found for option in options]
        yield from found

    def bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[bool, ...], list[Tensor]] | None:
        """Which parameters are tensors, and those; None for a call that no case is of."""
        if len(args) > self.positional or not kwargs.keys() <= set(self.names[len(args) :]):
            return None
        which: list[bool] = []
        tensors: list[Any] = []
        for i, (name, constant) in enumerate(zip(self.names, self.constants, strict=True)):
            value = args[i] if i < len(args) else kwargs.get(name, constant)
            is_tensor = isinstance(value, Tensor)
            if is_tensor:
                tensors.append(value)
            elif type(value) is not type(constant) or value != constant:
                return None
            which.append(is_tensor)
        return tuple(which), tensors


def _simple(value: Any) -> bool:
    """Whether a value stays what it is, and can be compared."""
    if isinstance(value, tuple):
        return all(map(_simple, value))
    kinds = bool, int, float, str, torch.dtype, torch.device, torch.memory_format
    return value is None or isinstance(value, kinds)


class _Tracer(fx.Tracer):
    """Records the calls of all modules but those ``through`` which it looks."""

    def __init__(self, through: Sequence[nn.Module], arguments: dict[str, Any]) -> None:
        super().__init__()
        self._through, self._arguments = through, arguments

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return all(m is not module for module in self._through)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        return original_forward(m)(m, *args, **kwargs)

    def create_args_for_root(self, *_: Any, **__: Any) -> Any:
        block, forward = self.root, original_forward(self.root)

        def call() -> Any:
            given = {
                name: self.create_proxy("placeholder", name, (), {}) if value is Tensor else value
                for name, value in self._arguments.items()
            }
            return forward(block, **given)

        return call, []


def original(module: nn.Module) -> Any:
    """The class of a module, as its author wrote it."""
    return getattr(type(module), "original", type(module))


def original_forward(module: nn.Module) -> Forward:
    """The forward of that."""
    forward: Forward = original(module).forward
    return forward


def trace(
    block: nn.Module, through: Sequence[nn.Module], parameters: Parameters, case: Case
) -> Trace:
    """What ``block`` does in a case, seen through these modules in it. Raises Unproven."""
    named = zip(parameters.names, parameters.constants, case.tensors, strict=True)
    arguments = {name: Tensor if tensor else constant for name, constant, tensor in named}
    paths = dict(block.named_modules())
    parts = list(paths.values())
    states, before = _random_states(), [_attributes(part) for part in parts]
    try:
        with torch.set_grad_enabled(case.grad), _in_mode(parts, case.training):
            with _reads_of(paths) as reads, _only_what_is_recorded():
                graph = _Tracer((block, *through), arguments).trace(block)
    # Whatever Python code raises when it meets a symbol.
    except Exception as error:
        (line, *_) = str(error).splitlines() or [""]
        raise Unproven(f"torch.fx cannot follow its forward ({line.rstrip('.')})") from error
    finally:
        changed = [_restore(*each) for each in zip(parts, before, strict=True)]
    if any(changed):
        raise Unproven(f"its forward changes {next(filter(None, changed))}")
    if states != _random_states():
        raise Unproven("its forward draws random numbers")
    used = [read for read in reads if not isinstance(read.value, nn.Module)]
    for read in used:
        if read.value is not MISSING and not (_simple(read.value) or callable(read.value)):
            raise Unproven(f"its forward reads {read.name}, which may change unseen")
    seen = (_globals_of(original(module)) for module in (block, *through))
    return Trace(graph, (*used, *itertools.chain.from_iterable(seen)))


def _globals_of(cls: type) -> Iterator[Read]:
    """The settings in the files of a class's methods that these methods name."""
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for method in map(inspect.unwrap, filter(callable, vars(base).values())):
            scope = getattr(method, "__globals__", {})
            for name in getattr(getattr(method, "__code__", None), "co_names", ()):
                if name in scope and _simple(scope[name]):
                    yield Read(scope, name, scope[name])


def _random_states() -> tuple[Any, ...]:
    _, keys, position, *_ = np.random.get_state()
    torch_state = torch.get_rng_state().numpy().tobytes()
    return random.getstate(), np.asarray(keys).tobytes(), position, torch_state


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """What a module holds, and what the containers among that hold."""
    return {
        name: (value, copy.copy(value) if isinstance(value, list | dict | set) else None)
        for name, value in vars(module).items()
        if name != "training"
    }


def _restore(module: nn.Module, before: dict[str, tuple[Any, Any]]) -> str | None:
    """Undo what has been done to a module's attributes; the name of one that had changed."""
    now, changed = vars(module), None
    for name in now.keys() - before.keys() - {"training"}:
        changed = name
        del now[name]
    for name, (value, held) in before.items():
        if now.get(name, MISSING) is not value:
            changed, now[name] = name, value
        if isinstance(value, list | set | dict) and not _same(value, held):
            changed = name
            value.clear()
            value.extend(held) if isinstance(value, list) else value.update(held)
    return changed


def _same(a: Any, b: Any) -> bool:
    """Whether containers hold the same things."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    return a == b if isinstance(a, set) else list(map(id, a)) == list(map(id, b))


@contextlib.contextmanager
def _in_mode(parts: Sequence[nn.Module], training: bool) -> Iterator[None]:
    modes = [part.training for part in parts]
    try:
        for part in parts:
            part.training = training
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode


@contextlib.contextmanager
def _reads_of(paths: dict[str, nn.Module]) -> Iterator[list[Read]]:
    """Note which attributes of these modules Python code looks at."""
    reads: dict[tuple[int, str], Read] = {}
    known = {id(part): path for path, part in paths.items()}
    own = set(vars(nn.Module())) - {"training"}

    def look(self: nn.Module, name: str) -> Any:
        if id(self) in known and name not in own and not name.startswith("__"):
            held = object.__getattribute__(self, "__dict__").get(name, MISSING)
            if held is not MISSING or not hasattr(type(self), name):
                reads[id(self), name] = Read(known[id(self)], name, held)
        return object.__getattribute__(self, name)

    noted: list[Read] = []
    with _replaced(nn.Module, "__getattribute__", look):
        yield noted
    noted.extend(reads.values())


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name, MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if own is MISSING else setattr(owner, name, own)


@contextlib.contextmanager
def _only_what_is_recorded() -> Iterator[None]:
    """Fail where code asks or sets what a graph does not hold."""

    def refuse(what: str, *_: Any, **__: Any) -> Any:
        raise Unproven(f"it uses {what}")

    asked = (
        (torch.autocast, "__enter__"),
        (torch, "is_autocast_enabled"),
        (torch, "set_grad_enabled"),
    )
    with contextlib.ExitStack() as stack:
        for owner, name in asked:
            refusal = functools.partial(refuse, f"{owner.__name__}.{name}")
            stack.enter_context(_replaced(owner, name, refusal))
        yield


def structure(modules: Sequence[nn.Module]) -> tuple[Any, ...]:
    """Which modules and parameters these have."""
    return tuple(
        (tuple(_torch.children(module).items()), _torch.tensors_present(module))
        for module in modules
    )


def source_of(graph: fx.Graph) -> Any:
    """Python code, ``src`` and its ``globals``, that does what a graph says."""
    return graph.python_code(root_module="self")


def function_of(source: Any) -> Forward:
    """``function(block, *tensors)`` of such code; it calls the block's parts."""
    return _function(source.src, tuple(sorted(source.globals.items(), key=operator.itemgetter(0))))


@functools.cache  # torch.compile takes functions for the same if they are
def _function(src: str, names: tuple[tuple[str, Any], ...]) -> Forward:
    scope = dict(names)
    exec(compile(src, f"<{__name__}>", "exec"), scope)
    function: Forward = scope["forward"]
    return function
