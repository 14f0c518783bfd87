"""PyTorch's own norms on the kernels, as ``bitkern.convert`` puts them in."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitkern.nn.layers import GroupNormAct
from bitkern.ops import group_norm_act
from bitkern.reference import Activation

torch.fx.wrap("group_norm_act")  # torch.fx records the call


class Norm:
    """Mixin of norms, with nothing after them unless a subclass says so."""

    __prepare_scriptable__ = GroupNormAct.__prepare_scriptable__
    takes = GroupNormAct.takes
    forward = GroupNormAct.forward

    def fusion(self) -> tuple[Activation, tuple[nn.Module, ...]]:
        """As ``GroupNormAct.fusion``."""
        return "none", ()


class GroupNorm(Norm, nn.GroupNorm):
    """``nn.GroupNorm``, with nothing after it."""


class InstanceNorm(nn.Module):
    """Mixin of instance norms (Ulyanov et al., arXiv 1607.08022): a group for each channel."""

    __prepare_scriptable__ = GroupNormAct.__prepare_scriptable__
    fusion = Norm.fusion

    dimensions: ClassVar[int]  # of a batch
    num_features: int
    weight: Any
    bias: Any
    eps: float
    track_running_stats: bool

    @property
    def num_groups(self) -> int:
        return self.num_features

    def takes(self, input: Tensor) -> bool:
        """Return whether an input is a batch that PyTorch accepts and a kernel supports."""
        features = input.ndim == self.dimensions and input.shape[1] == self.num_features
        return features and input.shape[2:].numel() > 1 and not self.track_running_stats

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, num_features, *) -> the same shape, dtype and memory format.

        Any other input, such as a sample without a batch, is left to PyTorch.
        """
        # torch.fx cannot follow the conditions and records the kernel.
        symbol = isinstance(input, torch.fx.Proxy) and not self.track_running_stats
        if symbol or self.takes(input):
            affine = self.num_features, self.weight, self.bias, self.eps
            return group_norm_act(input, *affine, "none")
        y: Tensor = super().forward(input)
        return y


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
