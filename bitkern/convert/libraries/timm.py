"""Layers, blocks and models of timm (https://github.com/huggingface/pytorch-image-models)."""

import contextlib

import torch
from timm import layers
from timm.layers import activations
from timm.models import resnetv2
from torch import nn

from bitkern.convert.libraries import common
from bitkern.convert.libraries.common import PaddedConv, StandardizedConv, fusion
from bitkern.nn import activations as nn_activations
from bitkern.nn.norms import Norm
from bitkern.nn.preact import add_residual, run_all_deferred
from bitkern.nn.standardized import per_forward

ACTS = nn_activations.ACTS | {
    activations.Swish: "silu",
    activations.GELU: "gelu",
    activations.Mish: "mish",
    activations.HardSwish: "hardswish",
}


class StdConv2d(StandardizedConv, layers.StdConv2d):
    __init__ = layers.StdConv2d.__init__
    gain = None
    scale = 1.0


class ScaledStdConv2d(StandardizedConv, layers.ScaledStdConv2d):
    __init__ = layers.ScaledStdConv2d.__init__


class Same(PaddedConv):
    @property
    def folded(self):
        return layers.Conv2dSame if self.same_pad else nn.Conv2d

    def padded(self, x):
        sizes = self.kernel_size, self.stride, self.dilation
        return layers.pad_same(x, *sizes) if self.same_pad else x


class StdConv2dSame(Same, layers.StdConv2dSame):
    __init__ = layers.StdConv2dSame.__init__
    gain = None
    scale = 1.0


class ScaledStdConv2dSame(Same, layers.ScaledStdConv2dSame):
    __init__ = layers.ScaledStdConv2dSame.__init__


class NormAct(Norm):
    def fusion(self):
        return fusion(self.drop, self.act, acts=ACTS)


class GroupNorm(Norm, layers.GroupNorm):
    pass


class GroupNorm1(Norm, layers.GroupNorm1):
    pass


class GroupNormAct(NormAct, layers.GroupNormAct):
    pass


class GroupNorm1Act(NormAct, layers.GroupNorm1Act):
    pass


class PreActBottleneck(common.Bottleneck, resnetv2.PreActBottleneck):
    shortcuts = resnetv2.DownsampleConv, resnetv2.DownsampleAvg


class ResNetStage(common.Stage, resnetv2.ResNetStage):
    pass


class ResNetV2(resnetv2.ResNetV2):
    @staticmethod
    def fits(module):
        return all(isinstance(stage, common.Stage) for stage in module.stages)

    def forward_features(self, x):
        if isinstance(x, torch.fx.Proxy):
            return super().forward_features(x)
        # A checkpointed stage standardizes its weights when it runs, and again in backward.
        checkpointed = any(getattr(stage, "grad_checkpointing", False) for stage in self.stages)
        with contextlib.nullcontext() if checkpointed else per_forward(self):
            return self.norm(add_residual(*run_all_deferred(self.stages, self.stem(x), None)))


LAYERS = {
    layers.StdConv2d: StdConv2d,
    layers.StdConv2dSame: StdConv2dSame,
    layers.ScaledStdConv2d: ScaledStdConv2d,
    layers.ScaledStdConv2dSame: ScaledStdConv2dSame,
    layers.GroupNorm: GroupNorm,
    layers.GroupNorm1: GroupNorm1,
    layers.GroupNormAct: GroupNormAct,
    layers.GroupNorm1Act: GroupNorm1Act,
}
BLOCKS = {
    resnetv2.PreActBottleneck: PreActBottleneck,
    resnetv2.ResNetStage: ResNetStage,
    resnetv2.ResNetV2: ResNetV2,
}
