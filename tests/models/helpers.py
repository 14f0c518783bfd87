"""Models with hostile random weights, ours and timm's."""

from functools import partial

import torch
from timm.layers import StdConv2d
from timm.models.resnetv2 import ResNetV2 as TimmResNetV2

from bitkern.models import ARCHITECTURES, ResNetV2
from bitkern.nn import WSConv2d

PEER_EPS = 1e-8  # of weight standardization in timm and transformers; ours is BiT's 1e-10


@torch.no_grad()
def randomize(model, seed=0):
    """Move every parameter from its start; filters get a mean and very different scales."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim >= 2:
            scale = torch.empty(p.shape[0], 1, 1, 1).uniform_(0.01, 0.1, generator=generator)
            p.copy_(scale.reshape(-1, *[1] * (p.ndim - 1)) * (noise + 0.5))
        else:
            p.copy_(0.3 * noise + name.endswith("weight"))
    return model


def small(num_classes=7, **kwargs):
    return randomize(ResNetV2(*ARCHITECTURES["R26x0.5"], num_classes, **kwargs))


def timm_bit(name, output_stride=32):
    depths, width = ARCHITECTURES[name]
    model = TimmResNetV2(
        depths,
        num_classes=7,
        width_factor=width,
        output_stride=output_stride,
        stem_type="fixed",
        conv_layer=partial(StdConv2d, eps=PEER_EPS),
    )
    return randomize(model)


def with_eps(model, eps):
    """Set another eps of weight standardization, to compare peers to the last digits."""
    for module in model.modules():
        if isinstance(module, WSConv2d):
            module.eps = eps
    return model
