"""Pre-activation blocks that defer the residual addition to the next block.

A block of He et al., arXiv 1603.05027, ends in ``branch + shortcut``, and the next one begins with
a norm of that sum. Here a block returns the two unsummed, and the next block's first operator adds
them in the pass that normalizes the sum. The blocks of timm and transformers have the same parts
with the same names: norm1, conv1, … conv3, downsample.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from bitkern.nn.fused import has_hooks, norm_act_conv

Summands = tuple[Tensor, Tensor | None]  # of a residual addition that is still to be made


def add_residual(x: Tensor, residual: Tensor | None) -> Tensor:
    """``x + residual``, or ``x`` without a residual."""
    return x if residual is None else x + residual


class DeferredResidual:
    """Mixin of modules that can leave the last residual addition to their successor."""

    def forward_deferred(self, x: Tensor, residual: Tensor | None = None) -> Summands:
        """The module applied to x + residual; returns two summands, the second may be None."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) -> maps."""
        return add_residual(*self.forward_deferred(x))


def run_deferred(module: Any, x: Tensor, residual: Tensor | None) -> Summands:
    """``module`` applied to x + residual, as two summands.

    A module with hooks, or without ``forward_deferred``, is called on the sum.
    """
    if isinstance(module, DeferredResidual) and not has_hooks(cast(nn.Module, module)):
        return module.forward_deferred(x, residual)
    return module(add_residual(x, residual)), None


def run_all_deferred(modules: Iterable[nn.Module], x: Tensor, residual: Tensor | None) -> Summands:
    """``run_deferred`` over modules: a list, or an ``nn.Sequential`` that would be called."""
    called = not isinstance(modules, list)
    if called and (not isinstance(modules, nn.Sequential) or has_hooks(modules)):
        return run_deferred(modules, x, residual)
    for module in modules:
        x, residual = run_deferred(module, x, residual)
    return x, residual


class Bottleneck(DeferredResidual):
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
        """The module that computes the shortcut; None if the shortcut is the input."""
        return self.downsample  # type: ignore[no-any-return]

    def finish(self, branch: Tensor) -> Tensor:
        """Apply what comes between the last convolution and the sum."""
        return branch

    def forward_deferred(self, x: Tensor, residual: Tensor | None = None) -> Summands:
        """The block applied to x + residual; returns branch and shortcut."""
        projection = self.projection()
        convs = [self.conv1] if projection is None else [projection, self.conv1]
        fused = partial(norm_act_conv, recompute=self.recompute)
        summed, (*projected, branch) = fused(self.norm1, convs, x, residual)
        _, (branch,) = fused(self.norm2, [self.conv2], branch)
        _, (branch,) = fused(self.norm3, [self.conv3], branch)
        return self.finish(branch), projected[0] if projected else summed


class Stage(DeferredResidual):
    """Mixin of stages, runs of blocks."""

    blocks: Any

    def parts(self) -> Any:
        """The blocks: a list, or an ``nn.Sequential`` that would be called."""
        return self.blocks

    def forward_deferred(self, x: Tensor, residual: Tensor | None = None) -> Summands:
        """As ``Bottleneck.forward_deferred``, through all blocks."""
        return run_all_deferred(self.parts(), x, residual)
