"""Mixins for the layers, blocks and stages of timm and transformers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitkern.nn import GroupNormAct, WSConv2d, preact
from bitkern.nn.activations import ACTS, act_of
from bitkern.nn.fused import has_hooks
from bitkern.nn.layers import conv_fusion
from bitkern.nn.preact import Summands
from bitkern.ops import Conv
from bitkern.reference import Activation


class StandardizedConv(WSConv2d):
    """Biased variance, eps under the root, as in all libraries; they have ``eps`` themselves.

    Subclasses take the library's ``__init__``: adapters build layers by ``type(layer)(...)``.
    """

    eps_outside = unbiased = False
    forward = nn.Conv2d.forward


class PaddedConv(StandardizedConv):
    """A convolution that may pad its input according to its size; ``folded`` tells whether."""

    def padded(self, x: Tensor) -> Tensor:
        """Pad ``x``, or return it if the layer does not pad."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.Conv2d.forward(self, self.padded(x))
        return y

    def fusion(self) -> Conv | None:
        own = type(self).forward is PaddedConv.forward
        return conv_fusion(self) if own and self.folded is nn.Conv2d else None


def fusion(
    *modules: nn.Module, acts: Mapping[type, Activation] = ACTS
) -> tuple[Activation, tuple[nn.Module, ...]]:
    """``GroupNormAct.fusion`` of a norm that calls ``modules``, the last one of ``acts``."""
    act = "none" if type(modules[-1]) is nn.Identity else act_of(modules[-1], acts)
    identities = all(type(module) is nn.Identity for module in modules[:-1])
    if act is None or not identities or any(has_hooks(module) for module in modules):
        return "none", modules
    return act, ()


class DeferredResidual(preact.DeferredResidual):
    """Mixin of blocks and stages."""

    def forward(self, x: Any) -> Any:
        # torch.fx records the library's own forward, of layers that it can look into.
        if isinstance(x, torch.fx.Proxy):
            return super(preact.DeferredResidual, self).forward(x)  # type: ignore[misc]
        return super().forward(x)


class Bottleneck(DeferredResidual, preact.Bottleneck):
    """Mixin of pre-activation bottlenecks. ``shortcuts`` are the classes of their downsample."""

    shortcuts: tuple[type, ...] = ()
    drop_path: nn.Module

    @staticmethod
    def fits(module: Any) -> bool:
        norms = module.norm1, module.norm2, module.norm3
        return all(type(norm).forward is GroupNormAct.forward for norm in norms)

    def projection(self) -> nn.Module | None:
        """The shortcut's convolution if the rest of ``downsample`` does nothing; else all of it."""
        module = self.downsample
        if module is None:
            return None
        others = [m for m in module.children() if m is not getattr(module, "conv", None)]
        known = type(module) in self.shortcuts and all(type(m) is nn.Identity for m in others)
        alone = known and not any(has_hooks(m) for m in (module, *others))
        return module.conv if alone else module  # type: ignore[no-any-return]

    def finish(self, branch: Tensor) -> Tensor:
        dropped: Tensor = self.drop_path(branch)
        return dropped


class Stage(DeferredResidual, preact.Stage):
    """Mixin of stages."""

    grad_checkpointing = False

    @classmethod
    def fits(cls, module: Any) -> bool:
        return all(isinstance(block, Bottleneck) for block in cls.parts(module))

    def forward_deferred(self, x: Tensor, residual: Tensor | None = None) -> Summands:
        if self.grad_checkpointing:  # as the library does it
            x = preact.add_residual(x, residual)
            return super(preact.DeferredResidual, self).forward(x), None  # type: ignore[misc]
        return super().forward_deferred(x, residual)
