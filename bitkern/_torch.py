"""All uses of private names of PyTorch. Tried on PyTorch 2.11.0 and 2.14.1."""

import copy
import ctypes
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def active_transform() -> str | None:
    """The active transform or tracer, which cannot see into a kernel; None if there is none."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "torch.jit.trace"
    for name in ("FAKE", "PROXY"):
        mode = torch._C._get_dispatch_mode(getattr(torch._C._TorchDispatchModeKey, name))
        if mode is not None:
            return type(mode).__name__
    return None


_BACKEND = "bitkern.backend"


def carry_backend(name: str | None) -> None:
    """Make a backend's name known to the threads of autograd, too."""
    # PyTorch 2.11 takes a reference that it was not given. Later ones leave a name one too many.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(name))
    torch._C._stash_obj_in_tls(_BACKEND, name)


def carried_backend() -> str | None:
    """The name given to ``carry_backend``, by this thread or the one that began backward."""
    return torch._C._get_obj_in_tls(_BACKEND) if torch._C._is_key_in_tls(_BACKEND) else None


def saved_tensors_hooks() -> Any:
    """The innermost hooks on tensors saved for backward; None where there are none."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def active_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward pass is running."""
    ddp: DistributedDataParallel | None
    ddp = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    return ddp


def hooked(module: nn.Module) -> bool:
    """Return whether hooks see a module being called, its own or those on all modules."""
    own = module._forward_hooks or module._forward_pre_hooks
    own = own or module._backward_hooks or module._backward_pre_hooks
    return bool(own or _has_any_global_hook())  # type: ignore[no-untyped-call]


def drop_hooks(module: nn.Module) -> None:
    """Take all hooks off a module that see it being called."""
    forward = module._forward_hooks, module._forward_pre_hooks
    for hooks in (*forward, module._backward_hooks, module._backward_pre_hooks):
        hooks.clear()


def batched(x: torch.Tensor) -> bool:
    """Return whether vmap batches a tensor, or may: inside torch.func's grad it does not show."""
    return torch._C._are_functorch_transforms_active() or _is_batched(x)


def _is_batched(x: torch.Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(x) or functorch.is_batchedtensor(x)


def backward_is_differentiated(*grads: torch.Tensor | None) -> bool:
    """Return whether the backward pass that runs now is itself differentiated, or batched.

    The engine runs it with gradients enabled for ``create_graph=True``, whoever asks for that;
    ``is_grads_batched=True`` shows in the incoming gradients alone.
    """
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(g is not None and _is_batched(g) for g in grads)
    )


def forward_pre_hooked(module: nn.Module) -> bool:
    """Return whether hooks run before a module, and may change its weight."""
    return bool(module._forward_pre_hooks)


def compiled(module: nn.Module) -> bool:
    """Return whether torch.compile made a module, or its ``compile()`` was called."""
    dynamo = sys.modules.get("torch._dynamo")  # which is slow to import
    wrapped = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    return wrapped or module._compiled_call_impl is not None


def version_key(tensors: Iterable[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    """A key that changes with tensors: in place, or by another memory in ``data``."""
    return tuple((0 if t.is_inference() else t._version, t.data_ptr()) for t in tensors)


def grad_hooked(p: torch.Tensor) -> bool:
    """Return whether hooks of Python see the gradient of a parameter."""
    return bool(p._backward_hooks or p._post_accumulate_grad_hooks)


def step_hooked(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether hooks see the steps of an optimizer, its own or those on all optimizers."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def refuse_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Have a GradScaler look for gradients itself, and raise an error if there are none."""
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def mutates(target: Any) -> bool | None:
    """Return whether an operator's schema lets it change an argument; None without a schema."""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    if isinstance(target, torch._ops.OpOverloadPacket):
        names: list[str] = target.overloads()  # type: ignore[no-untyped-call]
        return any(mutates(getattr(target, name)) for name in names)
    return None


def storage_key(tensor: torch.Tensor) -> int:
    """A key that tensors, fake ones too, have in common if they share memory."""
    storage: int = tensor.untyped_storage()._cdata
    return storage


def compilation(gm: torch.fx.GraphModule) -> tuple[str, str | None]:
    """The number of the frame and of its graph that Dynamo compiles; why a graph broke, or None."""
    compile_id = torch._guards.CompileContext.current_compile_id()
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return str(compile_id), None
    return str(compile_id), str(reason.reason).splitlines()[0]


def at_recompile_limit(compile_id: str) -> bool:
    """Return whether a frame was compiled as often as Dynamo allows."""
    frame_compile_id = compile_id.rpartition("/")[2].partition("_")[0]
    limit: int = torch._dynamo.config.recompile_limit
    return frame_compile_id.isdigit() and int(frame_compile_id) + 1 >= limit


def inductor(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Inductor's function for a graph, which sees the registered operators as such."""
    from torch._inductor.compile_fx import compile_fx

    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        compiled: Any = compile_fx(gm, list(example_inputs))
    finally:
        torch.compiler._is_compiling_flag = before
    return compiled  # type: ignore[no-any-return]


def has_amx() -> bool:
    """Return whether the processor has matrix units of its own."""
    return torch.cpu._is_amx_tile_supported()


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter that a module itself holds; None if it has none or computes it."""
    return module._parameters.get(name)


def drop_parameter(module: nn.Module, name: str) -> None:
    """Take a parameter out of a module, also one that is None."""
    module._parameters.pop(name, None)


def with_parameters(module: nn.Module, parameters: Mapping[str, torch.Tensor | None]) -> nn.Module:
    """A shallow copy of a module that computes with other tensors than its own parameters."""
    twin = copy.copy(module)
    vars(twin)["_parameters"] = dict(parameters)
    return twin


def drop_buffers(module: nn.Module) -> None:
    """Take all buffers out of a module."""
    module._buffers.clear()


# What a subclass of nn.Conv2d overrides to convolve with another weight.
conv_forward = nn.Conv2d._conv_forward


def padding_of(conv: nn.Conv2d) -> list[int]:
    """The padding of a convolution, in the order of ``torch.nn.functional.pad``."""
    padding: list[int] = conv._reversed_padding_repeated_twice
    return padding


def plain_conv(module: nn.Module) -> bool:
    """Return whether a module computes what a convolution of PyTorch does, and no more."""
    cls: Any = type(module)
    for base in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, base):
            return cls.forward is base.forward and cls._conv_forward is base._conv_forward
    transposed = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
    return any(isinstance(module, base) and cls.forward is base.forward for base in transposed)


def aoti_package(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compile an exported program with AOTInductor into a package ending in .pt2."""
    # Freezing makes the weights constants, so that Inductor fuses what it can into convolutions.
    configs = {"freezing": True}
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs=configs
    )


def load_aoti_package(path: Path) -> Callable[..., Any]:
    """The function in a package of AOTInductor."""
    function: Callable[..., Any] = torch._inductor.aoti_load_package(str(path))
    return function
