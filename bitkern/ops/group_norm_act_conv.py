"""Group normalization + activation + convolutions as one node of the autograd graph.

    summed = x (+ residual);  a = act(group_norm(summed));  outs = [conv(a, w, b) for w, b in …]

The node keeps the sum and the statistics. Backward computes the activation a once more instead of
keeping it, which halves what a pre-activation block holds. Several convolutions of one activation
are what a block with a projection has.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitkern import _torch, reference
from bitkern.backends import Launchers, choose_launchers
from bitkern.layout import dense, dense_like
from bitkern.ops.convolution import Conv, convolution, convolution_backward
from bitkern.ops.group_norm_act import check, parameters, sum_group_norm_act
from bitkern.reference import Activation


class GroupNormActConvFunction(torch.autograd.Function):
    """The node; ``parameters`` are weight and bias of the norm, then those of the convolutions."""

    @staticmethod
    def forward(
        ctx: Any,
        convs: Sequence[Conv],
        num_groups: int,
        eps: float,
        act: Activation,
        implementation: Launchers,
        x: Tensor,
        residual: Tensor | None,
        *parameters: Any,
    ) -> Any:
        weight, bias, *rest = parameters
        weights, biases = rest[: len(convs)], rest[len(convs) :]
        summed, a, mean, rstd = implementation.group_norm_act_forward(
            x, residual, num_groups, weight, bias, eps, act
        )
        each = zip(weights, biases, convs, strict=True)
        outs = [convolution(a, w, b, conv) for w, b, conv in each]
        ctx.constants = convs, num_groups, eps, act, implementation
        ctx.save_for_backward(x if summed is None else summed, weight, bias, mean, rstd, *weights)
        ctx.set_materialize_grads(False)
        return (*outs,) if summed is None else (summed, *outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        implementation: Launchers
        convs, num_groups, eps, act, implementation = ctx.constants
        summed, weight, bias, mean, rstd, *weights = ctx.saved_tensors
        differentiated = _torch.backward_is_differentiated(*grads)
        if differentiated:
            mean, rstd = reference.group_statistics(summed, num_groups, eps)
            implementation = reference
        need_x, need_residual, need_weight, need_bias, *need = ctx.needs_input_grad[5:]
        need_weights, need_biases = need[: len(convs)], need[len(convs) :]
        need_dx, need_dparams = need_x or need_residual, need_weight or need_bias
        dsummed, *douts = grads if len(grads) > len(convs) else (None, *grads)

        a = summed  # only its shape matters to a convolution whose weight needs no gradient
        if any(need_weights):
            # A backend need not have it.
            recompute = getattr(
                implementation, "group_norm_act_recompute", reference.group_norm_act_recompute
            )
            a = recompute(summed, num_groups, weight, bias, mean, rstd, act)
        da: Tensor | None = None
        dweights: list[Tensor | None] = [None] * len(convs)
        dbiases: list[Tensor | None] = [None] * len(convs)
        for i, (conv, dout) in enumerate(zip(convs, douts, strict=True)):
            if dout is None:
                continue
            mask = [need_dx or need_dparams, need_weights[i], need_biases[i]]
            part, dweights[i], dbiases[i] = convolution_backward(
                dout, a, weights[i], conv, mask, differentiated
            )
            if part is not None:
                da = part if da is None else da + part if differentiated else da.add_(part)
        del a
        dx, dweight, dbias = dsummed, None, None
        if da is not None:
            if not differentiated:
                da, dsummed = dense_like(da, summed), dense_like(dsummed, summed)
            stats = mean, rstd, act
            dx, dweight, dbias = implementation.group_norm_act_backward(
                da, dsummed, summed, num_groups, weight, bias, *stats, need_dx, need_dparams
            )
        return (
            *[None] * 5,
            dx if need_x else None,
            dx if need_residual else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            *dweights,
            *dbiases,
        )


def group_norm_act_conv(
    x: Tensor,
    residual: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: Activation,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    convs: Sequence[Conv],
) -> tuple[Tensor, list[Tensor]]:
    """``group_norm_act``, or ``add_group_norm_act``, and convolutions of its result.

    Args:
        x, residual, num_groups, weight, bias, eps, act: as in ``add_group_norm_act``;
            ``residual`` may be None. x is (N, C, *) with one to three spatial dimensions.
        weights: of the convolutions, (O, C / groups, *kernel), or (C, O / groups, *kernel) of a
            transposed one, of x's dtype and device.
        biases: (O,) of x's dtype and device, or None, for each weight.
        convs: a ``Conv`` for each weight.

    Returns:
        (summed, outs): the sum, x itself without a residual, and the list of convolved maps.

    Raises:
        ValueError, TypeError: as ``add_group_norm_act``, and for weights that do not fit x.
    """
    check(x, residual, num_groups, weight, bias, act)
    convs = [conv.expanded(x.ndim - 2) for conv in convs]
    for w, b, conv in zip(weights, biases, convs, strict=True):
        for name, parameter in (("weights", w), ("biases", b)):
            if parameter is not None and (parameter.dtype, parameter.device) != (x.dtype, x.device):
                raise TypeError(
                    f"{name}: expected the dtype and device of x, {x.dtype} on {x.device}, "
                    f"got {parameter.dtype} on {parameter.device}"
                )
        channels = w.shape[0] if conv.transposed else w.shape[1] * conv.groups
        if w.ndim != x.ndim or x.shape[1] != channels:
            expected = "(C, O / groups, *kernel)" if conv.transposed else "(O, C / groups, *kernel)"
            raise ValueError(
                f"weights: expected {expected} for x of shape {tuple(x.shape)} and "
                f"{conv.groups} groups, got {tuple(w.shape)}"
            )
    if torch.compiler.is_compiling() or _torch.active_transform():  # which see no autograd.Function
        summed, a = sum_group_norm_act(x, residual, num_groups, weight, bias, eps, act)
        each = zip(weights, biases, convs, strict=True)
        return summed, [torch.convolution(a, w, b, *conv) for w, b, conv in each]
    implementation = choose_launchers("group_norm_act", x, weight, bias)
    weight, bias = parameters(weight, bias)
    x = dense(x)
    residual = dense_like(residual, x)
    constants = convs, num_groups, eps, act, implementation
    outs = GroupNormActConvFunction.apply(*constants, x, residual, weight, bias, *weights, *biases)
    return (x, list(outs)) if residual is None else (outs[0], list(outs[1:]))
