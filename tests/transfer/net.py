"""A net and a rule small enough to train in no time."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitkern.transfer import HyperRule, device_config, training
from tests.transfer.images import image_set

RULE = HyperRule(
    resize=12,
    crop=8,
    steps=20,
    decay_steps=(8, 16),
    warmup_steps=3,
    mixup_alpha=0.2,
    base_lr=0.1,
    batch_size=10,
)
PLAIN = dataclasses.replace(RULE, mixup_alpha=0.0, steps=6)

CPU = device_config.DeviceConfig.create("cpu", "fp32", 0)


class Net(nn.Module):
    """A net small enough to train in no time; float64 if asked, for exact comparisons."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.backbone = nn.Conv2d(3, 8, 3, stride=2, dtype=dtype)
        self.norm = nn.GroupNorm(4, 8, dtype=dtype)
        self.head = nn.Linear(8, 3, dtype=dtype)
        self.calls = 0
        self.on_call = lambda call: None
        for p in self.parameters():
            nn.init.normal_(p, 0.1, 0.5, generator=generator)

    def forward(self, x):
        if self.training:
            self.calls += 1
            self.on_call(self.calls)
        x = F.relu(self.norm(self.backbone(x.to(self.backbone.weight.dtype))))
        return self.head(x.mean((2, 3)))


REPORT = ["predictions.csv", "report.html", "report.json"]
FILES = ["curves.png", "metrics.jsonl", "model.safetensors", *REPORT, "summary.json"]


def train(model, rule=RULE, train_set=None, **arguments):
    return training.train(model, train_set or image_set(), rule, **{"progress": False, **arguments})


def state_of(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same_bits(model, state):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


class Crash(RuntimeError):
    pass


def crash_always(*arguments, **options):
    raise Crash


def stopped(out, **arguments):
    """Leave an unfinished run behind."""
    model = Net()
    model.on_call = lambda call: call == 13 and crash_always()
    with pytest.raises(Crash):
        train(model, out=out, checkpoint_every=5, **arguments)
