"""Launchers of weight standardization: one layer, or all layers of a model in one launch."""

import functools
import struct
from typing import NamedTuple

import torch
import triton.language as tl

from bitkern.backends.backend import empty_standardized
from bitkern.backends.triton import config
from bitkern.backends.triton.kernels import weight_standardize as kernels
from bitkern.backends.triton.launch import launch, refuse_capture

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_POINTERS_AT_A_TIME = 64


class _Layer(NamedTuple):
    """Sizes of one layer, for a kernel that goes through a filter in the order of ``own``."""

    filters: int
    length: int
    permuted_dim: int  # the dimension exchanged with the other tensor's; length where none is
    aligned: bool
    scale: float


def _layer(own, other, tensors, scale):
    length = own.shape[1:].numel()
    permuted_dim = length
    if length and own.is_contiguous() != other.is_contiguous():
        permuted_dim = length // own.shape[1] if own.is_contiguous() else own.shape[1]
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return _Layer(
        own.shape[0], length, permuted_dim, length % 8 == 0 and addresses % 16 == 0, float(scale)
    )


@functools.cache  # unbounded: a captured CUDA graph goes on reading them
def _layer_tables(layers, device, tiles=config.FILTER_TILES):
    """sizes and programs on the device, long filters first."""
    refuse_capture("weight_standardize")
    sizes, programs, first_stat = [], [], 0
    for layer in layers:
        kind = config.filter_kind(layer.length, layer.aligned, tiles)
        (scale,) = struct.unpack("i", struct.pack("f", layer.scale))
        sizes.append((layer.filters, layer.length, layer.permuted_dim, first_stat, scale, kind))
        first_stat += layer.filters
    for i in sorted(range(len(layers)), key=lambda i: -layers[i].length):
        step = tiles[sizes[i][-1]].filters
        programs += [(i, first) for first in range(0, layers[i].filters, step)]
    return (
        torch.tensor(sizes, dtype=torch.int64, device=device),
        torch.tensor(programs, dtype=torch.int32, device=device),
    )


def _pointers(tensors):
    """Addresses of the layers' tensors, on the device."""
    addresses = [t.data_ptr() for layer in tensors for t in layer if t is not None]
    addresses += addresses[-1:] * (-len(addresses) % _POINTERS_AT_A_TIME)
    table = tensors[0][0].new_empty(len(addresses), dtype=torch.int64)
    for first in range(0, len(addresses), _POINTERS_AT_A_TIME):
        chunk = tuple(addresses[first : first + _POINTERS_AT_A_TIME])
        launch(kernels.weight_standardize_store_pointers, 1, (table,), (first, chunk), (), 1)
    return table


def _layers(tensors, scales):
    """Sizes of the layers, and whether any has a permuted dimension."""
    layers = [_layer(t[1], t[0], t, scale) for t, scale in zip(tensors, scales, strict=True)]
    return tuple(layers), any(layer.permuted_dim != layer.length for layer in layers)


def _launch(one, many, tensors, scales, gains, stats, variant, dtypes):
    """The kernel for one layer, or that for many; tensors: a tuple per layer, some of them None."""
    layers, permuted = _layers(tensors, scales)
    eps, *variant = variant
    if len(layers) > 1:
        sizes, programs = _layer_tables(layers, stats.device)
        pointers = (sizes, programs, _pointers(tensors), stats)
        dtypes = [_DTYPES[dtype] for dtype in dtypes]
        options = (*dtypes, int(gains is not None), *variant, permuted, config.FILTER_TILES)
        numbers = (stats.shape[1], float(eps))
        launch(many, len(programs), pointers, numbers, options, config.FILTER_WARPS)
        return
    ((filters, length, permuted_dim, aligned, scale),) = layers
    tile, warps = config.filter_tile(filters, length, aligned)
    options = (*variant, *tile, permuted)
    numbers = (filters, length, permuted_dim, scale, float(eps))
    programs = -(-filters // tile.filters)
    launch(one, programs, (*tensors[0], stats), numbers, options, warps)


def weight_standardize_forward(weights, gains, scales, variant, dtype, channels_last):
    """``(outs, stats)`` of many layers; stats (2, filters of all layers) fp32.

    weights (O, I, *kernel), dense, each in either memory format; outs in the one asked for.
    """
    outs, stats = empty_standardized(weights, dtype, channels_last)
    if stats.numel() == 0:
        return outs, stats
    tensors = list(zip(weights, outs, gains or [None] * len(weights), strict=True))
    one, many = kernels.weight_standardize_forward_one, kernels.weight_standardize_forward_all
    _launch(one, many, tensors, scales, gains, stats, variant, (weights[0].dtype, dtype))
    return outs, stats


def weight_standardize_backward(douts, weights, gains, scales, stats, variant):
    """``(dweights, dgains or None)`` of many layers, like weights and gains.

    douts of one dtype, dense, each in either memory format.
    """
    dweights = [torch.empty_like(w) for w in weights]
    dgains = None if gains is None else [torch.empty_like(gain) for gain in gains]
    if stats.numel() == 0:
        return dweights, dgains
    none = [None] * len(weights)
    tensors = list(zip(douts, weights, dweights, gains or none, dgains or none, strict=True))
    one, many = kernels.weight_standardize_backward_one, kernels.weight_standardize_backward_all
    _launch(one, many, tensors, scales, gains, stats, variant, (weights[0].dtype, douts[0].dtype))
    return dweights, dgains


def weight_standardize_sgd(douts, weights, buffers, scales, stats, variant, options):
    """Backward, and a step of SGD on weights and the buffers of their momentum, in place.

    All fp32; douts dense, each in either memory format, weight and buffer of a layer in one.
    """
    if stats.numel() == 0:
        return
    tensors = list(zip(douts, weights, buffers, strict=True))
    layers, permuted = _layers(tensors, scales)
    sizes, programs = _layer_tables(layers, stats.device, config.SGD_TILES)
    eps, *variant = variant
    lr, (_, momentum, dampening, decay, nesterov) = options.lr_on(stats.device), options
    pointers = (sizes, programs, _pointers(tensors), stats, lr)
    numbers = (stats.shape[1], *map(float, (eps, momentum, 1 - dampening, decay)))
    constants = (*variant, permuted, nesterov, config.SGD_TILES)
    kernel = kernels.weight_standardize_sgd_all
    launch(kernel, len(programs), pointers, numbers, constants, config.FILTER_WARPS)
