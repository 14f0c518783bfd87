"""What a module's forward does with its parts, as torch.fx sees it, and what that depends on.

torch.fx runs the Python code once on symbols and records what happens to them: one path through
it. Which path depends on what the code reads besides: the mode, whether gradients are recorded,
which arguments are there, attributes, globals. A trace says all it has read, so that it is taken
again only where it would be the same; what cannot be watched makes it fail.
"""

import copy
import functools
import inspect
import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from bitkern import _torch
from bitkern.convert.watching import Read, Unproven, simple, watching

Forward = Callable[..., Any]


class Case(NamedTuple):
    """What decides which way a forward takes, besides what it reads."""

    training: bool
    grad: bool
    tensors: tuple[bool, ...]  # which parameters are tensors; others have their default or None


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
        if not all(map(simple, defaults)):
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
            is_tensor = _torch.plain_tensor(value)
            if is_tensor:
                tensors.append(value)
            elif type(value) is not type(constant) or value != constant:
                return None
            which.append(is_tensor)
        return tuple(which), tensors


class _Tracer(fx.Tracer):
    """Records the calls of all modules but those ``through`` which it looks."""

    proxy_buffer_attributes = True  # a flag in a buffer is not looked at once and for all

    def __init__(self, through: Sequence[nn.Module], arguments: dict[str, Any]) -> None:
        super().__init__()
        self._through, self._arguments = through, arguments
        self.refusals: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return all(m is not module for module in self._through)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        return original_forward(m)(m, *args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refusals.append("its forward decides by its input")  # also if it catches the error
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Any:
        try:
            return super().iter(obj)
        except Exception:
            self.refusals.append("its forward iterates over its input")  # as above
            raise

    def create_args_for_root(self, *_: Any, **__: Any) -> Any:
        block, forward = self.root, original_forward(self.root)

        def call() -> Any:
            given = {
                name: self.create_proxy("placeholder", name, (), {}) if value is Tensor else value
                for name, value in self._arguments.items()
            }
            return forward(block, **given)

        return call, []


class Untraced(Unproven):
    """What a module does cannot be told, not merely not be fused."""


def original(module: nn.Module) -> Any:
    """The class of a module, as its author wrote it."""
    return getattr(type(module), "bitkern_original", type(module))


def original_forward(module: nn.Module) -> Forward:
    """The forward of that."""
    forward: Forward = original(module).forward
    return forward


def trace(twin: nn.Module, through: Sequence[str], parameters: Parameters, case: Case) -> Trace:
    """What a module does in a case, told by a copy of it, seen through these of its parts.

    Raises Unproven; the copy may then be spoiled.
    """
    named = zip(parameters.names, parameters.constants, case.tensors, strict=True)
    arguments = {name: Tensor if tensor else constant for name, constant, tensor in named}
    paths = dict(twin.named_modules())
    parts = list(paths.values())
    for part in parts:
        vars(part)["training"] = case.training
    tracer = _Tracer((twin, *(twin.get_submodule(path) for path in through)), arguments)
    states, before = _random_states(), [_attributes(part) for part in parts]
    try:
        with torch.set_grad_enabled(case.grad), watching(paths) as watch:
            graph = tracer.trace(twin)
    # Whatever Python code raises when it meets a symbol.
    except Exception as error:
        (line, *_) = (*tracer.refusals, *str(error).splitlines(), type(error).__name__)
        raise Untraced(f"torch.fx cannot follow its forward ({line.rstrip('.')})") from error
    finally:
        changed = [_changed(*each) for each in zip(parts, before, strict=True)]
        rolled = _random_states()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
    for name in filter(None, changed):
        raise Unproven(f"its forward changes {name}")
    for refusal in (*tracer.refusals, *watch.refusals):
        raise Untraced(refusal)
    if _told(states) != _told(rolled):
        raise Unproven("its forward draws random numbers")
    own = (Read(vars(base), "forward", vars(base)["forward"]) for base in _authors(paths, through))
    return Trace(graph, (*watch.reads.values(), *own))


def _authors(paths: Mapping[str, nn.Module], through: Sequence[str]) -> Iterator[type]:
    """The classes that wrote the forwards."""
    for path in ("", *through):
        mro = original(paths[path]).__mro__
        yield next(base for base in mro if "forward" in vars(base))


def _random_states() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _told(states: tuple[Any, Any, Tensor]) -> tuple[Any, ...]:
    python, (_, keys, position, *_), own = states
    return python, np.asarray(keys).tobytes(), position, own.numpy().tobytes()


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """What a module holds, and what the containers among that hold."""
    return {
        name: (value, copy.copy(value) if isinstance(value, list | dict | set) else None)
        for name, value in vars(module).items()
    }


def _changed(module: nn.Module, before: dict[str, tuple[Any, Any]]) -> str | None:
    """The name of an attribute that is another than before."""
    now = vars(module)
    for name in now.keys() ^ before.keys():
        return name
    for name, (value, held) in before.items():
        if now[name] is not value or held is not None and not _same(value, held):
            return name
    return None


def _same(a: Any, b: Any) -> bool:
    """Whether containers hold the same things."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    return a == b if isinstance(a, set) else list(map(id, a)) == list(map(id, b))


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
