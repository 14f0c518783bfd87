"""Conversion of existing models, whose layers then run on these kernels.

``convert`` assigns to ``module.__class__`` a subclass of the module's class that computes the same
with the kernels. Everything else of the module stays what it is: parameters and their names, hooks,
buffers, modules inside, flags, the attributes that its library reads, and the references to it that
hooks, wrappers and users hold. A new module in its place would keep the parameters alone.
"""

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from bitkern import _torch
from bitkern.convert.batchnorm import standardize
from bitkern.convert.classes import convert_classes
from bitkern.convert.libraries import replacements
from bitkern.nn.norms import INSTANCE_NORMS, GroupNorm

_Module = TypeVar("_Module", bound=nn.Module)


def is_bitkern(module: nn.Module) -> bool:
    """Return whether a module's class is one of this package, not a subclass of it."""
    return type(module).__module__.split(".")[0] == "bitkern"


def convert(
    module: _Module, ws: bool = False, classes: Mapping[type, Any] | None = None
) -> _Module:
    """Run the norms and standardized convolutions of ``module`` on the kernels, in place.

    Converted are timm's ``StdConv2d``, ``ScaledStdConv2d`` (with ``Same`` or without),
    ``GroupNormAct``, ``GroupNorm1Act``, ``GroupNorm`` and ``GroupNorm1``, transformers'
    ``WeightStandardizedConv2d`` and ``BitGroupNormActivation``, ``nn.GroupNorm``, and
    ``nn.InstanceNorm1d`` to ``3d`` without running statistics; in pre-activation (BiT) models of
    both libraries also the blocks, which keep less for backward, and in whole ones the weights are
    standardized in one launch. In blocks of any other class the norm alone runs on a kernel:
    ``torch.compile(module, backend="bitkern")`` fuses what follows it. Parameters and
    ``state_dict`` keys, optimizer state, hooks, modes, dtypes and devices are left alone.
    Subclasses are not converted: what they compute is their own. ``bitkern.explain`` of the module
    tells what was converted, what not, and why; where there is nothing to convert a warning says
    what would be.

    Results differ from the peer's by rounding alone, except that under autocast a norm keeps its
    input's dtype, where PyTorch returns float32.

    Args:
        module: any ``nn.Module``, on any device, trained or not, in either mode.
        ws: first turn ``nn.BatchNorm2d`` into GroupNorm (of gcd(32, channels) groups, with the
            same weight and bias) and ``nn.Conv2d`` into ``bitkern.nn.WSConv2d``, where
            torch.fx or an ``nn.Sequential`` shows that batch normalization alone follows it. That
            is another network, for training; it has no running statistics.
        classes: convolutions and norms of classes that bitkern does not know: ``{TheirConv:
            WSConv2d, TheirNorm: GroupNormAct}``, or ``functools.partial`` of these with the
            variant of the formula. Each is first compared on random input.

    Returns:
        ``module``.

    Raises:
        TypeError: for what is no ``nn.Module``, or what is compiled already.
        ValueError: with ``ws``, if there is no such convolution; with ``classes``, if one computes
            something else, and by how much, or is not in the module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"convert: expected an nn.Module, got {type(module).__name__}")
    for name, part in module.named_modules():
        compiler = _compiler(part)
        if compiler:
            where = name or "the module"
            raise TypeError(f"convert: {where} is compiled by {compiler}: convert it before that")
    if classes:
        convert_classes(module, classes)
    if ws:
        standardize(module)
    layers, blocks = replacements("LAYERS"), replacements("BLOCKS")
    layers[nn.GroupNorm] = GroupNorm
    # Inner modules first: a block is converted if its parts are.
    for part in reversed(list(module.modules())):
        if "forward" in vars(part):  # its own forward, not that of its class, is called
            continue
        cls = layers.get(type(part))
        if type(part) in INSTANCE_NORMS and not part.track_running_stats:
            cls = INSTANCE_NORMS[type(part)]
        elif type(part) in blocks and blocks[type(part)].fits(part):
            cls = blocks[type(part)]
        if cls is not None:
            part.__class__ = cls if isinstance(cls, type) else cls(part)
    if not any(map(is_bitkern, module.modules())):
        warnings.warn(_nothing(module), stacklevel=2)
    return module


def _nothing(module: nn.Module) -> str:
    """The warning that there was nothing to convert, and what ws=True would convert."""
    norms = sum(type(part) is nn.BatchNorm2d for part in module.modules())
    return (
        f"convert: nothing in {type(module).__name__} runs on bitkern: it has no GroupNorm, no "
        "InstanceNorm without running statistics and no weight-standardized convolution of a "
        'class that bitkern knows (torch.compile with backend="bitkern" knows any class)'
        + f"; with ws=True its {norms} BatchNorm2d become GroupNorm, to train anew"
        * (norms > 0)
    )


def _compiler(module: nn.Module) -> str | None:
    """The compiler of a module, which would not see a change of its class; else None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript"
    return "torch.compile" if _torch.compiled(module) else None
