"""What Python code reads, asks and does while torch.fx runs it, of which a graph says nothing."""

import contextlib
import functools
import inspect
import logging
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

MISSING = object()


class Unproven(Exception):
    """Why a module is left as it is, in a few words."""


class Read(NamedTuple):
    """A name that code has looked at: of a module, by its path, or of a class or a file."""

    of: str | Mapping[str, Any]
    name: str
    value: Any

    def holds(self, scope: Mapping[str, Any]) -> bool:
        value = scope.get(self.name, MISSING)
        return value is self.value or type(value) is type(self.value) and value == self.value


def simple(value: Any) -> bool:
    """Whether a value stays what it is, and can be compared."""
    if isinstance(value, tuple):
        return all(map(simple, value))
    kinds = bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format
    return value is None or value is MISSING or isinstance(value, kinds)


_DEFINED = (
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    type,
    property,
    classmethod,
    staticmethod,
    functools.partial,
    logging.Logger,
)


def lasting(value: Any) -> bool:
    """Whether a value cannot become another unseen: simple, or code."""
    return simple(value) or isinstance(value, _DEFINED) or type(value).__module__ == "typing"


# Whose code is not looked into, and reads what it likes.
_TRUSTED = frozenset({"torch", "bitkern", *sys.stdlib_module_names})
# What a graph does not hold: modes of PyTorch, by the names of builtins that set or ask them, and
# by the code of functions; what leaves a mark elsewhere.
_BUILTINS = frozenset(
    {
        "_set_grad_enabled",
        "set_autocast_enabled",
        "is_autocast_enabled",
        "get_autocast_dtype",
        "is_inference_mode_enabled",
        "apply",  # of torch.autograd.Function
    }
)
_MARKS = frozenset({"print", "warn", "write"})
_FUNCTIONS = {
    function.__code__: name
    for name, function in {
        "torch.autocast": torch.autocast.__enter__,
        "torch.inference_mode": torch.inference_mode.__enter__,
        "saved_tensors_hooks": torch.autograd.graph.saved_tensors_hooks.__enter__,
        "record_function": torch.autograd.profiler.record_function.__enter__,
    }.items()
}
_ASKED = {torch.compiler.is_compiling.__code__: "torch.compiler.is_compiling"}
_OF_ALL_PARTS = frozenset(
    ("parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "modules")
    + ("named_modules", "apply", "__dict__", "__class__")
)


def _foreign(scope: Mapping[str, Any]) -> bool:
    """Whether the globals are those of code that is looked into."""
    name = str(scope.get("__name__", ""))
    return name.split(".")[0] not in _TRUSTED and not name.startswith("namedtuple_")


class Watch:
    """Notes what code reads of modules, classes and files, and what it should not do."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.reads: dict[tuple[int, str], Read] = {}
        self.refusals: list[str] = []
        self._paths = {id(module): path for path, module in modules.items()}
        self._own = set(vars(nn.Module())) - {"training"}

    def look(self, module: nn.Module, name: str, caller: types.FrameType | None) -> None:
        """An attribute is looked up."""
        path = self._paths.get(id(module))
        if path is None or name in self._own or not (caller and _foreign(caller.f_globals)):
            return
        if name in _OF_ALL_PARTS:
            self.refusals.append(f"its forward looks at {name}")
        if name.startswith("__"):
            return
        held = object.__getattribute__(module, "__dict__").get(name, MISSING)
        self._note(path, name, held, self.reads)
        for base in type(module).__mro__:
            if base is nn.Module or held is not MISSING:
                return
            if name in vars(base):
                return self._note(vars(base), name, vars(base)[name], self.reads)

    def _note(self, of: Any, name: str, value: Any, reads: dict[tuple[int, str], Read]) -> None:
        if not lasting(value):
            self.refusals.append(f"its forward reads {name}, which may change unseen")
        key = of if isinstance(of, str) else id(of)
        reads[hash(key), name] = Read(of, name, value)

    def profile(self, frame: types.FrameType, event: str, arg: Any) -> None:
        """What sys.setprofile calls at every call."""
        if event == "c_call":
            name = getattr(arg, "__name__", "")
            if name in _BUILTINS or name in _MARKS and _foreign(frame.f_globals):
                self.refusals.append(f"its forward calls {name}")
        elif event == "call":
            code, caller = frame.f_code, frame.f_back
            if code in _FUNCTIONS:
                self.refusals.append(f"its forward uses {_FUNCTIONS[code]}")
            elif code in _ASKED and caller is not None and _foreign(caller.f_globals):
                self.refusals.append(f"its forward asks {_ASKED[code]}")
            elif _foreign(frame.f_globals):
                self._names(frame)

    def _names(self, frame: types.FrameType) -> None:
        """The globals and closures that a function names."""
        code, scope = frame.f_code, frame.f_globals
        for name in code.co_names:
            if name in scope:
                self._note(scope, name, scope[name], self.reads)
        for name in set(code.co_freevars) - {"__class__"}:
            value = frame.f_locals.get(name)
            if simple(value) or not lasting(value):
                self.refusals.append(f"its forward closes over {name}, which may change unseen")


_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def watching(modules: Mapping[str, nn.Module]) -> Iterator[Watch]:
    """Watch what this thread does with modules, by their paths."""
    watch, thread = Watch(modules), threading.get_ident()

    def getattribute(self: nn.Module, name: str) -> Any:
        if threading.get_ident() == thread:
            frame = inspect.currentframe()
            watch.look(self, name, frame.f_back if frame else None)
        return object.__getattribute__(self, name)

    with _one_at_a_time:
        before = sys.getprofile()
        nn.Module.__getattribute__ = getattribute  # type: ignore[assignment, method-assign]
        sys.setprofile(watch.profile)
        try:
            yield watch
        finally:
            sys.setprofile(before)
            del nn.Module.__getattribute__
