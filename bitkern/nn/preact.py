"""What the pre-activation blocks, stages and models of timm and transformers have in common.

They are the same network with the same names: norm1, conv1, … conv3, downsample, drop_path.
"""

import torch
from torch import nn

from bitkern.convert import ACTS
from bitkern.models.resnetv2 import total
from bitkern.nn import GroupNormAct, WSConv2d, norm_act_conv, watched

ACTS = {**ACTS, nn.Identity: "none"}


class StandardizedConv(WSConv2d):
    """Biased variance, eps under the root, as in all peers; they have ``eps`` themselves."""

    eps_outside = unbiased = False
    forward = nn.Conv2d.forward


def fusion(acts, *modules):
    """:meth:`GroupNormAct.fusion` of a norm that calls ``modules``, the last an activation."""
    act = acts.get(type(modules[-1]))
    idle = all(type(module) is nn.Identity for module in modules[:-1])
    if act is None or not idle or any(watched(module) for module in modules):
        return "none", modules
    return act, ()


def advance(module, x, residual):
    """``module`` on the sum of x and residual; the result is a pair as well, maybe (y, None)."""
    if isinstance(module, (Bottleneck, Stage)) and not watched(module):
        return module.pair(x, residual)
    return module(total(x, residual)), None


def through(modules, x, residual):
    """:func:`advance` through modules: a list, or an ``nn.Sequential`` that would be called."""
    called = not isinstance(modules, list)
    if called and (not isinstance(modules, nn.Sequential) or watched(modules)):
        return advance(modules, x, residual)
    for module in modules:
        x, residual = advance(module, x, residual)
    return x, residual


class Bottleneck:
    """Mixin of pre-activation bottlenecks. ``shortcuts`` are the classes of their downsample."""

    shortcuts = ()

    @staticmethod
    def fits(module):
        norms = module.norm1, module.norm2, module.norm3
        return all(type(norm).forward is GroupNormAct.forward for norm in norms)

    def pair(self, x, residual=None):
        """The block of x + residual, as branch and shortcut that the next kernel will sum."""
        convs = [] if self.downsample is None else [self._projection()]
        s, (*projected, branch) = norm_act_conv(self.norm1, [*convs, self.conv1], x, residual)
        _, (branch,) = norm_act_conv(self.norm2, [self.conv2], branch)
        _, (branch,) = norm_act_conv(self.norm3, [self.conv3], branch)
        return self.drop_path(branch), projected[0] if projected else s

    def _projection(self):
        """The shortcut's convolution, where pool and norm beside it do nothing; else all of it."""
        module = self.downsample
        idle = [m for m in module.children() if m is not getattr(module, "conv", None)]
        known = type(module) in self.shortcuts and all(type(m) is nn.Identity for m in idle)
        return module.conv if known and not any(watched(m) for m in (module, *idle)) else module

    def forward(self, x):
        # torch.fx records the library's own forward, of layers that it can look into.
        return super().forward(x) if isinstance(x, torch.fx.Proxy) else total(*self.pair(x))


class Stage:
    """Mixin of stages."""

    grad_checkpointing = False

    @classmethod
    def fits(cls, module):
        return all(isinstance(block, Bottleneck) for block in cls.parts(module))

    def parts(self):
        return self.blocks

    def pair(self, x, residual=None):
        """As :meth:`Bottleneck.pair`, through all blocks."""
        if self.grad_checkpointing:
            return super().forward(total(x, residual)), None
        return through(self.parts(), x, residual)

    def forward(self, x):
        return super().forward(x) if isinstance(x, torch.fx.Proxy) else total(*self.pair(x))
