"""Convolutions: what they are called with, and the fastest way to compute them.

Where a processor has matrix units (AMX), oneDNN's convolutions fall behind its matrix products.
There, convolutions that are one node with the norm before them use products for bfloat16 maps in
channels_last: for 1x1 convolutions, which multiply a matrix (N * H * W, C), and for the gradients
of the weights of small maps, whose windows are all gathered. docs/performance.md has the
measurements.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkern import _torch
from bitkern.ops.ws_conv2d import autocast_dtype

SMALL = 14 * 14  # pixels of a map, and
WIDE = 256 * 256  # input times output channels, for which gathering all windows is faster
WINDOWS = 1 << 26  # elements of all windows, at most


class Conv(NamedTuple):
    """The arguments of a convolution besides its parameters; an int for each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def expanded(self, dimensions: int) -> "Conv":
        """The same arguments with an int for each dimension."""
        stride, padding, dilation, transposed, output_padding, groups = self
        parts = stride, padding, dilation, output_padding
        stride, padding, dilation, output_padding = (
            tuple(part) * dimensions if len(part) == 1 else tuple(part) for part in parts
        )
        return Conv(stride, padding, dilation, transposed, output_padding, groups)


def numeric_padding(
    padding: Any, dilation: Sequence[int], kernel_size: Sequence[int]
) -> tuple[int, ...] | None:
    """The numbers of a padding that may be ``"same"`` or ``"valid"``; None if sides differ."""
    if not isinstance(padding, str):
        return tuple(padding)
    if padding == "valid":
        return (0,) * len(kernel_size)
    both = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    return None if any(p % 2 for p in both) else tuple(p // 2 for p in both)


def convolution_parameters(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | None]] | None:
    """Weights and biases in the dtype of convolutions of x; None if that is not x's own."""
    autocast = autocast_dtype(x)
    if autocast not in (None, x.dtype):
        return None
    if autocast is not None:
        weights = [w.to(x.dtype) for w in weights]
        biases = [None if b is None else b.to(x.dtype) for b in biases]
    fit = all(p is None or p.dtype == x.dtype for p in (*weights, *biases))
    return (list(weights), list(biases)) if fit else None


def convolution(a: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
    """``torch.convolution``."""
    if not (_products(a) and _pointwise(weight, conv)):
        return torch.convolution(a, weight, bias, *conv)
    a = _strided(a, conv)
    rows, matrix = _rows(a), weight.flatten(1).t()
    out = rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)
    return _map(out, a)


def convolution_backward(
    dout: Tensor,
    a: Tensor,
    weight: Tensor,
    conv: Conv,
    mask: Sequence[bool],
    differentiated: bool,
) -> list[Tensor | None]:
    """Gradients of a, weight and bias, None where ``mask`` is False; by PyTorch's formulas if
    they are differentiated themselves."""
    products, dweight = not differentiated and _products(a), None
    if products and _pointwise(weight, conv):
        return _pointwise_backward(dout, a, weight, conv, mask)
    if products and mask[1] and _gathers(dout, weight, conv):
        dweight = _gathered_weight_gradient(dout, a, weight, conv)
        mask = mask[0], False, mask[2]
    args = dout, a, weight, [dout.shape[1]], *conv, mask
    da, other, dbias = torch.ops.aten.convolution_backward(*args)
    return [da, other if dweight is None else dweight, dbias]


def _products(a: Tensor) -> bool:
    """Return whether matrix products of a map are faster than its convolutions."""
    fits = a.ndim == 4 and a.dtype == torch.bfloat16 and a.device.type == "cpu"
    return fits and _torch.has_amx() and a.numel() > 0 and a.permute(0, 2, 3, 1).is_contiguous()


def _pointwise(weight: Tensor, conv: Conv) -> bool:
    plain = not conv.transposed and conv.groups == 1 and not any(conv.padding)
    return plain and weight.shape[2:].numel() == 1


def _gathers(dout: Tensor, weight: Tensor, conv: Conv) -> bool:
    pixels = dout.shape[2:].numel()
    small = pixels <= SMALL and weight.shape[:2].numel() >= WIDE
    small = small and len(dout) * pixels * weight[0].numel() <= WINDOWS
    return small and not conv.transposed and conv.groups == 1 and conv.dilation == (1, 1)


def _strided(a: Tensor, conv: Conv) -> Tensor:
    """The pixels that a 1x1 convolution reads."""
    if conv.stride == (1, 1):
        return a
    down, right = conv.stride
    return a[:, :, ::down, ::right].contiguous(memory_format=torch.channels_last)


def _rows(a: Tensor) -> Tensor:
    """(N, C, H, W) -> (N * H * W, C)."""
    return a.permute(0, 2, 3, 1).reshape(-1, a.shape[1])


def _map(rows: Tensor, like: Tensor) -> Tensor:
    """(N * H * W, C) -> (N, C, H, W) in channels_last."""
    n, _, height, width = like.shape
    return rows.view(n, height, width, rows.shape[1]).permute(0, 3, 1, 2)


def _pointwise_backward(
    dout: Tensor, a: Tensor, weight: Tensor, conv: Conv, mask: Sequence[bool]
) -> list[Tensor | None]:
    rows, (need_da, need_dweight, need_dbias) = _rows(dout), mask
    da = dweight = None
    if need_da:
        da = _map(rows @ weight.flatten(1), dout)
        if conv.stride != (1, 1):
            read = da
            da = torch.zeros_like(a)
            da[:, :, :: conv.stride[0], :: conv.stride[1]] = read
    if need_dweight:
        dweight = (rows.t() @ _rows(_strided(a, conv))).view_as(weight)
    return [da, dweight, rows.sum(0) if need_dbias else None]


def _gathered_weight_gradient(dout: Tensor, a: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    (down, right), (above, beside) = conv.stride, conv.padding
    padded = F.pad(a.permute(0, 2, 3, 1), (0, 0, beside, beside, above, above))
    n, channels, (height, width), (high, wide) = *a.shape[:2], dout.shape[2:], weight.shape[2:]
    sample, line, pixel, _ = padded.stride()
    strides = sample, line * down, pixel * right, line, pixel, 1
    windows = padded.as_strided((n, height, width, high, wide, channels), strides)
    dweight = _rows(dout).t() @ windows.reshape(n * height * width, -1)
    return dweight.view(-1, high, wide, channels).permute(0, 3, 1, 2)
