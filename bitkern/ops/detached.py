"""Standardized weights outside of autograd, whose backward is called by hand."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitkern.backends import Launchers, choose_launchers
from bitkern.layout import dense
from bitkern.ops.weight_standardize import backward_used, check, stats_used
from bitkern.variant import SgdOptions, Variant


class DetachedWeights(NamedTuple):
    """Standardized weights outside of autograd, and what their backward needs."""

    outs: list[Tensor]
    stats: Tensor
    weights: list[Tensor]
    gains: list[Tensor] | None
    scales: list[float]
    variant: Variant
    implementation: Launchers

    def backward(self, douts: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Gradients of weights and of gains by layer, for the layers in ``douts``."""
        launch = self.implementation.weight_standardize_backward
        args = self.weights, self.gains, self.scales, self.stats, self.variant
        given = [dense(dout) for dout in douts.values()]
        dweights, dgains = backward_used(launch, [*douts], given, *args)
        dgains_by_layer = dict(zip(douts, dgains, strict=True)) if self.gains and dgains else {}
        return dict(zip(douts, dweights, strict=True)), dgains_by_layer

    def can_step(self, i: int, weight: Tensor, buffer: Tensor) -> bool:
        """Return whether ``sgd`` takes the weight of a layer, whose momentum is in ``buffer``."""
        # The launchers of a backend from elsewhere need not have it.
        if self.gains is not None or not hasattr(self.implementation, "weight_standardize_sgd"):
            return False
        if weight.data_ptr() != self.weights[i].data_ptr():  # which was not dense
            return False
        weight = self.weights[i]
        layout = dense(buffer) is buffer and buffer.is_contiguous() == weight.is_contiguous()
        same = buffer.device == weight.device and buffer.shape == weight.shape
        return same and layout and buffer.dtype == weight.dtype == torch.float32

    def sgd(
        self, douts: Mapping[int, Tensor], buffers: Sequence[Tensor], options: SgdOptions
    ) -> None:
        """Backward and an optimizer's step, in one pass over weights, gradients and momentum.

        ``douts`` are float32, by layer; weights and ``buffers``, for which ``can_step`` holds,
        change in place.
        """
        used = [*douts]
        self.implementation.weight_standardize_sgd(
            [dense(dout) for dout in douts.values()],
            [self.weights[i] for i in used],
            buffers,
            [self.scales[i] for i in used],
            stats_used(used, self.weights, self.stats),
            self.variant,
            options,
        )
        # So that autograd sees what the kernels changed.
        torch.autograd.graph.increment_version([*(self.weights[i] for i in used), *buffers])


def weight_standardize_detached(
    weights: Sequence[Tensor],
    variant: Variant,
    *,
    gains: Sequence[Tensor] | None,
    scales: Sequence[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> DetachedWeights:
    """``weight_standardize_all`` outside of autograd; its backward is called by hand."""
    scales = check(weights, gains, scales, dtype, channels_last, variant.unbiased)
    implementation = choose_launchers("weight_standardize", weights[0])
    parameters = (
        [dense(w.detach()) for w in weights],
        None if gains is None else [g.detach().contiguous() for g in gains],
        scales,
    )
    outs, stats = implementation.weight_standardize_forward(
        *parameters, variant, dtype, channels_last
    )
    return DetachedWeights(outs, stats, *parameters, variant, implementation)
