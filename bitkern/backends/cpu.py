"""Launchers of the compiled kernels on the CPU."""

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from bitkern.backends import extension
from bitkern.backends.backend import FLOATS, Backend
from bitkern.backends.extension import DTYPES, Struct

_ACTS = {
    "none": 0,
    "relu": 1,
    "silu": 2,
    "leaky_relu": 3,
    "gelu": 4,
    "mish": 5,
    "hardswish": 6,
}


class Cpu(Backend):
    name = "cpu"
    devices = auto = ("cpu",)
    dtypes = {
        "group_norm_act": FLOATS,
        "group_norm_add_relu": FLOATS,
        "weight_standardize": FLOATS,
    }

    expected = True

    def unavailable(self) -> str | None:
        return extension.load()[1] or None

    def launchers(self, kernel: str) -> types.ModuleType:
        return sys.modules[__name__]


@functools.cache
def _kernels() -> Any:
    return extension.load()[0].cpu


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _problem(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    act: str,
) -> Struct:
    batch, channels, *sizes = x.shape
    parameter = bias if weight is None else weight
    pixels = 1
    for size in sizes:
        pixels *= size
    return {
        "batch": batch,
        "channels": channels,
        "pixels": pixels,
        "groups": num_groups,
        "channels_last": not x.is_contiguous(),
        "per_sample": parameter is not None and parameter.ndim == 2,
        "dtype": DTYPES[x.dtype],
        "weight_dtype": 0 if weight is None else DTYPES[weight.dtype],
        "bias_dtype": 0 if bias is None else DTYPES[bias.dtype],
        "act": _ACTS[act],
    }


def _forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    act: str,
    outs: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    shortcut: torch.Tensor | None = None,
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
    x: torch.Tensor,
    residual: torch.Tensor | None,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    act: str,
    shortcut: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Given a shortcut, y is that of group_norm_add_relu."""
    summed = None if residual is None else torch.empty_like(x)
    y = torch.empty_like(x)
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    outs = summed, y, mean, rstd
    _forward(x, residual, num_groups, weight, bias, eps, act, outs, shortcut=shortcut)
    return outs


def group_norm_act_recompute(
    summed: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    act: str,
) -> torch.Tensor:
    y = torch.empty_like(summed)
    outs = None, y, mean, rstd
    _forward(summed, None, num_groups, weight, bias, 0.0, act, outs, normalized=True)
    return y


def group_norm_act_backward(
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
    summed: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    act: str,
    need_dx: bool,
    need_dparams: bool,
    y: torch.Tensor | None = None,
    dshortcut: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
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


def group_norm_add_relu_forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    args = x, None, num_groups, weight, bias, eps, "relu"
    _, y, mean, rstd = group_norm_act_forward(*args, shortcut=residual)
    return y, mean, rstd


def group_norm_add_relu_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    need_dx: bool,
    need_dresidual: bool,
    need_dparams: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    dresidual = torch.empty_like(x) if need_dresidual else None
    args = num_groups, weight, bias, mean, rstd, "relu", need_dx, need_dparams
    dx, dweight, dbias = group_norm_act_backward(dy, None, x, *args, y=y, dshortcut=dresidual)
    return dx, dresidual, dweight, dbias


def _standardize(launch: Callable[..., Any], *args: Any) -> Any:
    return launch(_kernels(), torch.get_num_threads(), *args)


weight_standardize_forward = functools.partial(_standardize, extension.standardize_forward)
weight_standardize_backward = functools.partial(_standardize, extension.standardize_backward)
weight_standardize_sgd = functools.partial(_standardize, extension.standardize_sgd)
