"""Gradients of each sample for Opacus (https://opacus.ai), as private training needs them.

Importing this module registers the layers of ``bitkern.nn``, and those that ``bitkern.convert``
puts into models of the libraries imported before it. Without it Opacus computes the same through
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
from bitkern.ops.weight_standardize import weight_standardize_detached

GradSamples = dict[nn.Parameter, Tensor]


def norm_grad_sample(layer: Any, activations: Sequence[Tensor], backprops: Tensor) -> GradSamples:
    """Gradients (N, C) of a norm's weight and bias, by a norm whose parameters are (N, C).

    Args:
        layer: a ``GroupNormAct``, or another norm with a ``fusion``.
        activations: the arguments (N, C, *) [, scale, shift] of its forward pass.
        backprops: (N, C, *), the gradient of its result.

    Raises:
        NotImplementedError: what the layer calls after its norm is random or has parameters.
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
    """Gradients (N, *) of the parameters of a convolution with a standardized weight.

    The gradients (N, O, I / groups, kh, kw) of the standardized weight go through the backward of
    the standardization together: it treats each filter by itself, be it of one sample or another.

    Args:
        layer: a ``WSConv2d``.
        activations: its input (N, I, H, W).
        backprops: (N, O, H', W'), the gradient of its result.
    """
    samples, shape = len(backprops), layer.weight.shape
    if samples == 0:
        return {p: p.new_zeros(0, *p.shape) for p in layer.parameters() if p.requires_grad}
    found = {}
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = backprops.sum((2, 3))
    gain = layer.gain
    if not (layer.weight.requires_grad or gain is not None and gain.requires_grad):
        return found
    dout = _conv_weight_grad(layer, activations[0].to(backprops.dtype), backprops)
    one = weight_standardize_detached(
        [layer.weight],
        layer.variant,
        gains=None if gain is None else [gain],
        scales=[layer.scale],
        dtype=dout.dtype,
        channels_last=False,
    )
    each = one._replace(
        weights=[w.repeat(samples, 1, 1, 1) for w in one.weights],
        gains=one.gains and [g.repeat(samples, 1, 1, 1) for g in one.gains],
        stats=one.stats.repeat(1, samples),
    )
    dweights, dgains = each.backward({0: dout.view(-1, *shape[1:])})
    if layer.weight.requires_grad:
        found[layer.weight] = dweights[0].view(samples, *shape)
    if gain is not None and gain.requires_grad:
        found[gain] = dgains[0].view(samples, *gain.shape)
    return found


def _conv_weight_grad(layer: WSConv2d, x: Tensor, backprops: Tensor) -> Tensor:
    """Gradients (N, groups, O / groups, K) of the weight that the convolution itself is given."""
    if isinstance(layer, PaddedConv) and layer.pads():
        x = layer.padded(x)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, _torch.padding_of(layer), mode)
    columns = F.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)
    of_groups = len(x), layer.groups, -1, columns.shape[-1]
    return backprops.reshape(of_groups) @ columns.view(of_groups).mT


_classes = [cls for cls in replacements("LAYERS").values() if isinstance(cls, type)]
_convs = [cls for cls in _classes if issubclass(cls, WSConv2d)]
_norms = [cls for cls in _classes if getattr(cls, "forward", None) is GroupNormAct.forward]
register_grad_sampler([WSConv2d, *_convs])(conv_grad_sample)
register_grad_sampler([GroupNormAct, GroupNorm, *INSTANCE_NORMS.values(), *_norms])(
    norm_grad_sample
)
