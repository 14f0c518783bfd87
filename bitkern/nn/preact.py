"""Pre-activation blocks that hand each other sums still to be made.

A block of He et al., arXiv 1603.05027, ends in ``branch + shortcut``, and the next one begins with
a norm of that sum. Here a block returns the two as a pair, and the next block's first operator adds
them in the pass that normalizes the sum. The blocks of timm and transformers have the same parts
with the same names: norm1, conv1, … conv3, downsample.
"""

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from bitkern.nn.fused import has_hooks, norm_act_conv


def summed(x: Tensor, residual: Tensor | None) -> Tensor:
    """The sum that a pair stands for."""
    return x if residual is None else x + residual


class Paired:
    """Mixin of modules whose result is a pair as well."""

    def pair(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The module on the sum of x and residual, as two summands; the second may be None."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) -> maps."""
        return summed(*self.pair(x))


def advance(module: Any, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``module`` on the sum of x and residual, as a pair.

    Called, where hooks watch it or it is no ``Paired`` but a wrapper, say.
    """
    if isinstance(module, Paired) and not has_hooks(cast(nn.Module, module)):
        return module.pair(x, residual)
    return module(summed(x, residual)), None


def through(
    modules: Iterable[nn.Module], x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """``advance`` through modules: a list, or an ``nn.Sequential`` that would be called."""
    called = not isinstance(modules, list)
    if called and (not isinstance(modules, nn.Sequential) or has_hooks(modules)):
        return advance(modules, x, residual)
    for module in modules:
        x, residual = advance(module, x, residual)
    return x, residual


class Bottleneck(Paired):
    """Mixin of pre-activation bottlenecks."""

    recompute = True  # the activations in backward, instead of keeping them
    downsample: Any
    norm1: nn.Module
    norm2: nn.Module
    norm3: nn.Module
    conv1: nn.Module
    conv2: nn.Module
    conv3: nn.Module

    def projection(self) -> nn.Module | None:
        """The module that makes the shortcut of the first activation; None if that is the input."""
        return self.downsample  # type: ignore[no-any-return]

    def finish(self, branch: Tensor) -> Tensor:
        """What comes between the last convolution and the sum."""
        return branch

    def pair(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The block of x + residual: branch and shortcut."""
        projection = self.projection()
        convs = [self.conv1] if projection is None else [projection, self.conv1]
        s, (*projected, branch) = self._norm_act_conv(self.norm1, convs, x, residual)
        _, (branch,) = self._norm_act_conv(self.norm2, [self.conv2], branch)
        _, (branch,) = self._norm_act_conv(self.norm3, [self.conv3], branch)
        return self.finish(branch), projected[0] if projected else s

    def _norm_act_conv(
        self,
        norm: nn.Module,
        convs: list[nn.Module],
        x: Tensor,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        return norm_act_conv(norm, convs, x, residual, self.recompute)


class Stage(Paired):
    """Mixin of stages, runs of blocks."""

    blocks: Any

    def parts(self) -> Any:
        """The blocks: a list, or an ``nn.Sequential`` that would be called."""
        return self.blocks

    def pair(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As ``Bottleneck.pair``, through all blocks."""
        return through(self.parts(), x, residual)
