"""Weight standardization of one layer or of many layers in one launch.

    out = gain * scale * (w - mean) / sqrt(var + eps)   or   ... / (sqrt(var) + eps)

mean and var per output filter. Backward keeps the weight and the statistics. Derivation:
docs/math.md.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitkern import _torch, reference
from bitkern.backends import Launchers, choose, choose_launchers, launchers, operator
from bitkern.backends.backend import empty_standardized
from bitkern.layout import dense
from bitkern.variant import Variant


def check(
    weights: Sequence[Tensor],
    gains: Sequence[Tensor] | None,
    scales: Sequence[float] | None,
    dtype: torch.dtype | None,
    channels_last: bool,
    unbiased: bool,
) -> list[float]:
    """The scales, 1 by default. Raises ValueError or TypeError naming what does not fit."""
    scales = [1.0] * len(weights) if scales is None else list(scales)
    for name, values in (("gains", gains), ("scales", scales)):
        if values is not None and len(values) != len(weights):
            raise ValueError(f"{name}: expected {len(weights)}, one per weight, got {len(values)}")
    for i, w in enumerate(weights):
        if w.ndim < 2:
            raise ValueError(f"weight: expected shape (O, I, *kernel), got {tuple(w.shape)}")
        if not w.is_floating_point():
            raise TypeError(f"weight: expected a floating dtype, got {w.dtype}")
        if w.dtype != weights[0].dtype or w.device != weights[0].device:
            raise ValueError(
                f"weights: expected one dtype and device, got {w.dtype} on {w.device} beside "
                f"{weights[0].dtype} on {weights[0].device}"
            )
        if unbiased and w[0:1].numel() == 1:
            raise ValueError(
                f"unbiased: expected filters of two elements or more, got {tuple(w.shape)}"
            )
        if channels_last and w.ndim != 4:
            raise ValueError(
                f"channels_last: expected weights (O, I, kh, kw), got {tuple(w.shape)}"
            )
        if gains is None:
            continue
        gain = gains[i]
        if gain.numel() != w.shape[0]:
            raise ValueError(
                f"gain: expected one element for each of the {w.shape[0]} filters, "
                f"got {tuple(gain.shape)}"
            )
        if gain.dtype != w.dtype or gain.device != w.device:
            raise ValueError(
                f"gain: expected the dtype and device of weight, {w.dtype} on {w.device}, "
                f"got {gain.dtype} on {gain.device}"
            )
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    if dtype == torch.float64 and weights[0].dtype != torch.float64:
        raise TypeError(f"dtype: float64 needs a float64 weight, got {weights[0].dtype}")
    return scales


# The registered operators, for torch.compile and torch.export. An empty list of gains is none.


# The first call of a set of layers leaves tables on the device, which must not lie in the memory of
# a CUDA graph of Inductor's: it would take them back.
_KEEPS_TABLES = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op(
    "bitkern::weight_standardize",
    mutates_args=(),
    schema="(Tensor[] weights, Tensor[] gains, float[] scales, float eps, bool eps_outside,"
    " bool unbiased, ScalarType dtype, bool channels_last) -> (Tensor[] outs, Tensor stats)",
    tags=_KEEPS_TABLES,
)
def _weight_standardize(
    weights: list[Tensor],
    gains: list[Tensor],
    scales: list[float],
    eps: float,
    eps_outside: bool,
    unbiased: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[list[Tensor], Tensor]:
    weights = [dense(w) for w in weights]
    variant = Variant(eps, eps_outside, unbiased)
    kernels = choose_launchers("weight_standardize", weights[0])
    return kernels.weight_standardize_forward(
        weights, gains or None, scales, variant, dtype, channels_last
    )


@_weight_standardize.register_fake
def _(weights: list[Tensor], *rest: Any) -> tuple[list[Tensor], Tensor]:
    *_, dtype, channels_last = rest
    return empty_standardized(weights, dtype, channels_last)


@torch.library.custom_op(
    "bitkern::weight_standardize_backward",
    mutates_args=(),
    schema="(Tensor[] douts, Tensor[] weights, Tensor[] gains, float[] scales, Tensor stats,"
    " float eps, bool eps_outside, bool unbiased) -> (Tensor[] dweights, Tensor[] dgains)",
    tags=_KEEPS_TABLES,
)
def _weight_standardize_backward(
    douts: list[Tensor],
    weights: list[Tensor],
    gains: list[Tensor],
    scales: list[float],
    stats: Tensor,
    *variant: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    douts, weights = [dense(d) for d in douts], [dense(w) for w in weights]
    kernels = choose_launchers("weight_standardize", weights[0])
    dweights, dgains = kernels.weight_standardize_backward(
        douts, weights, gains or None, scales, stats, Variant(*variant)
    )
    return dweights, dgains or []


@_weight_standardize_backward.register_fake
def _(
    douts: list[Tensor], weights: list[Tensor], gains: list[Tensor], *_: Any
) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.empty_like(dense(w)) for w in weights], [torch.empty_like(g) for g in gains]


# Autograd, the same for the registered operator and for eager mode.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    weights, gains, ctx.scales, *ctx.variant = inputs[:6]
    ctx.count = len(weights)
    ctx.save_for_backward(*weights, *gains, output[1])


def _gradients(ctx: Any, backward: Callable[..., Any], douts: Sequence[Tensor | None]) -> Any:
    """Gradients of weights and gains, None for those whose result was not used."""
    *parameters, stats = ctx.saved_tensors
    weights, gains = parameters[: ctx.count], parameters[ctx.count :]
    variant, given = Variant(*ctx.variant), [d for d in douts if d is not None]
    used = [i for i, d in enumerate(douts) if d is not None]
    if _torch.backward_is_differentiated(*given):
        stats = reference.filter_statistics(weights, variant)
        backward = reference.weight_standardize_backward
    else:
        given = [dense(dout) for dout in given]
    args = weights, gains or None, ctx.scales, stats, variant
    dweights, dgains = backward_used(backward, used, given, *args)
    if len(used) == len(weights):
        return dweights, dgains or []
    by_layer, gains_by_layer = (dict(zip(used, g, strict=True)) for g in (dweights, dgains or used))
    every = range(len(weights))
    return [by_layer.get(i) for i in every], [gains_by_layer.get(i) for i in every if gains]


def backward_used(
    backward: Callable[..., Any],
    used: Sequence[int],
    douts: Sequence[Tensor],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor] | None,
    scales: Sequence[float],
    stats: Tensor,
    variant: Variant,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Gradients of weights and gains of the layers ``used``, whose ``douts`` these are."""
    if not used:
        return [], []
    stats = stats_used(used, weights, stats)
    weights, scales = [weights[i] for i in used], [scales[i] for i in used]
    gains = gains and [gains[i] for i in used]
    return backward(douts, weights, gains, scales, stats, variant)  # type: ignore[no-any-return]


