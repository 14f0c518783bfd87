"""Networks of the same shapes: ours, GroupNorm without weight standardization, the BatchNorm twin.

They have a bottleneck in each stage, and their heads start at zero; the rest starts as each library
has it.
"""

from functools import partial

import torch
from timm.layers import BatchNormAct2d, GroupNormAct, create_conv2d
from timm.models.resnetv2 import ResNetV2 as TimmResNetV2
from torch import nn

from bitkern.models.resnetv2 import GROUPS, ResNetV2

DEPTHS = 1, 1, 1, 1


class _Frozen(BatchNormAct2d):
    """Normalizes by its running statistics also in training, and leaves them alone."""

    def train(self, mode=True):
        return super().train(False)


def frozen(*args, **kwargs):
    # A function, since timm takes layers of its own by their names.
    return _Frozen(*args, **kwargs)


def _ours(width, classes):
    return ResNetV2(DEPTHS, width, classes)


def _timm(norm_layer, width, classes):
    net = TimmResNetV2(
        DEPTHS,
        num_classes=classes,
        width_factor=width,
        stem_type="fixed",
        conv_layer=create_conv2d,
        norm_layer=norm_layer,
        zero_init_last=False,
    )
    nn.init.zeros_(net.head.fc.weight)
    return net


BUILDERS = {
    "WS + GroupNorm": _ours,
    "GroupNorm": partial(_timm, partial(GroupNormAct, num_groups=GROUPS)),
    "BatchNorm": partial(_timm, BatchNormAct2d),
    "BatchNorm, frozen": partial(_timm, frozen),
}


def build(name, classes, seed, width=0.5, body=None):
    """A new network, or the ``body`` of another under a new head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = BUILDERS[name](width, classes)
    if body is not None:
        state = {k: v for k, v in body.state_dict().items() if not k.startswith("head.")}
        net.load_state_dict(state, strict=False)
    return net
