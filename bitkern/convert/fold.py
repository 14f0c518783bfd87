"""Inference: standardized weights baked into plain convolutions."""

from typing import Any, TypeVar

from torch import nn

from bitkern import _torch, ops
from bitkern.convert.convert import is_bitkern
from bitkern.convert.libraries import replacements
from bitkern.nn import WSConv2d

_Module = TypeVar("_Module", bound=nn.Module)


def fold(module: _Module) -> _Module:
    """Make every ``bitkern.nn.WSConv2d`` in ``module`` a plain ``nn.Conv2d``, in place.

    Its weight becomes the standardized one, with gain and scale, in the same dtype and layout; it
    is a new parameter, and a gain is no parameter any more. Nothing is standardized afterwards:
    for training, keep a ``copy.deepcopy`` of the module. GroupNorm and what is fused stay fused.
    Convolutions that pad by the size of their input keep that: they become a subclass.

    Returns:
        ``module``.

    Raises:
        TypeError: for what is no ``nn.Module``.
        ValueError: for a layer that cannot be folded, naming it; then nothing has been changed.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"fold: expected an nn.Module, got {type(module).__name__}")
    foreign = tuple(cls for cls in replacements("LAYERS") if issubclass(cls, nn.Conv2d))
    convs: list[Any] = []
    for name, conv in module.named_modules():
        if isinstance(conv, WSConv2d) or isinstance(conv, foreign):
            reason = _refusal(conv)
            if reason:
                raise ValueError(f"fold: {name or 'the module'} ({type(conv).__name__}) {reason}")
            convs.append(conv)
    for conv in convs:
        gain = None if conv.gain is None else conv.gain.detach()
        options = {"gain": gain, "scale": conv.scale, **conv.variant._asdict()}
        weight = ops.weight_standardize(conv.weight.detach(), **options)
        conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
        for name in ("eps", "scale", "gain", "eps_outside", "unbiased"):
            vars(conv).pop(name, None)
        _torch.drop_parameter(conv, "gain")
        conv.__class__ = conv.folded
    return module


def _refusal(conv: nn.Module) -> str | None:
    """Why a convolution cannot be folded; None if it can."""
    if not isinstance(conv, WSConv2d):
        return "is not converted: bitkern.convert the module first"
    if not is_bitkern(conv):
        return "is of a subclass: fold before wrapping or parametrizing it"
    if type(_torch.own_parameter(conv, "weight")) is not nn.Parameter:
        return "computes or shards its weight: remove pruning or sharding first"
    return None
