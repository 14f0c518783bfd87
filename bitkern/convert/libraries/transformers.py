"""Layers, blocks and models of transformers' BiT (https://github.com/huggingface/transformers)."""

import functools

from torch import nn
from transformers.models.bit import modeling_bit as bit

from bitkern.convert.libraries import common
from bitkern.convert.libraries.common import Norm, StandardizedConv, fusion
from bitkern.nn.standardized import per_forward


class WeightStandardizedConv2d(StandardizedConv, bit.WeightStandardizedConv2d):
    gain = None
    scale = 1.0


class PaddedConv2d(nn.Conv2d):
    """What folding leaves of a convolution with a dynamic ``pad``, a module."""

    def forward(self, x):
        return super().forward(self.pad(x))


class PaddedWeightStandardizedConv2d(WeightStandardizedConv2d):
    folded = PaddedConv2d

    def forward(self, x):
        return super().forward(self.pad(x))


class BitGroupNormActivation(Norm, bit.BitGroupNormActivation):
    def fusion(self):
        return fusion(self.activation)


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


def _convolution(module):
    return WeightStandardizedConv2d if module.pad is None else PaddedWeightStandardizedConv2d


LAYERS = {
    bit.WeightStandardizedConv2d: _convolution,
    bit.BitGroupNormActivation: BitGroupNormActivation,
}
BLOCKS = {
    bit.BitPreActivationBottleneckLayer: BitPreActivationBottleneckLayer,
    bit.BitStage: BitStage,
    bit.BitModel: BitModel,
}