def stats_used(used: Sequence[int], weights: Sequence[Tensor], stats: Tensor) -> Tensor:
    """The statistics of the layers ``used``, in ascending order, out of those of all."""
    if len(used) == len(weights):
        return stats
    parts = torch.split(stats, [w.shape[0] for w in weights], 1)
    return torch.cat([parts[i] for i in used], 1)


def _op_backward(ctx: Any, douts: Sequence[Tensor | None], _: Tensor) -> Any:
    def registered(*arguments: Any) -> Any:
        douts, weights, gains, scales, stats, variant = arguments
        operator = torch.ops.bitkern.weight_standardize_backward
        return operator(douts, weights, gains or [], scales, stats, *variant)

    dweights, dgains = _gradients(ctx, registered, douts)
    return dweights, dgains, *[None] * 6


_weight_standardize.register_autograd(_op_backward, setup_context=_setup_context)


class WeightStandardizeFunction(torch.autograd.Function):
    """Takes (implementation, options, count, *weights, *gains), returns the weights' outs."""

    @staticmethod
    def forward(
        ctx: Any, implementation: Launchers, options: Any, count: int, *parameters: Tensor
    ) -> Any:
        weights, gains = parameters[:count], parameters[count:]
        outs, stats = implementation.weight_standardize_forward(weights, gains or None, *options)
        scales, variant, *_ = options
        _setup_context(ctx, (weights, gains, scales, *variant), (outs, stats))
        ctx.implementation = implementation
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> Any:
        dweights, dgains = _gradients(ctx, ctx.implementation.weight_standardize_backward, douts)
        return None, None, None, *dweights, *dgains


