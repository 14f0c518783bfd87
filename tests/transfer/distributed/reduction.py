"""Gradients summed while the backward pass goes on: training in several processes by it."""

import contextlib
import dataclasses
import signal

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from bitkern.nn import WSConv2d
from bitkern.ops.detached import DetachedWeights
from bitkern.transfer import ranks, train
from tests.transfer.distributed import training
from tests.transfer.distributed.training import OPTIONS, another_start
from tests.transfer.images import image_set
from tests.transfer.net import Net, assert_same_bits

RULE, PLAIN = (dataclasses.replace(r, base_lr=0.01) for r in (training.RULE, training.PLAIN))
LAYERS = 6


class Every(nn.Module):
    """Layers whose gradients come by each way there is, in the first of two micro-batches or not.

    ``frozen`` has a gain that is trained, ``direct`` is checkpointed, ``both`` adds its weight.
    """

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.stem = WSConv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.gained = WSConv2d(8, 8, 1, gain=True, scale=0.7)
        self.frozen = WSConv2d(8, 8, 1, gain=True)
        self.frozen.weight.requires_grad_(False)
        self.direct = WSConv2d(8, 8, 1, gain=True, eps=1e-5)
        self.both = WSConv2d(8, 8, 1)
        self.early = WSConv2d(8, 8, 1)
        self.plain = nn.Conv2d(8, 8, 1)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        for p in (*self.norm.parameters(), self.gained.gain, self.frozen.gain, self.direct.gain):
            nn.init.normal_(p)
        self.to(dtype)
        self.calls, self.on_call = 0, lambda call: None

    def forward(self, x):
        self.calls += self.training
        self.on_call(self.calls)
        x = F.relu(self.norm(self.stem(x.to(self.head.weight.dtype))))
        x = F.relu(self.frozen(self.gained(x)))
        x = x + checkpoint(self.direct, x, use_reentrant=False)
        x = self.both(x) + self.both.weight.mean() * x
        if self.training and self.calls % 2:
            x = x + self.plain(F.relu(self.early(x)))
        return self.head(x.mean((2, 3)))


class Chain(nn.Module):
    """Standardized layers one after another, which tells what comes: see :func:`events`."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(WSConv2d(3 if i == 0 else 8, 8, 1) for i in range(LAYERS))
        self.head = nn.Linear(8, 3)
        self.calls, self.on_call, self.on_grad = 0, lambda call: None, lambda call: None

    def forward(self, x):
        self.calls += self.training
        self.on_call(self.calls)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 0 and self.training:
                x.register_hook(lambda grad, call=self.calls: self.on_grad(call))
        return self.head(x.mean((2, 3)))


@contextlib.contextmanager
def small_buckets():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "BUCKET_BYTES", 512)  # some buckets even of nets as small as these
        yield patch


MODELS = {
    "every": lambda: Every(torch.float64),
    "no standardization": lambda: Net(torch.float64),
    "float32": Every,
}
RUNS = [(name, RULE) for name in MODELS] + [("every", PLAIN)]


def training_equals_one_process(folder):
    """The files, with what every process got, are compared with a single process by the test."""
    for name, rule in RUNS:
        trained, out = another_start(MODELS[name]()), folder / f"{name} {rule.mixup_alpha}"
        with small_buckets():
            result = train(trained, image_set(), rule, out=out, **OPTIONS)
        state = trained.state_dict(), result.history, result.metrics
        torch.save(state, out / f"{ranks.rank()}.pt")


def other_runs_have_equal_replicas(folder):
    for options in ({"precision": "fp16"}, {"balance": "loss"}, {"batch_split": 1}):
        model = Every()
        with small_buckets():
            history = train(model, image_set(), RULE, **OPTIONS | options).history
        assert ranks.all_gather_object(history) == [history] * ranks.world_size(), options
        for tensor in model.state_dict().values():
            first = ranks.all_gather_object(tensor)[0]
            assert torch.equal(tensor, first), options


def interrupted_run_resumes_with_the_same_bits(folder):
    """One process alone is interrupted, in either micro-batch: all stop after the step."""

    def run(model, **options):
        with small_buckets():
            return train(model, image_set(), RULE, **OPTIONS | options)

    straight = another_start(Every(torch.float64))
    expected = run(straight)
    for call in (2 * 7 - 1, 2 * 7):
        stopped, resumed = (another_start(Every(torch.float64)) for _ in range(2))
        if dist.get_rank() == 2:
            stopped.on_call = lambda n, at=call: n == at and signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            run(stopped, out=folder / str(call))
        assert stopped.calls == 2 * 7
        result = run(resumed, out=folder / str(call), resume=True)
        assert resumed.calls == 2 * (RULE.steps - 7)
        assert result.history == expected.history and result.metrics == expected.metrics
        assert_same_bits(resumed, straight.state_dict())


def sums_begin_in_the_last_backward_pass(folder):
    """All of them but that of the bucket with the first layer, and none before."""
    model, events, reduce = Chain(), [], dist.all_reduce
    model.on_grad = lambda call: events.append("first layer")

    def all_reduce(tensor, *arguments, async_op=False, **options):
        if async_op:
            events.append("sum")
        return reduce(tensor, *arguments, async_op=async_op, **options)

    with small_buckets() as patch:
        patch.setattr(dist, "all_reduce", all_reduce)
        train(model, image_set(), PLAIN, **OPTIONS)
    # Of five layers of 288 bytes: the head and two, two, and one with the first layer.
    assert events == ["first layer", "sum", "sum", "first layer", "sum"] * PLAIN.steps, events


def failure_wherever_it_is_stops_all(folder):
    """In the first or last micro-batch, forward or backward, or standardization's backward.

    Nothing was saved yet, so nothing is left behind.
    """
    own, options = "the disk is gone", {"out": folder, "checkpoint_every": 12, **OPTIONS}

    def fail(*arguments):
        raise OSError(own)

    for place in ("on_call 5", "on_call 6", "on_grad 5", "on_grad 6", "standardization"):
        model, (name, _, number) = Chain(), place.partition(" ")
        with small_buckets() as patch:
            if dist.get_rank() == 1 and number:
                setattr(model, name, lambda call, at=int(number): fail() if call == at else None)
            elif dist.get_rank() == 1:
                patch.setattr(DetachedWeights, "sgd", fail)
            with pytest.raises((OSError, ranks.RankError)) as caught:
                train(model, image_set(), PLAIN, **options)
        assert str(caught.value) == (own if dist.get_rank() == 1 else f"process 1: {own}"), place
        assert ranks.all_reduce_sum(1) == [ranks.world_size()], "nothing is left to meet for"
        assert not folder.exists()


class Hungry(Chain):
    """The memory of the second process suffices for so many images."""

    def forward(self, x):
        if self.training and ranks.rank() == 1 and len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def memory_is_tried_in_all_processes(folder):
    histories = []
    for split in ("auto", -(-PLAIN.batch_size // (2 * ranks.world_size()))):
        torch.manual_seed(0)
        options = OPTIONS | {"batch_split": split}
        with small_buckets():
            histories.append(train(Hungry(), image_set(), PLAIN, **options).history)
    assert histories[0] == histories[1]


CHECKS = (
    training_equals_one_process,
    other_runs_have_equal_replicas,
    interrupted_run_resumes_with_the_same_bits,
    sums_begin_in_the_last_backward_pass,
    failure_wherever_it_is_stops_all,
    memory_is_tried_in_all_processes,
)
