"""The compiled kernels on NVIDIA GPUs, which serve on request."""

import sys
import types
from collections.abc import Sequence

import torch

from bitkern.backends import extension
from bitkern.backends.backend import FLOATS, Backend
from bitkern.variant import Variant


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


def weight_standardize_forward(
    weights: Sequence[torch.Tensor],
    gains: Sequence[torch.Tensor] | None,
    scales: Sequence[float],
    variant: Variant,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    args = weights, gains, scales, variant, dtype, channels_last
    with torch.cuda.device(weights[0].device):
        stream = torch.cuda.current_stream().cuda_stream
        return extension.standardize_forward(extension.load()[0].cuda, stream, *args)


def weight_standardize_backward(
    douts: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    gains: Sequence[torch.Tensor] | None,
    scales: Sequence[float],
    stats: torch.Tensor,
    variant: Variant,
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    args = douts, weights, gains, scales, stats, variant
    with torch.cuda.device(weights[0].device):
        stream = torch.cuda.current_stream().cuda_stream
        return extension.standardize_backward(extension.load()[0].cuda, stream, *args)
