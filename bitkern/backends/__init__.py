"""Which implementation of an operator runs, and the reason why.

An implementation is a module that holds an operator's launchers, ``<operator>_forward`` and
``<operator>_backward``, and ``<operator>_recompute`` where a node of autograd computes an output
again; those of all implementations have the same signatures. What no kernel serves, the reference
does.
"""

import contextlib
import functools
import importlib
import os
import threading
from typing import NamedTuple

import torch

NAMES = ("auto", "reference", "cpu", "triton", "cuda")


class Choice(NamedTuple):
    """The implementation that serves a call: its name and the reason it was chosen."""

    name: str
    reason: str


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


class _Requested(threading.local):
    # Read once: at each call it was a twentieth of a small one.
    name = os.environ.get("BITKERN_BACKEND", "auto")


_requested = _Requested()


def requested() -> str:
    """The backend asked for by :func:`use_backend` or ``BITKERN_BACKEND``; else ``"auto"``."""
    return _checked(_requested.name, "BITKERN_BACKEND")


@contextlib.contextmanager
def use_backend(name: str):
    """Run the operators called inside the ``with`` block on the named implementation.

    ``"auto"`` picks the fastest that supports the tensors. Any other name is a demand: a call that
    it cannot serve raises ``RuntimeError`` with the reason, it never falls back in silence.
    """
    before, _requested.name = _requested.name, _checked(name, "use_backend")
    try:
        yield
    finally:
        _requested.name = before


@functools.cache
def extension():
    """The compiled extension ``bitkern._C`` and None, or None and the reason it is missing."""
    try:
        return importlib.import_module("bitkern._C"), None
    except ImportError as error:
        return None, f"the compiled extension bitkern._C did not load ({error})"


@functools.cache
def triton():
    """Triton and None, or None and the reason it is missing."""
    try:
        return importlib.import_module("triton"), None
    except ImportError as error:
        return None, f"triton did not load ({error})"


# Which operators a backend has kernels for, and which backend "auto" takes on a device.
_KERNELS = {
    "cpu": ("group_norm_act", "weight_standardize"),
    "triton": ("group_norm_act", "weight_standardize"),
    "cuda": ("weight_standardize",),
}
_AUTO = {"cpu": "cpu", "cuda": "triton"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The kernel behind each public operator.
OPERATORS = {
    "weight_standardize": "weight_standardize",
    "group_norm_act": "group_norm_act",
    "add_group_norm_act": "group_norm_act",
    "ws_conv2d": "weight_standardize",
}


@functools.cache
def unavailable(name: str) -> str | None:
    """Why no kernel of this backend can run in this process; None if they can."""
    if name == "triton":
        return triton()[1]
    module, reason = extension()
    if module is not None and name == "cuda" and not module.with_cuda:
        return "the compiled extension was built without CUDA"
    return reason


def transformed() -> str | None:
    """What transforms or records PyTorch's operators right now, and sees no kernel; else None."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    for name in ("FAKE", "PROXY"):
        mode = torch._C._get_dispatch_mode(getattr(torch._C._TorchDispatchModeKey, name))
        if mode is not None:
            return type(mode).__name__
    return None


def _runs_on(name: str, device: str) -> bool:
    if name == "triton":
        return device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return device == name


def _refusal(name: str, kernel: str, device: str, tensors) -> str | None:
    if kernel not in _KERNELS[name]:
        return f"backend {name} has no kernel for {kernel}"
    if not _runs_on(name, device):
        return f"the {name} kernels do not run on {device} tensors"
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"the {name} kernels take float32, bfloat16 and float16, not {tensor.dtype}"
    # The compiler cannot trace an import. The registered operator, which it calls, looks again.
    if torch.compiler.is_compiling():
        return "ONNX has no such operator" if torch.onnx.is_in_onnx_export() else None
    for tensor in tensors:
        if tensor is not None and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"the kernels read memory, which a {type(tensor).__name__} does not show"
    transform = transformed()
    return f"{transform} cannot see into a kernel" if transform else unavailable(name)


def choose(kernel: str, *tensors: torch.Tensor | None) -> Choice:
    """The implementation that serves a kernel of :data:`OPERATORS` on these tensors."""
    name = requested()
    if name == "reference":
        return Choice(name, "asked for")
    device = tensors[0].device.type
    if name != "auto":
        refusal = _refusal(name, kernel, device, tensors)
        if refusal is not None:
            raise RuntimeError(f"backend {name!r} was asked for, but {refusal}")
        return Choice(name, "asked for")
    name = _AUTO.get(device)
    if name is None:
        return Choice("reference", f"there are no kernels for {device} tensors")
    refusal = _refusal(name, kernel, device, tensors)
    if refusal is not None:
        return Choice("reference", refusal)
    return Choice(name, f"the {name} kernels serve {device} tensors")


@functools.singledispatch  # bitkern.convert adds: of a module
def explain(op_name: str, *tensors: torch.Tensor | None) -> Choice:
    """Which implementation a public operator would use on these tensors, and why.

    ``tensors`` are the operator's tensor arguments in their order, the big one first, e.g.
    ``explain("group_norm_act", x, weight, bias)``. Of ``ws_conv2d`` it tells how the weight is
    standardized; the convolution itself is PyTorch's (cuDNN, oneDNN).

    ``explain(module)`` of an ``nn.Module`` returns a table, to be printed, of what in it runs on
    the kernels, what does not, and why: see :func:`bitkern.convert`.
    """
    if op_name not in OPERATORS:
        raise ValueError(f"op_name: expected one of {', '.join(OPERATORS)}, got {op_name!r}")
    if not tensors:
        raise ValueError(f"explain({op_name!r}): expected the operator's tensors, got none")
    if op_name == "ws_conv2d":
        tensors = tensors[1:2] or tensors
    return choose(OPERATORS[op_name], *tensors)


@functools.cache
def launchers(name: str, kernel: str):
    """The module that holds an implementation's launchers."""
    modules = {"reference": "bitkern.reference", "triton": f"bitkern.kernels.{kernel}"}
    return importlib.import_module(modules.get(name, "bitkern.native"))
