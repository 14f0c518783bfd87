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


def _launch(
    launch: Callable[..., None],
    like: Tensor,
    num_groups: int,
    act: str,
    tensors: dict[str, Tensor | None],
    **numbers: float,
) -> None:
    """Launch a kernel whose maps are laid out like one of them; the rest are fields, by name."""
    batch, channels, *sizes = like.shape
    weight, bias = tensors["weight"], tensors["bias"]
    parameter = bias if weight is None else weight
    problem = {
        "batch": batch,
        "channels": channels,
        "pixels": math.prod(sizes),
        "groups": num_groups,
        "channels_last": not like.is_contiguous(),
        "per_sample": parameter is not None and parameter.ndim == 2,
        "dtype": DTYPES[like.dtype],
        "weight_dtype": 0 if weight is None else DTYPES[weight.dtype],
        "bias_dtype": 0 if bias is None else DTYPES[bias.dtype],
        "act": _ACTS.index(act),
    }
    fields: Struct = {name: 0 if t is None else t.data_ptr() for name, t in tensors.items()}
    launch(problem, fields | numbers, torch.get_num_threads())


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
    summed, y, mean, rstd = backend.empty_normalized(x, residual, num_groups)
    tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias, "shortcut": shortcut}
    tensors |= {"summed": summed, "y": y, "mean": mean, "rstd": rstd}
    launch = _kernels().group_norm_act_forward
    _launch(launch, x, num_groups, act, tensors, eps=eps, normalized=False)
    return summed, y, mean, rstd


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
    tensors = {"x": summed, "weight": weight, "bias": bias, "y": y, "mean": mean, "rstd": rstd}
    tensors |= {"residual": None, "shortcut": None, "summed": None}
    launch = _kernels().group_norm_act_forward
    _launch(launch, summed, num_groups, act, tensors, eps=0.0, normalized=True)
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
    tensors = {"dy": dy, "dsummed": dsummed, "summed": summed, "y": y, "mean": mean, "rstd": rstd}
    tensors |= {"weight": weight, "bias": bias, "dweight": dweight, "dbias": dbias}
    tensors |= {"dx": dx, "dshortcut": dshortcut}
    _launch(_kernels().group_norm_act_backward, summed, num_groups, act, tensors)
    return dx, dweight, dbias


group_norm_add_relu_forward = partial(backend.add_relu_forward, group_norm_act_forward)
group_norm_add_relu_backward = partial(backend.add_relu_backward, group_norm_act_backward)


def _standardize(launch: Callable[..., Any], *args: Any) -> Any:
    return launch(_kernels(), torch.get_num_threads(), *args)


weight_standardize_forward = partial(_standardize, extension.standardize_forward)
weight_standardize_backward = partial(_standardize, extension.standardize_backward)
weight_standardize_sgd = partial(_standardize, extension.standardize_sgd)
