"""Weight standardization of one layer or of many layers in one launch.

    out = gain * scale * (w - mean) / sqrt(var + eps)   or   ... / (sqrt(var) + eps)

mean and var per output filter. Backward keeps the weight and the statistics. Derivation:
docs/math.md.
"""

import torch
from torch.autograd.function import once_differentiable

from bitkern import reference
from bitkern.backend import choose, launchers
from bitkern.layout import dense


def _check(weights, gains, dtype, channels_last, unbiased):
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
    if dtype is None:
        return
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    if dtype == torch.float64 and weights[0].dtype != torch.float64:
        raise TypeError(f"dtype: float64 needs a float64 weight, got {weights[0].dtype}")


def _implementation(weight):
    return launchers(choose("weight_standardize", weight).name, "weight_standardize")


def _out_like(weight, dtype, channels_last):
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(weight, dtype=dtype, memory_format=format)


# The registered operators, for torch.compile and torch.export. An empty list of gains is none.


@torch.library.custom_op(
    "bitkern::weight_standardize",
    mutates_args=(),
    schema="(Tensor[] weights, Tensor[] gains, float[] scales, float eps, bool eps_outside,"
    " bool unbiased, ScalarType dtype, bool channels_last) -> (Tensor[] outs, Tensor stats)",
)
def _weight_standardize(weights, gains, *options):
    weights = [dense(w) for w in weights]
    implementation = _implementation(weights[0])
    return implementation.weight_standardize_forward(weights, gains or None, *options)


@_weight_standardize.register_fake
def _(weights, gains, scales, eps, eps_outside, unbiased, dtype, channels_last):
    outs = [_out_like(w, dtype, channels_last) for w in weights]
    filters = sum(w.shape[0] for w in weights)
    stats_dtype = reference.compute_dtype(weights[0].dtype)
    return outs, weights[0].new_empty((2, filters), dtype=stats_dtype)


@torch.library.custom_op(
    "bitkern::weight_standardize_backward",
    mutates_args=(),
    schema="(Tensor[] douts, Tensor[] weights, Tensor[] gains, float[] scales, Tensor stats,"
    " float eps, bool eps_outside, bool unbiased) -> (Tensor[] dweights, Tensor[] dgains)",
)
def _weight_standardize_backward(douts, weights, gains, *options):
    douts, weights = [dense(d) for d in douts], [dense(w) for w in weights]
    dweights, dgains = _implementation(weights[0]).weight_standardize_backward(
        douts, weights, gains or None, *options
    )
    return dweights, dgains or []


@_weight_standardize_backward.register_fake
def _(douts, weights, gains, scales, stats, eps, eps_outside, unbiased):
    return [torch.empty_like(dense(w)) for w in weights], [torch.empty_like(g) for g in gains]


# Autograd, the same for the registered operator and for eager mode.


def _setup_context(ctx, inputs, output):
    weights, gains, ctx.scales, *ctx.variant = inputs[:6]
    outs, stats = output
    ctx.count, ctx.dtype = len(weights), inputs[6]
    ctx.save_for_backward(*weights, *gains, stats)


def _gradients(ctx, backward, douts):
    *parameters, stats = ctx.saved_tensors
    weights, gains = parameters[: ctx.count], parameters[ctx.count :]
    return backward(douts, weights, gains, ctx.scales, stats, *ctx.variant)


def _op_backward(ctx, douts, _):
    dweights, dgains = _gradients(ctx, torch.ops.bitkern.weight_standardize_backward, douts)
    return dweights, dgains, *[None] * 6


_weight_standardize.register_autograd(_op_backward, setup_context=_setup_context)


class WeightStandardize(torch.autograd.Function):
    """Takes (implementation, options, count, *weights, *gains), returns the weights' outs."""

    @staticmethod
    def forward(ctx, implementation, options, count, *parameters):
        weights, gains = parameters[:count], parameters[count:]
        outs, stats = implementation.weight_standardize_forward(weights, gains or None, *options)
        _setup_context(ctx, (weights, gains, *options), (outs, stats))
        ctx.implementation = implementation
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *douts):
        def backward(douts, weights, gains, *rest):
            launch = ctx.implementation.weight_standardize_backward
            return launch(douts, weights, gains or None, *rest)

        dweights, dgains = _gradients(ctx, backward, [dense(d) for d in douts])
        return None, None, None, *dweights, *(dgains or ())


def weight_standardize_all(
    weights,
    eps=1e-10,
    *,
    gains=None,
    scales=None,
    eps_outside=False,
    unbiased=False,
    dtype=None,
    channels_last=False,
):
    """:func:`weight_standardize` of many layers in one launch; returns a list.

    ``gains`` is a list as long as ``weights`` or None, ``scales`` a list of floats or None for 1.
    All weights have one dtype and device. With ``channels_last`` the results are stored as
    (O, kh, kw, I), the layout in which convolutions on channels_last maps want them.
    """
    weights = list(weights)
    gains = None if gains is None else list(gains)
    scales = [1.0] * len(weights) if scales is None else list(scales)
    for name, values in (("gains", gains), ("scales", scales)):
        if values is not None and len(values) != len(weights):
            raise ValueError(f"{name}: expected {len(weights)}, one per weight, got {len(values)}")
    if not weights:
        return []
    _check(weights, gains, dtype, channels_last, unbiased)
    dtype = dtype or weights[0].dtype
    choice = choose("weight_standardize", weights[0])
    if choice.name == "reference":
        format = torch.channels_last if channels_last else torch.contiguous_format
        variant = dict(eps_outside=eps_outside, unbiased=unbiased, dtype=dtype)
        return [
            reference.weight_standardize(
                w, eps, gain=gains and gains[i], scale=scales[i], **variant
            ).contiguous(memory_format=format)
            for i, w in enumerate(weights)
        ]
    options = scales, eps, eps_outside, unbiased, dtype, channels_last
    if torch.compiler.is_compiling():
        return torch.ops.bitkern.weight_standardize(weights, gains or [], *options)[0]
    weights = [dense(w) for w in weights]
    gains = [] if gains is None else [g.contiguous() for g in gains]
    implementation = launchers(choice.name, "weight_standardize")
    return list(WeightStandardize.apply(implementation, options, len(weights), *weights, *gains))


def weight_standardize(
    weight, eps=1e-10, *, gain=None, scale=1.0, eps_outside=False, unbiased=False, dtype=None
):
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
        eps,
        gains=None if gain is None else [gain],
        scales=[scale],
        eps_outside=eps_outside,
        unbiased=unbiased,
        dtype=dtype,
        channels_last=channels_last,
    )
    return out
