"""The pre-activation ResNet (ResNetV2) of Big Transfer.

Kolesnikov et al., "Big Transfer (BiT)", arXiv 1912.11370; pre-activation: He et al., arXiv
1603.05027. Parameters carry the names they have in timm, whose state dicts load as they are.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitkern.nn import GroupNormAct, WSConv2d, preact
from bitkern.nn.current import WeightSource, current, using
from bitkern.nn.preact import Summands, add_residual, run_all_deferred
from bitkern.nn.standardized import per_forward

GROUPS = 32


class Architecture(NamedTuple):
    """Blocks per stage, and the factor on the widths of a ResNet-50."""

    depths: tuple[int, int, int, int]
    width: float


ARCHITECTURES = {
    "R26x0.5": Architecture((2, 2, 2, 2), 0.5),
    "R50x1": Architecture((3, 4, 6, 3), 1),
    "R50x3": Architecture((3, 4, 6, 3), 3),
    "R101x1": Architecture((3, 4, 23, 3), 1),
    "R101x3": Architecture((3, 4, 23, 3), 3),
    "R152x2": Architecture((3, 8, 36, 3), 2),
    "R152x4": Architecture((3, 8, 36, 3), 4),
}
"""The networks by their bare names."""


Device = torch.device | str | int | None


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    **factory: Any,
) -> WSConv2d:
    # WSConv2d's eps of 1e-10 is the one BiT was trained with. timm and transformers load the same
    # weights under 1e-8, which moves a filter of variance v by the fraction 5e-9 / v.
    padding = dilation * (kernel_size // 2)
    return WSConv2d(
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False, **factory
    )


def with_weights(weights: WeightSource | None, block: nn.Module, x: Tensor) -> Any:
    """``block(x)``, with these current standardized weights."""
    with using(weights):
        return block(x)


class Bottleneck(preact.Bottleneck, nn.Module):
    """Pre-activation bottleneck. The stride is on the 3x3 convolution, as in BiT."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        **factory: Any,
    ) -> None:
        super().__init__()
        middle = out_channels // 4
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            projection = conv(in_channels, out_channels, 1, stride, **factory)
            self.downsample = nn.Sequential(OrderedDict(conv=projection))
        self.norm1 = GroupNormAct(GROUPS, in_channels, **factory)
        self.conv1 = conv(in_channels, middle, 1, **factory)
        self.norm2 = GroupNormAct(GROUPS, middle, **factory)
        self.conv2 = conv(middle, middle, 3, stride, dilation, **factory)
        self.norm3 = GroupNormAct(GROUPS, middle, **factory)
        self.conv3 = conv(middle, out_channels, 1, **factory)


