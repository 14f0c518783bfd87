"""Memory formats: the one an operator works in, and explicit conversion to it."""

from typing import overload

import torch

from bitkern import _torch

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """The format an operator works in and returns: channels last where ``x`` is, else NCHW."""
    if not x.is_contiguous() and x.ndim in CHANNELS_LAST and x.stride(1) == 1:
        return CHANNELS_LAST[x.ndim]
    return torch.contiguous_format


def dense(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if it is dense in its memory format, else a copy that is."""
    return x.contiguous(memory_format=memory_format(x))


@overload
def dense_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor: ...
@overload
def dense_like(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None: ...
def dense_like(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """``x`` dense in the format of ``like``, copied only if it is not so already."""
    return None if x is None else x.contiguous(memory_format=memory_format(like))


def cast_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype and memory format of ``like``; one that vmap batches keeps its strides."""
    if not torch.compiler.is_compiling() and _torch.batched(x):  # which Dynamo cannot trace
        return x.to(like.dtype)
    return x.to(like.dtype, memory_format=memory_format(like))
