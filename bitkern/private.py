"""Per-sample gradients of bitkern's layers for Opacus (https://opacus.ai).

Importing this module registers the layers of ``bitkern.nn``, and those that ``bitkern.convert``
puts into models of the libraries imported before it. Without it Opacus computes the same with
functorch and ``bitkern.reference``, in more time and memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn

from bitkern import _torch
from bitkern.convert.libraries import replacements
from bitkern.convert.libraries.common import PaddedConv
from bitkern.nn import GroupNormAct, WSConv2d
from bitkern.nn.norms import INSTANCE_NORMS, GroupNorm
from bitkern.ops.detached import weight_standardize_detached

# Elements of weight gradients in one launch: they fit a CPU's cache, and fill a GPU.
CHUNK = 1 << 20

GradSamples = dict[Tensor, Tensor]


def norm_grad_sample(layer: Any, activations: Sequence[Tensor], backprops: Tensor) -> GradSamples:
    """Compute gradients (N, C) of a norm's weight and bias with a norm whose parameters are (N, C).

    Args:
        layer: a ``GroupNormAct``, or another norm with a ``fusion``.
        activations: the arguments (N, C, *) [, scale, shift] of its forward pass.
        backprops: (N, C, *), the gradient of its result.

    Raises:
        NotImplementedError: if modules after the norm are random or have parameters.
    """
    _, modules = layer.fusion()
    random = any(type(module) is not nn.Identity for module in modules[:-1])
    if random or any(any(module.parameters()) for module in modules):
        raise NotImplementedError(
            f"bitkern.private: expected {type(layer).__name__} with an activation alone after its "
            f"norm, got {modules}"
        )
    names = {name: p for name, p in layer.named_parameters(recurse=False)}
    each = {
        name: p.detach().expand(len(backprops), -1).requires_grad_(p.requires_grad)
        for name, p in names.items()
    }
    twin = _torch.with_parameters(layer, {"weight": None, "bias": None} | each)
    wanted = [name for name, p in names.items() if p.requires_grad]
    with torch.enable_grad():
        y = twin.forward(*activations)
        grads = torch.autograd.grad(y, [each[name] for name in wanted], backprops)
    return {names[name]: grad for name, grad in zip(wanted, grads, strict=True)}


def conv_grad_sample(
    layer: WSConv2d, activations: Sequence[Tensor], backprops: Tensor
) -> GradSamples:
    """Compute gradients (N, *) of the parameters of a convolution with a standardized weight.

    The standardization's backward treats the samples' gradients as layers with the same weight,
    several in one launch.

    Args:
        layer: a ``WSConv2d``.
        activations: its input (N, I, H, W).
        backprops: (N, O, H', W'), the gradient of its result.
    """
    samples, weight, gain = len(backprops), layer.weight, layer.gain
    grads: GradSamples = {
        p: p.new_empty(samples, *p.shape) for p in layer.parameters() if p.requires_grad
    }
    if layer.bias in grads:
        grads[layer.bias] = backprops.sum((2, 3))
    if not grads.keys() & {weight, gain}:
        return grads
    x, step = activations[0].to(backprops.dtype), max(1, CHUNK // weight.numel())
    one = weight_standardize_detached(
        [weight],
        layer.variant,
        gains=None if gain is None else [gain],
        scales=[layer.scale],
        dtype=backprops.dtype,
        channels_last=False,
    )
    for first in range(0, samples, step):
        douts = _conv_weight_grads(layer, x[first : first + step], backprops[first : first + step])
        n = len(douts)
        each = one._replace(
            weights=one.weights * n,
            gains=one.gains and one.gains * n,
            scales=one.scales * n,
            stats=one.stats.repeat(1, n),
        )
        for p, found in zip((weight, gain), each.backward(dict(enumerate(douts))), strict=True):
            if p in grads:
                for i, grad in found.items():
                    grads[p][first + i] = grad
    return grads


def _conv_weight_grads(layer: WSConv2d, x: Tensor, backprops: Tensor) -> Tensor:
    """Compute gradients (N, O, I / groups, kh, kw) of the standardized weight."""
    if isinstance(layer, PaddedConv):
        x = layer.padded(x)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, _torch.padding_of(layer), mode)
    columns = F.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)
    grouped = len(x), layer.groups, -1, columns.shape[-1]
    grads = backprops.reshape(grouped) @ columns.view(grouped).mT
    return grads.view(len(x), *layer.weight.shape)


_classes = [cls for cls in replacements("LAYERS").values() if isinstance(cls, type)]
_convs = [cls for cls in _classes if issubclass(cls, WSConv2d)]
_norms = [cls for cls in _classes if getattr(cls, "forward", None) is GroupNormAct.forward]
register_grad_sampler([WSConv2d, *_convs])(conv_grad_sample)
register_grad_sampler([GroupNormAct, GroupNorm, *INSTANCE_NORMS.values(), *_norms])(
    norm_grad_sample
)
