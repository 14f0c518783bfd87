"""Convolution with a standardized weight.

The weight is standardized, cast and laid out for the convolution by one kernel; the convolution
itself stays PyTorch's (cuDNN, oneDNN), which is compute-bound and fast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkern.backends import operator
from bitkern.layout import memory_format
from bitkern.ops.weight_standardize import weight_standardize_all
from bitkern.variant import Variant


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast converts the input of a convolution to; None if it does not."""
    device = x.device.type
    # meta has no autocast.
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def conv_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype a convolution of x runs in: autocast's where that is on, else that of x."""
    autocast = autocast_dtype(x)
    if autocast is not None:
        return autocast
    if x.dtype == weight.dtype or weight.dtype == torch.float32 and x.dtype.itemsize == 2:
        return x.dtype
    raise TypeError(
        f"x: expected the dtype of weight, {weight.dtype}, or a 16-bit dtype beside a float32 "
        f"weight, got {x.dtype}"
    )


def conv_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Return whether conv2d works in channels_last, so that it converts nothing itself."""
    return torch.channels_last in (memory_format(x), memory_format(weight))


def standardize_for(
    x: Tensor, weight: Tensor, variant: Variant, *, gain: Tensor | None, scale: float
) -> Tensor:
    """The weight standardized, cast and laid out for a convolution of x."""
    (weight,) = weight_standardize_all(
        [weight],
        variant,
        gains=None if gain is None else [gain],
        scales=[scale],
        dtype=conv_dtype(x, weight),
        channels_last=conv_channels_last(x, weight),
    )
    return weight


@operator("weight_standardize", tensors=slice(1, 2))
def ws_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    eps: float = 1e-10,
    *,
    gain: Tensor | None = None,
    scale: float = 1.0,
    eps_outside: bool = False,
    unbiased: bool = False,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with ``weight`` standardized per output filter.

    Under autocast the weight is standardized in float32 and emitted once in the region's dtype.
    Outside autocast a float32 weight also serves 16-bit maps.

    Args:
        x: (N, C, H, W) or (C, H, W).
        weight: (O, C / groups, kh, kw).
        bias: (O,) or None.
        stride, padding, dilation, groups: as in ``conv2d``.
        eps, gain, scale, eps_outside, unbiased: as in ``weight_standardize``.

    Returns:
        (N, O, H', W'), or without N as x.

    Raises:
        ValueError: the channels do not fit, and as ``weight_standardize``.
        TypeError: dtypes do not fit.
    """
    if weight.ndim != 4:
        raise ValueError(f"weight: expected shape (O, I, kh, kw), got {tuple(weight.shape)}")
    if x.ndim not in (3, 4):
        raise ValueError(f"x: expected shape (N, C, H, W) or (C, H, W), got {tuple(x.shape)}")
    if x.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"x: expected {weight.shape[1] * groups} channels for a weight of shape "
            f"{tuple(weight.shape)} in {groups} groups, got {x.shape[-3]}"
        )
    variant = Variant(eps, eps_outside, unbiased)
    weight = standardize_for(x, weight, variant, gain=gain, scale=scale)
    bias = None if bias is None else bias.to(weight.dtype)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
