"""A BiT as the backbone of a detector: its feature maps in torchvision's feature pyramid.

``features_only`` leaves out the head, ``out_indices`` picks the maps. Here they serve a RetinaNet,
which learns where the bright squares of four images are: ``python examples/detection_features.py``
"""

from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

import bitkern


class Backbone(nn.Module):
    """Images (N, 3, H, W) -> maps (N, 64, H / r, W / r) for r = 8, 16, 32."""

    out_channels = 64

    def __init__(self):
        super().__init__()
        # For real work: "BiT-M-R50x1" and weights=…; GroupNorm is at home in small batches.
        self.body = bitkern.create_model("R26x0.5", features_only=True, out_indices=(2, 3, 4))
        # The maps are the stages' sums, which no norm has seen yet.
        norm = partial(bitkern.nn.GroupNormAct, 32, act="none")
        self.pyramid = FeaturePyramidNetwork(self.body.channels, self.out_channels, norm_layer=norm)

    def forward(self, x):
        maps = self.body(x)
        return self.pyramid(OrderedDict(zip("abc", maps, strict=True)))


def square(size=64):
    """An image with a bright square of 16 to 32 pixels, and what a detector is to find in it."""
    side = int(torch.randint(16, 33, ()))
    top, left = torch.randint(size - side, (2,)).tolist()
    image = 0.1 * torch.rand(3, size, size)
    image[:, top : top + side, left : left + side] += 0.9
    box = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
    return image, {"boxes": box, "labels": torch.tensor([1])}


def main():
    torch.manual_seed(0)
    anchors = AnchorGenerator(sizes=((16,), (24,), (32,)), aspect_ratios=((1.0,),) * 3)
    detector = RetinaNet(Backbone(), 2, min_size=64, max_size=64, anchor_generator=anchors)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-4)
    images, targets = zip(*(square() for _ in range(4)), strict=True)
    for step in range(20):
        losses = detector(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, 19):
            print(f"step {step + 1}: loss {sum(losses.values()):.3f}")


if __name__ == "__main__":
    main()
