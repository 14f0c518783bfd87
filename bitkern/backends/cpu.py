"""Launchers of the compiled kernels on the CPU."""

import math
import sys
import types
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bitkern.backends import backend, extension
from bitkern.backends.extension import DTYPES, Struct

_ACTS = "none", "relu", "silu", "leaky_relu", "gelu", "mish", "hardswish"  # as C++ counts them


class Cpu(backend.Backend):
    name = "cpu"
    devices = auto = ("cpu",)
    dtypes = dict.fromkeys(backend.KERNELS, backend.FLOATS)
    expected = True

    def unavailable(self) -> str | None:
        return extension.load()[1] or None

    def launchers(self, kernel: str) -> types.ModuleType:
        return sys.modules[__name__]


@cache
def _kernels() -> Any:
    return extension.load()[0].cpu


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _problem(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str,
) -> Struct:
    batch, channels, *sizes = x.shape
    parameter = bias if weight is None else weight
    return {
        "batch": batch,
        "channels": channels,
        "pixels": math.prod(sizes),
        "groups": num_groups,
        "channels_last": not x.is_contiguous(),
        "per_sample": parameter is not None and parameter.ndim == 2,
        "dtype": DTYPES[x.dtype],
        "weight_dtype": 0 if weight is None else DTYPES[weight.dtype],
        "bias_dtype": 0 if bias is None else DTYPES[bias.dtype],
        "act": _ACTS.index(act),
    }


def _forward(
    x: Tensor,
    residual: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    outs: tuple[Tensor | None, Tensor, Tensor, Tensor],
    *,
    shortcut: Tensor | None = None,
    normalized: bool = False,
) -> None:
    summed, y, mean, rstd = outs
    tensors = {
        "x": x.data_ptr(),
        "residual": _address(residual),
        "weight": _address(weight),
        "bias": _address(bias),
        "shortcut": _address(shortcut),
        "eps": eps,
        "summed": _address(summed),
        "y": y.data_ptr(),
        "mean": mean.data_ptr(),
        "rstd": rstd.data_ptr(),
        "normalized": normalized,
    }
    problem = _problem(x, num_groups, weight, bias, act)
    _kernels().group_norm_act_forward(problem, tensors, torch.get_num_threads())


def group_norm_act_forward(
    x: Tensor,
    residual: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    shortcut: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Given a shortcut, y is that of group_norm_add_relu."""
    outs = backend.empty_normalized(x, residual, num_groups)
    _forward(x, residual, num_groups, weight, bias, eps, act, outs, shortcut=shortcut)
    return outs


def group_norm_act_recompute(
    summed: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    act: str,
) -> Tensor:
    y = torch.empty_like(summed)
    outs = None, y, mean, rstd
    _forward(summed, None, num_groups, weight, bias, 0.0, act, outs, normalized=True)
    return y


def group_norm_act_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    act: str,
    need_dx: bool,
    need_dparams: bool,
    y: Tensor | None = None,
    dshortcut: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Given y, the backward of group_norm_add_relu; dshortcut, if any, is written to."""
    dx = torch.empty_like(summed) if need_dx else None
    dweight = torch.empty_like(weight) if need_dparams and weight is not None else None
    dbias = torch.empty_like(bias) if need_dparams and bias is not None else None
    tensors = {
        "dy": dy.data_ptr(),
        "dsummed": _address(dsummed),
        "summed": summed.data_ptr(),
        "y": _address(y),
        "weight": _address(weight),
        "bias": _address(bias),
        "mean": mean.data_ptr(),
        "rstd": rstd.data_ptr(),
        "dx": _address(dx),
        "dshortcut": _address(dshortcut),
        "dweight": _address(dweight),
        "dbias": _address(dbias),
    }
    problem = _problem(summed, num_groups, weight, bias, act)
    _kernels().group_norm_act_backward(problem, tensors, torch.get_num_threads())
    return dx, dweight, dbias


group_norm_add_relu_forward = partial(backend.add_relu_forward, group_norm_act_forward)
group_norm_add_relu_backward = partial(backend.add_relu_backward, group_norm_act_backward)


def _standardize(launch: Callable[..., Any], *args: Any) -> Any:
    return launch(_kernels(), torch.get_num_threads(), *args)


weight_standardize_forward = partial(_standardize, extension.standardize_forward)
weight_standardize_backward = partial(_standardize, extension.standardize_backward)
weight_standardize_sgd = partial(_standardize, extension.standardize_sgd)
