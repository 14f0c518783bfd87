"""Layers, blocks and models of transformers' BiT (https://github.com/huggingface/transformers)."""

import functools

from torch import nn
from transformers.activations import GELUActivation, MishActivation, SiLUActivation
from transformers.models.bit import modeling_bit as bit

from bitkern.convert.libraries import common
from bitkern.convert.libraries.common import PaddedConv, fusion
from bitkern.nn import activations as nn_activations
from bitkern.nn.norms import Norm
from bitkern.nn.standardized import per_forward

ACTS = nn_activations.ACTS | {
    SiLUActivation: "silu",
    GELUActivation: "gelu",
    MishActivation: "mish",
}


class PaddedConv2d(nn.Conv2d):
    """The folded form of a convolution with a dynamic ``pad``, a module."""

    def forward(self, x):
        return super().forward(self.pad(x))


class WeightStandardizedConv2d(PaddedConv, bit.WeightStandardizedConv2d):
    __init__ = bit.WeightStandardizedConv2d.__init__
    gain = None
    scale = 1.0

    @property
    def folded(self):
        return nn.Conv2d if self.pad is None else PaddedConv2d

    def padded(self, x):
        return x if self.pad is None else self.pad(x)


class BitGroupNormActivation(Norm, bit.BitGroupNormActivation):
    def fusion(self):
        return fusion(self.activation, acts=ACTS)


class BitPreActivationBottleneckLayer(common.Bottleneck, bit.BitPreActivationBottleneckLayer):
    shortcuts = (bit.BitDownsampleConv,)


class BitStage(common.Stage, bit.BitStage):
    def parts(self):
        return list(self.layers)  # taken one by one: the container is not called


class BitModel(bit.BitModel):
    @staticmethod
    def fits(module):
        return all(isinstance(stage, common.Stage) for stage in module.encoder.stages)

    @functools.wraps(bit.BitModel.forward)
    def forward(self, *args, **kwargs):
        with per_forward(self):
            return super().forward(*args, **kwargs)


LAYERS = {
    bit.WeightStandardizedConv2d: WeightStandardizedConv2d,
    bit.BitGroupNormActivation: BitGroupNormActivation,
}
BLOCKS = {
    bit.BitPreActivationBottleneckLayer: BitPreActivationBottleneckLayer,
    bit.BitStage: BitStage,
    bit.BitModel: BitModel,
}
