"""The end of a post-activation residual block: group normalization, residual addition, ReLU.

    y = relu(weight * (x - mean) * rstd + bias + residual)

mean and rstd per (sample, group). Backward keeps x, the statistics and y, which the convolution
behind it keeps anyway; not the residual: y tells where ReLU was 0. Derivation: docs/math.md.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitkern import _torch, reference
from bitkern.backends import Launchers, choose, choose_launchers, launchers, operator
from bitkern.backends.backend import empty_normalized
from bitkern.layout import dense, dense_like
from bitkern.ops.group_norm_act import check, empty_gradients, or_empty, parameters

# The registered operators, for torch.compile and torch.export. An operator cannot return None: an
# empty tensor stands for a gradient that is not wanted.


@torch.library.custom_op(
    "bitkern::group_norm_add_relu",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, int num_groups, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
)
def _group_norm_add_relu(
    x: Tensor,
    residual: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    x = dense(x)
    weight, bias = parameters(weight, bias)
    kernels = choose_launchers("group_norm_add_relu", x, residual, weight, bias)
    return kernels.group_norm_add_relu_forward(
        x, dense_like(residual, x), num_groups, weight, bias, eps
    )


@_group_norm_add_relu.register_fake
def _(x: Tensor, residual: Tensor, num_groups: int, *_: Any) -> tuple[Tensor, ...]:
    return empty_normalized(dense(x), None, num_groups)[1:]


@torch.library.custom_op(
    "bitkern::group_norm_add_relu_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor y, int num_groups, Tensor? weight, Tensor? bias,"
    " Tensor mean, Tensor rstd, bool need_dx, bool need_dresidual, bool need_dparams)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
)
def _group_norm_add_relu_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    x = dense(x)
    weight, bias = parameters(weight, bias)
    kernels = choose_launchers("group_norm_add_relu", x, weight, bias)
    grads = kernels.group_norm_add_relu_backward(
        dense_like(dy, x), x, dense_like(y, x), num_groups, weight, bias, *rest
    )
    return tuple(or_empty(grad, x) for grad in grads)


@_group_norm_add_relu_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_dx: bool,
    need_dresidual: bool,
    need_dparams: bool,
) -> tuple[Tensor, ...]:
    weight, bias = parameters(weight, bias)
    maps = (need_dx, dense(x)), (need_dresidual, dense(x))
    return empty_gradients(*maps, (need_dparams, weight), (need_dparams, bias), like=x)


# Autograd, the same for the registered operator and for eager mode.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, _, ctx.num_groups, weight, bias, ctx.eps = inputs
    y, mean, rstd = output
    ctx.save_for_backward(x, y, weight, bias, mean, rstd)


def _gradients(ctx: Any, backward: Callable[..., Any], dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs x, residual, num_groups, weight, bias, eps."""
    need_x, need_residual, _, need_weight, need_bias, _ = ctx.needs_input_grad[:6]
    x, y, weight, bias, mean, rstd = ctx.saved_tensors
    if _torch.backward_is_differentiated(dy):
        mean, rstd = reference.group_statistics(x, ctx.num_groups, ctx.eps)
        backward = reference.group_norm_add_relu_backward
    else:
        dy = dense_like(dy, x)
    args = ctx.num_groups, weight, bias, mean, rstd
    needs = need_x, need_residual, need_weight or need_bias
    dx, dresidual, dweight, dbias = backward(dy, x, y, *args, *needs)
    return (
        dx if need_x else None,
        dresidual if need_residual else None,
        None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        None,
    )


def _op_backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
    return _gradients(ctx, torch.ops.bitkern.group_norm_add_relu_backward, dy)


_group_norm_add_relu.register_autograd(_op_backward, setup_context=_setup_context)


class GroupNormAddReluFunction(torch.autograd.Function):
    """The operator in eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        implementation: Launchers,
    ) -> Tensor:
        inputs = x, residual, num_groups, weight, bias, eps
        outputs = implementation.group_norm_add_relu_forward(*inputs)
        _setup_context(ctx, inputs, outputs)
        ctx.implementation = implementation
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        backward = ctx.implementation.group_norm_add_relu_backward
        return *_gradients(ctx, backward, dy), None


@operator("group_norm_add_relu")
def group_norm_add_relu(
    x: Tensor,
    residual: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Group normalization (Wu & He, arXiv 1803.08494), a residual added, ReLU, in one pass.

    ``relu(weight * (x - mean) / sqrt(var + eps) + bias + residual)``: the end of a post-activation
    block (He et al., arXiv 1512.03385). The sum is rounded once, after ReLU.

    Args:
        x: (N, C, *), any floating dtype and strides. 16-bit inputs are computed in float32.
        residual: of the shape, dtype and device of ``x``, any strides.
        num_groups: a divisor of C.
        weight, bias: (C,), or (N, C) for parameters of each sample; any floating dtype, or None.
        eps: added to the variance.

    Returns:
        A tensor with the shape, dtype and memory format of ``x``, under autocast too. Backward
        keeps it, beside ``x``: it must not be changed in place.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit.
    """
    if residual is None:
        raise TypeError("residual: expected a tensor, got None")
    check(x, residual, num_groups, weight, bias, "relu")
    choice = choose("group_norm_add_relu", x, residual, weight, bias)
    if choice.name == "reference":
        return reference.group_norm_add_relu(x, residual, num_groups, weight, bias, eps)
    weight, bias = parameters(weight, bias)
    y: Tensor
    if torch.compiler.is_compiling():
        arguments = x, residual, num_groups, weight, bias, eps
        y, _, _ = torch.ops.bitkern.group_norm_add_relu(*arguments)
        return y
    x = dense(x)
    args = num_groups, weight, bias, eps, launchers(choice.name, "group_norm_add_relu")
    y = GroupNormAddReluFunction.apply(x, dense_like(residual, x), *args)
    return y
