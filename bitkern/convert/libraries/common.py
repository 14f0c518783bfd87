"""What the layers, blocks and stages of timm and transformers have in common."""

from typing import Any

import torch
from torch import Tensor, nn

from bitkern.nn import GroupNormAct, WSConv2d, preact
from bitkern.nn.activations import act_of
from bitkern.nn.fused import has_hooks
from bitkern.nn.layers import conv_fusion
from bitkern.ops import Conv
from bitkern.reference import Activation


class StandardizedConv(WSConv2d):
    """Biased variance, eps under the root, as in all libraries; they have ``eps`` themselves.

    Subclasses take the library's ``__init__``: adapters build layers by ``type(layer)(...)``.
    """

    eps_outside = unbiased = False
    forward = nn.Conv2d.forward


class PaddedConv(StandardizedConv):
    """A convolution that may pad its input by as much as that needs."""

    def pads(self) -> bool:
        """Whether this one does."""
        raise NotImplementedError

    def padded(self, x: Tensor) -> Tensor:
        """``x``, padded."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.Conv2d.forward(self, self.padded(x) if self.pads() else x)
        return y

    def fusion(self) -> Conv | None:
        own = type(self).forward is PaddedConv.forward
        return conv_fusion(self) if own and not self.pads() else None


class Norm:
    """Mixin of norms; they say what is fused by a ``fusion`` of their own."""

    forward = GroupNormAct.forward
    takes = GroupNormAct.takes
    __prepare_scriptable__ = GroupNormAct.__prepare_scriptable__


def fusion(*modules: nn.Module) -> tuple[Activation, tuple[nn.Module, ...]]:
    """``GroupNormAct.fusion`` of a norm that calls ``modules``, the last an activation."""
    act = "none" if type(modules[-1]) is nn.Identity else act_of(modules[-1])
    identities = all(type(module) is nn.Identity for module in modules[:-1])
    if act is None or not identities or any(has_hooks(module) for module in modules):
        return "none", modules
    return act, ()


class Paired(preact.Paired):
    """Mixin of blocks and stages."""

    def forward(self, x: Any) -> Any:
        # torch.fx records the library's own forward, of layers that it can look into.
        if isinstance(x, torch.fx.Proxy):
            return super(preact.Paired, self).forward(x)  # type: ignore[misc]
        return super().forward(x)


class Bottleneck(Paired, preact.Bottleneck):
    """Mixin of pre-activation bottlenecks. ``shortcuts`` are the classes of their downsample."""

    shortcuts: tuple[type, ...] = ()
    drop_path: nn.Module

    @staticmethod
    def fits(module: Any) -> bool:
        norms = module.norm1, module.norm2, module.norm3
        return all(type(norm).forward is GroupNormAct.forward for norm in norms)

    def projection(self) -> nn.Module | None:
        """The shortcut's convolution, where pool and norm beside it do nothing; else all of it."""
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


class Stage(Paired, preact.Stage):
    """Mixin of stages."""

    grad_checkpointing = False

    @classmethod
    def fits(cls, module: Any) -> bool:
        return all(isinstance(block, Bottleneck) for block in cls.parts(module))

    def pair(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if self.grad_checkpointing:  # as the library does it
            return super(preact.Paired, self).forward(preact.summed(x, residual)), None  # type: ignore[misc]
        return super().pair(x, residual)
