"""Group normalization + activation, alone and after a residual addition.

    summed = x (+ residual);  y = act(weight * (summed - mean) * rstd + bias)

mean and rstd per (sample, group), weight and bias per channel, or per sample and channel. Backward
keeps the sum and the statistics alone: it recomputes what it needs, and one gradient serves x
and residual alike. Derivation: docs/math.md.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitkern import _torch, reference
from bitkern.backends import Launchers, choose, choose_launchers, launchers, operator
from bitkern.backends.backend import empty_normalized
from bitkern.layout import dense, dense_like
from bitkern.reference import Activation


def check_act(act: str) -> None:
    """Raise ValueError unless ``act`` is the name of an activation."""
    if act not in reference.ACTIVATIONS:
        raise ValueError(f"act: expected one of {', '.join(reference.ACTIVATIONS)}, got {act!r}")


def check(
    x: Tensor,
    residual: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit."""
    check_act(act)
    if x.ndim < 2:
        raise ValueError(f"x: expected shape (N, C, *), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    if 0 in x.shape[2:]:
        raise ValueError(f"x: expected at least one pixel, got shape {tuple(x.shape)}")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"num_groups: expected a divisor of the {channels} channels of x, got {num_groups}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.shape != (channels,) and parameter.shape != x.shape[:2]:
            raise ValueError(
                f"{name}: expected shape ({channels},) or {tuple(x.shape[:2])} for the channels of "
                f"x, got {tuple(parameter.shape)}"
            )
        check_companion(name, parameter, x)
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"residual: expected the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}"
            )
        if residual.dtype != x.dtype:
            raise TypeError(f"residual: expected the dtype of x, {x.dtype}, got {residual.dtype}")
        check_companion("residual", residual, x)


def check_companion(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise ValueError or TypeError unless a tensor can be computed with x."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")


