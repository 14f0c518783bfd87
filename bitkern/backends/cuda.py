"""Launchers of the compiled kernels on NVIDIA GPUs, which run on request only."""

import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bitkern.backends import extension
from bitkern.backends.backend import FLOATS, Backend


class Cuda(Backend):
    name = "cuda"
    devices = ("cuda",)
    dtypes = {"weight_standardize": FLOATS}

    def unavailable(self) -> str | None:
        module, reason = extension.load()
        if module is None:
            return reason
        return None if module.with_cuda else "the compiled extension was built without CUDA"

    def launchers(self, kernel: str) -> types.ModuleType:
        return sys.modules[__name__]


def _standardize(launch: Callable[..., Any], tensors: Sequence[torch.Tensor], *args: Any) -> Any:
    with torch.cuda.device(tensors[0].device):
        stream = torch.cuda.current_stream().cuda_stream
        return launch(extension.load()[0].cuda, stream, tensors, *args)


weight_standardize_forward = functools.partial(_standardize, extension.standardize_forward)
weight_standardize_backward = functools.partial(_standardize, extension.standardize_backward)
