"""The compiled extension ``bitkern._C``, and launchers that its backends share.

Its functions take dicts in the place of C++ structs, with the names of the fields in
``csrc/include/bitkern``: addresses for pointers, 0 for none. A name too few or too many raises
TypeError.
"""

import functools
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitkern.backends.backend import empty_standardized
from bitkern.variant import SgdOptions, Variant

Struct = dict[str, Any]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def load() -> tuple[Any, str]:
    """The extension and an empty string, or None and the reason why it is missing."""
    try:
        return importlib.import_module("bitkern._C"), ""
    except ModuleNotFoundError:
        reason = Path(__file__).parents[1] / "_C.missing"  # left by setup.py
        why = reason.read_text("utf-8") if reason.exists() else "no build was tried here"
        return None, f"the compiled extension bitkern._C was not built ({why})"
    except ImportError as error:
        return None, f"the compiled extension bitkern._C did not load ({error})"


def standardize_forward(
    kernels: Any,
    how: int,
    weights: Sequence[Tensor],
    gains: Sequence[Tensor] | None,
    scales: Sequence[float],
    variant: Variant,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[list[Tensor], Tensor]:
    """Launch the kernels of a device; ``how`` is the number of threads, or the stream."""
    outs, stats = empty_standardized(weights, dtype, channels_last)
    problem, layers = _standardization(weights, gains, scales, stats, variant, outs)
    for layer, out in zip(layers, outs, strict=True):
        layer["out"] = out.data_ptr()
    kernels.weight_standardize_forward(problem, layers, how)
    return outs, stats


def standardize_backward(
    kernels: Any,
    how: int,
    douts: Sequence[Tensor],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor] | None,
    scales: Sequence[float],
    stats: Tensor,
    variant: Variant,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Launch as ``standardize_forward`` does."""
    dweights = [torch.empty_like(w) for w in weights]
    dgains = None if gains is None else [torch.empty_like(gain) for gain in gains]
    problem, layers = _standardization(weights, gains, scales, stats, variant, douts)
    for i, layer in enumerate(layers):
        layer["dout"] = douts[i].data_ptr()
        layer["dweight"] = dweights[i].data_ptr()
        if dgains is not None:
            layer["dgain"] = dgains[i].data_ptr()
    kernels.weight_standardize_backward(problem, layers, how)
    return dweights, dgains


def standardize_sgd(
    kernels: Any,
    how: int,
    douts: Sequence[Tensor],
    weights: Sequence[Tensor],
    buffers: Sequence[Tensor],
    scales: Sequence[float],
    stats: Tensor,
    variant: Variant,
    options: SgdOptions,
) -> None:
    """Launch as ``standardize_forward`` does."""
    problem, layers = _standardization(weights, None, scales, stats, variant, douts)
    for layer, dout, buffer in zip(layers, douts, buffers, strict=True):
        for name in ("gain", "out", "dweight", "dgain"):
            del layer[name]
        layer |= {"dout": dout.data_ptr(), "buffer": buffer.data_ptr()}
    lr = options.lr_on(weights[0].device)
    problem = {**variant._asdict(), **options._asdict(), "lr": lr.data_ptr()}
    kernels.weight_standardize_sgd(problem, layers, how)


def _standardization(
    weights: Sequence[Tensor],
    gains: Sequence[Tensor] | None,
    scales: Sequence[float],
    stats: Tensor,
    variant: Variant,
    outs: Sequence[Tensor],  # or their gradients
) -> tuple[Struct, list[Struct]]:
    """The structs, without the addresses that only one direction has."""
    dtypes = {"weight_dtype": DTYPES[weights[0].dtype], "out_dtype": DTYPES[outs[0].dtype]}
    mean, std = stats.data_ptr(), stats.data_ptr() + 4 * stats.shape[1]
    layers = []
    for i, (weight, out) in enumerate(zip(weights, outs, strict=True)):
        filters, inner, *kernel = weight.shape
        layers.append(
            {
                "filters": filters,
                "inner": inner,
                "taps": math.prod(kernel),
                "scale": scales[i],
                "weight_channels_last": not weight.is_contiguous(),
                "out_channels_last": not out.is_contiguous(),
                "weight": weight.data_ptr(),
                "gain": 0 if gains is None else gains[i].data_ptr(),
                "mean": mean,
                "std": std,
                "out": 0,
                "dout": 0,
                "dweight": 0,
                "dgain": 0,
            }
        )
        mean += 4 * filters
        std += 4 * filters
    return variant._asdict() | dtypes, layers
