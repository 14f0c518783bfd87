"""Instance normalization (Ulyanov et al., arXiv 1607.08022): GroupNorm with a group per channel."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitkern.nn import GroupNormAct
from bitkern.ops import group_norm_act
from bitkern.reference import ACTIVATIONS, Activation

torch.fx.wrap("group_norm_act")  # recorded as it is


class InstanceNorm(nn.Module):
    """Mixin of instance norms without running statistics."""

    __prepare_scriptable__ = GroupNormAct.__prepare_scriptable__

    dimensions: ClassVar[int]  # of a batch
    num_features: int
    weight: Any
    bias: Any
    eps: float

    def forward(self, input: Tensor, act: Activation = "none") -> Tensor:
        """Maps (N, num_features, *) -> the same shape, dtype and memory format.

        What else PyTorch takes, a sample without a batch say, or refuses, is left to it.
        """
        # torch.fx, which cannot follow the conditions, records what a batch takes.
        if isinstance(input, torch.fx.Proxy) or (
            input.ndim == self.dimensions
            and input.shape[1] == self.num_features
            and input.shape[2:].numel() > 1
        ):
            affine = self.num_features, self.weight, self.bias, self.eps
            return group_norm_act(input, *affine, act)
        return ACTIVATIONS[act](super().forward(input))


class InstanceNorm1d(InstanceNorm, nn.InstanceNorm1d):
    dimensions = 3


class InstanceNorm2d(InstanceNorm, nn.InstanceNorm2d):
    dimensions = 4


class InstanceNorm3d(InstanceNorm, nn.InstanceNorm3d):
    dimensions = 5


INSTANCE_NORMS: dict[type, type[InstanceNorm]] = {
    nn.InstanceNorm1d: InstanceNorm1d,
    nn.InstanceNorm2d: InstanceNorm2d,
    nn.InstanceNorm3d: InstanceNorm3d,
}
