"""The choice of an implementation for an operator, and the reason for it.

``auto`` tries the backends for the tensors' device and uses the first that supports the call,
otherwise the reference. The launchers of all backends have the signatures of ``Launchers``.
"""

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch

from bitkern import _torch
from bitkern.backends.backend import Backend, Launchers
from bitkern.backends.cpu import Cpu
from bitkern.backends.cuda import Cuda
from bitkern.backends.reference import Reference
from bitkern.backends.triton import Triton

__all__ = ["Backend", "Choice", "Launchers", "choose", "choose_launchers", "explain", "launchers"]
__all__ += ["operator", "register", "requested", "unavailable", "use_backend"]

BACKENDS: dict[str, Backend] = {}
_auto: dict[str, list[Backend]] = {}  # by type of device, the newest first


def register(backend: Backend) -> None:
    """Make a backend known by its name; ``"auto"`` asks it before those that were there.

    Raises ValueError if the name is taken.
    """
    if backend.name in (*BACKENDS, "auto"):
        raise ValueError(f"backend: expected a new name, got {backend.name!r}")
    BACKENDS[backend.name] = backend
    for device in backend.auto:
        _auto.setdefault(device, []).insert(0, backend)


for _backend in (Reference(), Cpu(), Triton(), Cuda()):
    register(_backend)


class Choice(NamedTuple):
    """The implementation that serves a call: its name and the reason it was chosen."""

    name: str
    reason: str


class _Requested(threading.local):
    name: str | None = None  # by use_backend, in this thread
    anywhere = False  # use_backend was called: threads of autograd have to look it up


_requested = _Requested()
# Read once: os.environ costs 5 % of a small call.
_default = os.environ.get("BITKERN_BACKEND", "auto")


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source}: expected one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


def requested() -> str:
    """The backend asked for by ``use_backend`` or ``BITKERN_BACKEND``; else ``"auto"``."""
    name = _requested.name
    if name is None and _Requested.anywhere and not torch.compiler.is_compiling():
        name = _torch.carried_backend()  # into a thread of autograd
    return _checked(name or _default, "BITKERN_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators called inside the ``with`` block on the named implementation.

    ``"auto"`` picks the fastest that supports the tensors. Any other name is a demand: a call that
    it cannot serve raises ``RuntimeError`` with the reason, it never falls back in silence.

    It holds for the thread that enters it, and for the backward passes that this thread begins
    meanwhile, in whatever threads autograd runs them.
    """
    before, _requested.name = _requested.name, _checked(name, "use_backend")
    _carry(name)
    try:
        yield
    finally:
        _requested.name = before
        _carry(before)


def _carry(name: str | None) -> None:
    if not torch.compiler.is_compiling():
        _Requested.anywhere = True
        _torch.carry_backend(name)


@functools.cache
def unavailable(name: str) -> str | None:
    """Why no kernel of this backend can run in this process; None if they can."""
    return BACKENDS[name].unavailable()


@functools.cache
def launchers(name: str, kernel: str) -> Launchers:
    """The launchers of a backend for a kernel."""
    found: Launchers = BACKENDS[name].launchers(kernel)
    return found


@functools.cache
def _warn_unavailable(name: str, reason: str) -> None:
    # Of no file: a line of this package below it would say nothing.
    text = f"no kernels for the {name.upper()}: {reason}"
    warnings.warn_explicit(text, UserWarning, "bitkern", 1)


def _refusal(
    backend: Backend, kernel: str, device: str, tensors: tuple[torch.Tensor | None, ...]
) -> str | None:
    name = backend.name
    dtypes = backend.dtypes.get(kernel)
    if dtypes is None:
        return f"backend {name} has no kernel for {kernel}"
    if not backend.runs_on(device):
        return f"the {name} kernels do not run on {device} tensors"
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in dtypes:
            *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
            taken = f"{', '.join(most)} and {last}" if most else last
            return f"the {name} kernels take {taken}, not {tensor.dtype}"
    # The compiler cannot trace an import. The registered operator, which it calls, looks again.
    if torch.compiler.is_compiling():
        return "ONNX has no such operator" if torch.onnx.is_in_onnx_export() else None
    for tensor in tensors:
        if tensor is not None and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"the kernels read memory, which a {type(tensor).__name__} does not show"
    transform = _torch.active_transform()
    return f"{transform} cannot see into a kernel" if transform else unavailable(name)


def choose(kernel: str, *tensors: torch.Tensor | None) -> Choice:
    """The implementation that serves a kernel on these tensors, the first of which is there."""
    name = requested()
    if name == "reference":
        return Choice(name, "asked for")
    assert tensors[0] is not None
    device = tensors[0].device.type
    if name != "auto":
        refusal = _refusal(BACKENDS[name], kernel, device, tensors)
        if refusal is not None:
            raise RuntimeError(f"backend {name!r} was asked for, but {refusal}")
        return Choice(name, "asked for")
    refusals = []
    for backend in _auto.get(device, ()):
        refusal = _refusal(backend, kernel, device, tensors)
        if refusal is None:
            return Choice(backend.name, f"the {backend.name} kernels serve {device} tensors")
        if backend.expected and not torch.compiler.is_compiling():
            if refusal == unavailable(backend.name):
                _warn_unavailable(backend.name, refusal)
        refusals.append(refusal)
    reason = "; ".join(refusals) or f"there are no kernels for {device} tensors"
    return Choice("reference", reason)


def choose_launchers(kernel: str, *tensors: torch.Tensor | None) -> Launchers:
    """The launchers of the implementation that serves a kernel on these tensors."""
    return launchers(choose(kernel, *tensors).name, kernel)


class Operator(NamedTuple):
    """The kernel behind a public operator, and which of its tensors that one depends on."""

    kernel: str
    tensors: slice


OPERATORS: dict[str, Operator] = {}
_Function = TypeVar("_Function", bound=Callable[..., Any])


def operator(kernel: str, tensors: slice = slice(None)) -> Callable[[_Function], _Function]:
    """Make a public operator known to ``explain`` by its name."""

    def register(function: _Function) -> _Function:
        OPERATORS[function.__name__] = Operator(kernel, tensors)
        return function

    return register


def explain(op_name: str, *tensors: torch.Tensor | None) -> Choice:
    """The ``Choice`` of a public operator for these tensors; see ``bitkern.explain``."""
    if op_name not in OPERATORS:
        raise ValueError(f"op_name: expected one of {', '.join(OPERATORS)}, got {op_name!r}")
    if not tensors:
        raise ValueError(f"explain({op_name!r}): expected the operator's tensors, got none")
    operator = OPERATORS[op_name]
    return choose(operator.kernel, *(tensors[operator.tensors] or tensors))
