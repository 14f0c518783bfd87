"""Models of other libraries with weights that find faults, and distances between models."""

import timm
import torch
from timm.models.resnetv2 import ResNetV2
from torch import nn


def randomize(model, seed=0):
    """Draw affine parameters, gains and biases of either sign; leave none at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2 or p.numel() == p.shape[0] or not p.any():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def small_timm(**options):
    """Make a BiT of timm: two stages, three blocks, one with a stride and a projection."""
    torch.manual_seed(0)
    options = {"stem_type": "fixed", "num_classes": 5} | options
    return randomize(ResNetV2(layers=[2, 1], channels=(128, 256), stem_chs=64, **options))


def small_bit(**options):
    """Make transformers' BiT with two stages."""
    from transformers import BitConfig, BitForImageClassification

    torch.manual_seed(0)
    sizes = dict(embedding_size=32, hidden_sizes=[128, 256], depths=[2, 1])
    return randomize(BitForImageClassification(BitConfig(num_labels=5, **sizes, **options)))


def small_dpt():
    """Make transformers' DPT-hybrid: a BiT backbone with dynamic padding, a transformer."""
    from transformers import BitConfig, DPTConfig, DPTForSemanticSegmentation

    torch.manual_seed(0)
    backbone = BitConfig(
        layer_type="bottleneck",
        global_padding="same",
        embedding_dynamic_padding=True,
        embedding_size=16,
        hidden_sizes=[32, 64, 128],
        depths=[3, 4, 9],
        num_groups=8,
        out_features=["stage1", "stage2", "stage3"],
    )
    config = DPTConfig(
        is_hybrid=True,
        backbone_config=backbone,
        num_labels=5,
        image_size=64,
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        hidden_size=96,
        num_attention_heads=4,
        intermediate_size=128,
        neck_hidden_sizes=[32, 64, 96, 96],
        fusion_hidden_size=32,
        backbone_featmap_shape=[1, 128, 4, 4],
    )
    return randomize(DPTForSemanticSegmentation(config))


def from_timm(name, **options):
    torch.manual_seed(0)
    return randomize(timm.create_model(name, num_classes=10, **options))


def outputs(model, x):
    y = model(x)
    return getattr(y, "logits", y)


def gradients(model, x, amp=None, forward=None):
    """Return logits and {name: gradient} of a loss that weighs every logit differently."""
    model.zero_grad()
    with torch.autocast("cpu", amp, enabled=amp is not None):
        y = outputs(model if forward is None else forward, x)
    loss = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    (y * loss).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), grads


def relative(got, expected):
    """Return the relative L2 distance of two tensors."""
    assert got.shape == expected.shape
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def distance(got, expected):
    """Return the relative L2 distance of whole gradients."""
    assert got.keys() == expected.keys()
    pairs = [(got[n].double(), expected[n].double()) for n in expected]
    error = sum((a - b).square().sum() for a, b in pairs)
    return float((error / sum(b.square().sum() for _, b in pairs)).sqrt())


def kept_bytes(model, x):
    """Count the bytes that a forward keeps under bfloat16 autocast, without parameters."""
    found = {}
    for own in (*model.parameters(), *model.buffers()):
        found[own.untyped_storage().data_ptr()] = 0, own

    def keep(tensor):
        storage = tensor.untyped_storage()
        found.setdefault(storage.data_ptr(), (storage.nbytes(), storage))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
    assert y.requires_grad
    return sum(size for size, _ in found.values())


class ConvNet(nn.Module):
    """A user's own network with batch normalization, a shortcut and a plain head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU())
        self.conv1 = nn.Conv2d(24, 24, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(24)
        self.conv2 = nn.Conv2d(24, 24, 1)  # its result is also added: not for normalization alone
        self.bn2 = nn.BatchNorm2d(24)
        self.conv3 = nn.Conv2d(24, 24, 1)  # so is its weight
        self.bn3 = nn.BatchNorm2d(24)
        self.head = nn.Conv2d(24, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        x = self.bn3(self.conv3(x)) + self.conv3.weight.mean()
        x = x + self.bn1(self.conv1(x)).relu()
        y = self.conv2(x)
        return self.head(y + self.bn2(y)).mean((2, 3))