def weight_standardize_all(
    weights: Iterable[Tensor],
    variant: Variant = Variant(),  # noqa: B008 - immutable
    *,
    gains: Sequence[Tensor] | None = None,
    scales: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> list[Tensor]:
    """``weight_standardize`` of many layers in one launch; returns a list.

    ``variant`` is that of all layers, ``gains`` a list as long as ``weights`` or None, ``scales`` a
    list of floats or None for 1. All weights have one dtype and device. With ``channels_last`` the
    results are stored as (O, kh, kw, I), the layout in which convolutions on channels_last maps
    want them.
    """
    if not isinstance(variant, Variant):
        raise TypeError(f"variant: expected a Variant, got {type(variant).__name__}")
    weights = list(weights)
    if not weights:
        return []
    scales = check(weights, gains, scales, dtype, channels_last, variant.unbiased)
    dtype = dtype or weights[0].dtype
    choice = choose("weight_standardize", weights[0])
    if choice.name == "reference":
        options: Any = {"dtype": dtype, **variant._asdict()}
        every: Sequence[Tensor | None] = gains or [None] * len(weights)
        format = torch.channels_last if channels_last else torch.contiguous_format
        return [
            reference.weight_standardize(w, gain=gain, scale=scale, **options).contiguous(
                memory_format=format
            )
            for w, gain, scale in zip(weights, every, scales, strict=True)
        ]
    if torch.compiler.is_compiling():
        arguments = weights, list(gains or []), scales, *variant, dtype, channels_last
        outs: list[Tensor] = torch.ops.bitkern.weight_standardize(*arguments)[0]
        return outs
    implementation = launchers(choice.name, "weight_standardize")
    parameters = [dense(w) for w in weights] + [g.contiguous() for g in gains or ()]
    constants = scales, variant, dtype, channels_last
    return list(
        WeightStandardizeFunction.apply(implementation, constants, len(weights), *parameters)
    )


@operator("weight_standardize")
def weight_standardize(
    weight: Tensor,
    eps: float = 1e-10,
    *,
    gain: Tensor | None = None,
    scale: float = 1.0,
    eps_outside: bool = False,
    unbiased: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Weight standardization (Qiao et al., arXiv 1903.10520) of a convolution's weight.

    ``gain * scale * (w - mean) / sqrt(var + eps)`` with the mean and variance of each output
    filter. The gradient is finite at zero variance: such a filter and its gradient's projection
    are zero. The variants in use:

    ==========================  ======================================================
    BiT                         the defaults
    timm and transformers' BiT  ``eps=1e-8``
    the paper's code, mmcv      ``eps=1e-5, eps_outside=True, unbiased=True``
    vision_transformer (jax)    ``eps=1e-5, eps_outside=True``
    NFNets (arXiv 2101.08692)   ``eps=1e-5, gain=g, scale=gamma * fan_in ** -0.5``
    ==========================  ======================================================

    Args:
        weight: (O, I, *kernel), any floating dtype and strides; computed in float32 (or float64).
        eps: added to the variance, or to its root with ``eps_outside``.
        gain: one factor per filter, e.g. (O, 1, 1, 1), of weight's dtype, or None.
        scale: a further constant factor.
        eps_outside: divide by ``sqrt(var) + eps`` instead of ``sqrt(var + eps)``.
        unbiased: divide the sum of squares by K - 1 instead of K.
        dtype: of the result; by default that of ``weight``.

    Returns:
        A tensor with the shape and memory format of ``weight``.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    channels_last = weight.ndim == 4 and not dense(weight).is_contiguous()
    (out,) = weight_standardize_all(
        [weight],
        Variant(eps, eps_outside, unbiased),
        gains=None if gain is None else [gain],
        scales=[scale],
        dtype=dtype,
        channels_last=channels_last,
    )
    return out