class Stage(preact.Stage, nn.Module):
    """A run of bottlenecks at one resolution; the first one may reduce it.

    With ``dilation`` > 1 the stage stands in for one of stride 2: its first block still sees the
    dilation of the stage before, so that every filter covers the pixels it was trained on.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        depth: int,
        stride: int,
        dilation: int,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        first = Bottleneck(in_channels, out_channels, stride, max(1, dilation // 2), **factory)
        rest = (
            Bottleneck(out_channels, out_channels, 1, dilation, **factory) for _ in range(depth - 1)
        )
        self.blocks = nn.Sequential(first, *rest)

    def forward_deferred(self, x: Tensor, residual: Tensor | None = None) -> Summands:
        """As ``Bottleneck.forward_deferred``, through all blocks."""
        if not self.grad_checkpointing:
            return super().forward_deferred(x, residual)
        x = add_residual(x, residual)
        for block in self.blocks:
            # A recomputed block takes the same standardized weights as the first time.
            x = checkpoint(partial(with_weights, current(), block), x, use_reentrant=False)
        return x, None


class ResNetV2(nn.Module):
    """Pre-activation ResNet with weight standardization and GroupNorm.

    Args:
        depths: blocks in each of the four stages.
        width: factor on the channels; 64 * width must be a multiple of the 32 groups.
        num_classes: size of the head, which starts at zero as BiT's does; 0 for no head.
        in_chans: channels of the images.
        output_stride: 8, 16 or 32, image pixels per pixel of the last feature map. Below 32 the
            last stages trade their stride for dilation.

    Attributes:
        channels: of the five feature maps, the stem's convolution and the four stages.
        reductions: of the same, image pixels per pixel along a side.
        num_features: channels of the last feature map.

    Raises:
        ValueError: naming an argument it cannot be built with.
    """

    def __init__(
        self,
        depths: Sequence[int],
        width: float = 1,
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if 64 * width % GROUPS or width <= 0:
            raise ValueError(f"width: 64 * width must be a multiple of {GROUPS}, got width {width}")
        if in_chans < 1:
            raise ValueError(f"in_chans: expected 1 or more, got {in_chans}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride: expected 8, 16 or 32, got {output_stride}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = [int(width * c) for c in (64, 256, 512, 1024, 2048)]
        reductions = [2]

        self.stem = nn.Sequential(
            OrderedDict(
                conv=conv(in_chans, channels[0], 7, stride=2, **factory),
                # Zeros, unlike the padding of a pool, win over negative values: not the same.
                pad=nn.ConstantPad2d(1, 0.0),
                pool=nn.MaxPool2d(3, stride=2),
            )
        )
        self.stages = nn.Sequential()
        reduction, dilation = 4, 1
        for i, depth in enumerate(depths):
            stride = 1 if i == 0 else 2
            if reduction * stride > output_stride:
                stride, dilation = 1, dilation * stride
            stage = Stage(channels[i], channels[i + 1], depth, stride, dilation, **factory)
            self.stages.append(stage)
            reduction *= stride
            reductions.append(reduction)
        self.norm = GroupNormAct(GROUPS, channels[-1], **factory)
        self.head = nn.Sequential(
            OrderedDict(pool=nn.AdaptiveAvgPool2d(1), fc=nn.Identity(), flatten=nn.Flatten())
        )
        self.channels, self.reductions, self.num_features = channels, reductions, channels[-1]
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) -> last feature map after norm and ReLU (N, C, H', W')."""
        with per_forward(self):
            summands = run_all_deferred(self.stages, self.stem(x), None)
            features: Tensor = self.norm(add_residual(*summands))
            return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map -> logits (N, num_classes); with ``pre_logits`` its mean (N, C)."""
        head: Any = self.head
        logits: Tensor = head.flatten(head.pool(x)) if pre_logits else head(x)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W), scaled to [-1, 1] -> logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last layer: a 1x1 convolution, or an identity if there are no classes."""
        return self.head.get_submodule("fc")

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by one for ``num_classes``, all zeros as in BiT; 0 removes it.

        Raises ValueError if ``num_classes`` is negative.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes: expected 0 or more, got {num_classes}")
        self.num_classes = num_classes
        self.head.fc = nn.Identity()
        if num_classes:
            like = self.norm.weight
            fc = nn.Conv2d(self.num_features, num_classes, 1, device=like.device, dtype=like.dtype)
            nn.init.zeros_(fc.weight)
            assert fc.bias is not None
            nn.init.zeros_(fc.bias)
            self.head.fc = fc

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the sums between blocks for the backward pass, which recomputes the rest."""
        _set_grad_checkpointing(self.stages, enable)

    def set_recompute(self, enable: bool = True) -> None:
        """Compute activations twice, as by default, or keep them: some speed for much memory."""
        for block in self.stages.modules():
            if isinstance(block, Bottleneck):
                block.recompute = enable

    def freeze_backbone(self) -> None:
        """Leave the head alone trainable; ``model.requires_grad_(True)`` undoes it."""
        self.requires_grad_(False)
        self.head.requires_grad_(True)


def _set_grad_checkpointing(stages: nn.Module, enable: bool) -> None:
    for stage in stages.modules():
        if isinstance(stage, Stage):
            stage.grad_checkpointing = enable


class FeatureNet(nn.Module):
    """The feature maps of a ``ResNetV2``, as a backbone for detection or segmentation.

    Takes over the stem and the stages that ``out_indices`` needs, with their parameter names.
    Index 0 is the stem's convolution (stride 2), 1 to 4 are the sums that the stages end in,
    before any norm; all five by default, negative ones count from the end.

    Attributes:
        channels: of the maps returned, in that order.
        reductions: of the same.

    Raises:
        ValueError: for an index beyond the five maps, or none at all.
    """

    def __init__(self, model: ResNetV2, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        count = len(model.channels)
        indices = range(count) if out_indices is None else out_indices
        if not indices or any(not -count <= i < count for i in indices):
            raise ValueError(f"out_indices: expected some of 0 to {count - 1}, got {out_indices}")
        self.out_indices = [i % count for i in indices]
        self.channels = [model.channels[i] for i in self.out_indices]
        self.reductions = [model.reductions[i] for i in self.out_indices]
        self.stem = model.stem
        self.stages = model.stages[: max(self.out_indices)]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (N, in_chans, H, W) -> list of feature maps (N, channels[i], H', W')."""
        with per_forward(self):
            stem: Any = self.stem
            maps: list[Tensor] = [stem.conv(x)]
            x = stem.pool(stem.pad(maps[0]))
            for stage in self.stages:
                x = stage(x)
                maps.append(x)
        return [maps[i] for i in self.out_indices]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As ``ResNetV2.set_grad_checkpointing``."""
        _set_grad_checkpointing(self.stages, enable)
