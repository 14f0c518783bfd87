"""Every call of a private name of PyTorch, in one place. Tried on PyTorch 2.11.0 and 2.14.1."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def transformed() -> str | None:
    """What transforms or records PyTorch's operators right now, and sees no kernel; else None."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func"
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "torch.jit.trace"
    for name in ("FAKE", "PROXY"):
        mode = torch._C._get_dispatch_mode(getattr(torch._C._TorchDispatchModeKey, name))
        if mode is not None:
            return type(mode).__name__
    return None


_BACKEND = "bitkern.backend"


def carry_backend(name: str | None) -> None:
    """Tell the threads in which autograd runs what this one begins, too."""
    torch._C._stash_obj_in_tls(_BACKEND, name)


def carried_backend() -> str | None:
    """What ``carry_backend`` was given, in the thread that began the backward pass or in this."""
    return torch._C._get_obj_in_tls(_BACKEND) if torch._C._is_key_in_tls(_BACKEND) else None


def saved_tensors_hooks() -> Any:
    """The innermost hooks on tensors saved for backward; None where there are none."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def active_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward pass is running."""
    ddp: DistributedDataParallel | None
    ddp = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    return ddp


_GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
    torch.nn.modules.module._global_backward_hooks,
    torch.nn.modules.module._global_backward_pre_hooks,
)


def hooked(module: nn.Module) -> bool:
    """Whether hooks see a module being called, its own or those on all modules."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any(_GLOBAL_HOOKS)
    )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As PyTorch's, but gradients of gradients are refused whatever the incoming ones are.

    PyTorch's lets them be silently wrong where no incoming gradient has a history, behind a sum for
    example: it takes the result for a constant.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return outputs
        refuse = torch._C._functions.DelayedError(
            b"trying to differentiate twice what bitkern differentiates once "
            b"(once_differentiable): use bitkern.use_backend('reference')",
            len(outputs),
        )
        histories: list[Any] = [None if o is None else o.detach().requires_grad_() for o in outputs]
        return refuse(*histories)

    return wrapper


def plain_tensor(value: Any) -> bool:
    """Whether a value is a tensor and no subclass with a mind of its own."""
    if type(value) in (torch.Tensor, nn.Parameter):
        return True
    recorded = "FakeTensorMode", "ProxyTorchDispatchMode"
    return isinstance(value, torch.Tensor) and transformed() in recorded


def forward_pre_hooked(module: nn.Module) -> bool:
    """Whether hooks run before a module, and may change its weight."""
    return bool(module._forward_pre_hooks)


def compiled(module: nn.Module) -> bool:
    """Whether torch.compile made a module, or its ``compile()`` was called."""
    dynamo = sys.modules.get("torch._dynamo")  # which is slow to import
    wrapped = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    return wrapped or module._compiled_call_impl is not None


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter that a module itself holds; None if it has none or computes it."""
    return module._parameters.get(name)


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules that a module holds, by their names."""
    return module._modules


def tensors_present(module: nn.Module) -> tuple[str, ...]:
    """The names of parameters and buffers of a module that are not None."""
    held = (*module._parameters.items(), *module._buffers.items())
    return tuple(name for name, tensor in held if tensor is not None)


def drop_parameter(module: nn.Module, name: str) -> None:
    """Take a parameter out of a module, also one that is None."""
    module._parameters.pop(name, None)


def drop_buffers(module: nn.Module) -> None:
    """Take all buffers out of a module."""
    module._buffers.clear()


def drop_hooks(module: nn.Module) -> None:
    """Take all hooks off a module that see it being called."""
    for hooks in (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ):
        hooks.clear()


# What a subclass of nn.Conv2d overrides to convolve with another weight.
conv_forward = nn.Conv2d._conv_forward


def plain_conv(module: nn.Module) -> bool:
    """Whether a module computes what a convolution of PyTorch does, and no more."""
    cls: Any = type(module)
    for of in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, of):
            return cls.forward is of.forward and cls._conv_forward is of._conv_forward
    transposed = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
    return any(isinstance(module, of) and cls.forward is of.forward for of in transposed)


def aoti_package(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compile an exported program with AOTInductor into a package ending in .pt2."""
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def load_aoti_package(path: Path) -> Callable[..., Any]:
    """The function in a package of AOTInductor."""
    function: Callable[..., Any] = torch._inductor.aoti_load_package(str(path))
    return function