def parameters(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """weight and bias as kernels read them: contiguous, and both (N, C) if one is."""
    if weight is not None and bias is not None and weight.ndim != bias.ndim:
        weight, bias = torch.broadcast_tensors(weight, bias)  # type: ignore[no-untyped-call]
    return (
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
    )


def modulated(
    weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of ``norm(x) * scale + shift``; all of (C,) or (N, C), or None."""
    if scale is not None:
        weight = scale if weight is None else weight * scale
        bias = None if bias is None else bias * scale
    if shift is not None:
        bias = shift if bias is None else bias + shift
    return weight, bias


# The registered operators, for torch.compile and torch.export. An operator cannot return None: an
# empty tensor stands for a missing sum, and for a gradient that is not wanted.


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def empty_gradients(*wanted: tuple[bool, Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Fake gradients of tensors, each with whether it is wanted."""
    grads = (torch.empty_like(p) if need and p is not None else None for need, p in wanted)
    return tuple(or_empty(grad, like) for grad in grads)


@torch.library.custom_op(
    "bitkern::group_norm_act",
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, int num_groups, Tensor? weight, Tensor? bias, float eps,"
    " str act) -> (Tensor summed, Tensor y, Tensor mean, Tensor rstd)",
)
def _group_norm_act(
    x: Tensor,
    residual: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: Activation,
) -> tuple[Tensor, ...]:
    x = dense(x)
    weight, bias = parameters(weight, bias)
    kernels = choose_launchers("group_norm_act", x, weight, bias)
    summed, *rest = kernels.group_norm_act_forward(
        x, dense_like(residual, x), num_groups, weight, bias, eps, act
    )
    return or_empty(summed, x), *rest


@_group_norm_act.register_fake
def _(x: Tensor, residual: Tensor | None, num_groups: int, *_: Any) -> tuple[Tensor, ...]:
    summed, *rest = empty_normalized(dense(x), residual, num_groups)
    return or_empty(summed, x), *rest


@torch.library.custom_op(
    "bitkern::group_norm_act_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? dsummed, Tensor summed, int num_groups, Tensor? weight,"
    " Tensor? bias, Tensor mean, Tensor rstd, str act, bool need_dx, bool need_dparams)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
)
def _group_norm_act_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    summed = dense(summed)
    dy, dsummed = dense_like(dy, summed), dense_like(dsummed, summed)
    weight, bias = parameters(weight, bias)
    kernels = choose_launchers("group_norm_act", summed, weight, bias)
    grads = kernels.group_norm_act_backward(dy, dsummed, summed, num_groups, weight, bias, *rest)
    return tuple(or_empty(grad, summed) for grad in grads)


@_group_norm_act_backward.register_fake
def _(
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
) -> tuple[Tensor, ...]:
    weight, bias = parameters(weight, bias)
    wanted = (need_dx, dense(summed)), (need_dparams, weight), (need_dparams, bias)
    return empty_gradients(*wanted, like=summed)


# Autograd, the same for the registered operator and for eager mode.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, residual, ctx.num_groups, weight, bias, ctx.eps, ctx.act = inputs
    summed, _, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(summed if ctx.has_residual else x, weight, bias, mean, rstd)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, backward: Callable[..., Any], dsummed: Tensor | None, dy: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs x, residual, num_groups, weight, bias, eps, act."""
    need_x, need_residual, _, need_weight, need_bias = ctx.needs_input_grad[:5]
    dx, dweight, dbias = dsummed, None, None
    if dy is not None:  # otherwise only the sum was used
        summed, weight, bias, mean, rstd = ctx.saved_tensors
        if _torch.backward_is_differentiated(dsummed, dy):
            mean, rstd = reference.group_statistics(summed, ctx.num_groups, ctx.eps)
            backward = reference.group_norm_act_backward
        else:
            dsummed, dy = dense_like(dsummed, summed), dense_like(dy, summed)
        need_dx, need_dparams = need_x or need_residual, need_weight or need_bias
        stats = mean, rstd, ctx.act
        dx, dweight, dbias = backward(
            dy, dsummed, summed, ctx.num_groups, weight, bias, *stats, need_dx, need_dparams
        )
    return (
        dx if need_x else None,
        dx if need_residual else None,
        None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        None,
        None,
    )


def _op_backward(ctx: Any, dsummed: Tensor | None, dy: Tensor | None, *_: Any) -> Any:
    dsummed = dsummed if ctx.has_residual else None  # the empty stand-in has a gradient too
    return _gradients(ctx, torch.ops.bitkern.group_norm_act_backward, dsummed, dy)


_group_norm_act.register_autograd(_op_backward, setup_context=_setup_context)


class GroupNormActFunction(torch.autograd.Function):
    """The operator in eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        act: Activation,
        implementation: Launchers,
    ) -> Any:
        inputs = x, residual, num_groups, weight, bias, eps, act
        outputs = implementation.group_norm_act_forward(*inputs)
        _setup_context(ctx, inputs, outputs)
        ctx.implementation = implementation
        return outputs[1] if residual is None else outputs[:2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        dsummed, dy = (None, *grads) if len(grads) == 1 else grads
        backward = ctx.implementation.group_norm_act_backward
        return *_gradients(ctx, backward, dsummed, dy), None


def sum_group_norm_act(
    x: Tensor,
    residual: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: Activation,
) -> tuple[Tensor, Tensor]:
    """``add_group_norm_act``, or without a residual ``(x, group_norm_act(x))``."""
    check(x, residual, num_groups, weight, bias, act)
    choice = choose("group_norm_act", x, weight, bias)
    if choice.name == "reference":
        summed = x if residual is None else x + residual
        return summed, reference.group_norm_act(summed, num_groups, weight, bias, eps, act)
    weight, bias = parameters(weight, bias)
    if torch.compiler.is_compiling():
        if residual is not None and x.device.type == "cpu" and not torch.is_grad_enabled():
            x, residual = dense(x) + residual, None  # by Inductor: in place, or in a convolution
        arguments = x, residual, num_groups, weight, bias, eps, act
        summed, y, _, _ = torch.ops.bitkern.group_norm_act(*arguments)
        return x if residual is None else summed, y
    inner = dense(x)
    args = num_groups, weight, bias, eps, act, launchers(choice.name, "group_norm_act")
    y = GroupNormActFunction.apply(inner, dense_like(residual, inner), *args)
    return (x, y) if residual is None else y


@operator("group_norm_act")
def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: Activation = "relu",
) -> Tensor:
    """Group normalization (Wu & He, arXiv 1803.08494) followed by an activation.

    ``act(weight * (x - mean) / sqrt(var + eps) + bias)``, mean and biased variance over each
    group of channels of each sample.

    Args:
        x: (N, C, *), any floating dtype and strides. 16-bit inputs are computed in float32.
        num_groups: a divisor of C.
        weight, bias: (C,), or (N, C) for parameters of each sample; any floating dtype, or None.
        eps: added to the variance.
        act: ``"relu"``, ``"silu"``, ``"leaky_relu"`` (slope 0.01), ``"gelu"`` (exact), ``"mish"``,
            ``"hardswish"`` or ``"none"``.

    Returns:
        A tensor with the shape, dtype and memory format of ``x``, under autocast too.

    Raises:
        ValueError: a shape, a device or ``act`` does not fit.
        TypeError: a dtype does not fit.
    """
    return sum_group_norm_act(x, None, num_groups, weight, bias, eps, act)[1]


@operator("group_norm_act")
def add_group_norm_act(
    x: Tensor,
    residual: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: Activation = "relu",
) -> tuple[Tensor, Tensor]:
    """``summed = x + residual`` and ``group_norm_act(summed)`` in one pass; returns (summed, y).

    ``residual`` has the shape, dtype and device of ``x``; the sum has those and the memory
    format of ``x``, and the statistics are those of the sum as rounded to its dtype. Both outputs
    can be differentiated. Arguments and errors are those of ``group_norm_act``.
    """
    if residual is None:
        raise TypeError("residual: expected a tensor, got None")
    return sum_group_norm_act(x, residual, num_groups, weight, bias, eps, act)
