"""The smallest number of micro-batches that fits, found without a trace; fp16."""

import dataclasses
import json
import re

import pytest
import torch
from torch import nn

from bitkern.transfer import TrainingError, micro_batch, ranks, train_setup
from bitkern.transfer.device_config import default_precision
from bitkern.transfer.micro_batch import smallest_split
from bitkern.transfer.train_setup import TrainSetup
from tests.transfer.net import PLAIN, RULE, Net, assert_same_bits, state_of, stopped, train


@pytest.mark.parametrize("most", [1, 2, 7, 10, 512])
def test_finds_the_smallest(most):
    for enough in range(1, most + 1):
        tried = []

        def suffices(split, tried=tried, enough=enough):
            tried.append(split)
            return split >= enough

        assert smallest_split(suffices, most) == enough
        assert len(tried) == len(set(tried)) <= 2 * most.bit_length()
    assert smallest_split(lambda split: False, most) is None


class Hungry(Net):
    """A net for which the memory suffices for so many images at a time."""

    def __init__(self, images):
        super().__init__()
        self.images, self.largest = images, 0
        self.dropout = nn.Dropout(0.2)
        self.batch_norm = nn.BatchNorm2d(3)

    def forward(self, x):
        if len(x) > self.images:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.largest = max(self.largest, len(x))
        return super().forward(self.dropout(self.batch_norm(x)))


@pytest.mark.parametrize("mixup_alpha", [0.0, 0.2])
@pytest.mark.parametrize(("images", "split"), [(10, 1), (9, 2), (4, 3), (3, 4), (1, 10)])
def test_auto_is_the_split_given_by_hand(images, split, mixup_alpha):
    rule = dataclasses.replace(PLAIN, mixup_alpha=mixup_alpha)
    torch.manual_seed(1)
    by_hand = Hungry(images)
    history = train(by_hand, rule, batch_split=split).history
    torch.manual_seed(1)
    auto = Hungry(images)
    assert train(auto, rule, batch_split="auto").history == history
    assert_same_bits(auto, state_of(by_hand))
    assert auto.largest == -(-10 // split)


def test_says_what_it_takes(capsys):
    train(Hungry(4), PLAIN, batch_split="auto", progress=True)
    said = capsys.readouterr().out.splitlines()
    (line,) = (line for line in said if line.startswith("estimate: "))
    assert re.fullmatch(
        r"estimate: \d+\.\d GB of memory, \S+ m?s a step, \S+ m?s in all "
        r"\(6 steps of 10 images of 8x8, 4 at a time\)",
        line,
    )


@pytest.mark.parametrize(
    ("free", "images"), [(0, 0), (90, 1), (209, 1), (240, 2), (350, 3), (1000, 8)]
)
def test_images_that_fit_are_on_a_line(monkeypatch, free, images):
    """One takes 90 bytes beside the process's 1000, each more of them 120."""
    monkeypatch.setattr(micro_batch, "free_memory", lambda: free / 0.9)
    monkeypatch.setattr(micro_batch, "resident_memory", lambda: 1000)
    trials = {1: micro_batch.Trial(1090, 1.0), 2: micro_batch.Trial(1210, 2.0)}
    assert micro_batch.images_that_fit(trials.get) == images


def test_a_cpu_takes_no_more_than_fit(monkeypatch):
    monkeypatch.setattr(train_setup, "images_that_fit", lambda *_: 4)
    auto = Hungry(10)
    train(auto, PLAIN, batch_split="auto")
    assert auto.largest == 4
    message = "not enough memory on cpu for 5 images at a time: raise batch_split"
    with pytest.raises(TrainingError, match=message):
        train(Hungry(10), PLAIN, batch_split=2, progress=True)
    monkeypatch.setattr(train_setup, "images_that_fit", lambda *_: 10**9)
    many = Hungry(100)
    train(many, dataclasses.replace(PLAIN, batch_size=100, steps=1), batch_split="auto")
    assert many.largest == 15, "of up to 16, seven parts of a hundred"


def test_what_a_micro_batch_takes_is_measured():
    with micro_batch._peak_memory(torch.device("cpu")) as peak:
        before = micro_batch.resident_memory()
        held = torch.ones(50_000_000)
        held += held.square()
    assert 200e6 < peak() - before + 1e6 < 600e6


def test_nothing_fits(tmp_path):
    model = Hungry(0)
    before = state_of(model)
    with pytest.raises(TrainingError, match="not enough memory on cpu for one image at a time"):
        train(model, out=tmp_path / "run", batch_split="auto")
    assert not (tmp_path / "run").exists()
    assert_same_bits(model, before)


def test_resuming_takes_what_the_run_began_with(tmp_path):
    model = Hungry(4)
    model.on_call = lambda call: call == 36 and exec("raise ZeroDivisionError")
    with pytest.raises(ZeroDivisionError):
        train(model, out=tmp_path, batch_split="auto", checkpoint_every=5)
    resumed = Hungry(10)
    train(resumed, out=tmp_path, resume=True, batch_split="auto")
    assert resumed.largest == 4
    assert json.loads((tmp_path / "summary.json").read_text())["batch_split"] == 3


def test_fp16_stays_near_fp32_and_resumes_to_the_same_bits(tmp_path, monkeypatch):
    # The way of an optimizer that is not fused, which reads from the device whether to step.
    monkeypatch.setattr(torch.amp.GradScaler, "_maybe_opt_step", None)
    exact, rounded = Net(), Net()
    expected = train(exact).history
    result = train(rounded, precision="fp16", out=tmp_path / "straight", checkpoint_every=5)
    pairs = [(a["loss"], b["loss"]) for a, b in zip(result.history, expected, strict=True)]
    assert any(a != b for a, b in pairs), "autocast did nothing"
    assert all(abs(a - b) < 0.02 * b for a, b in pairs)
    stopped(tmp_path / "out", precision="fp16")
    scaler = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["scaler"]
    assert scaler["scale"] > 1 and scaler["_growth_tracker"] == 10
    resumed = Net()
    train(resumed, precision="auto", out=tmp_path / "out", resume=True)
    assert_same_bits(resumed, state_of(rounded))


def test_fp16_skips_steps_whose_gradients_overflow():
    model = Net()
    with torch.no_grad():
        model.head.weight.mul_(1e3)
    before = state_of(model)
    rule = dataclasses.replace(RULE, steps=1, warmup_steps=0, decay_steps=(), mixup_alpha=0.0)
    train(model, rule, precision="fp16")
    assert_same_bits(model, before)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_libraries_that_have_no_memory(message, monkeypatch):
    """They say so in words of their own; other errors are not taken for that."""

    def forward(self, x):
        if len(x) > 4:
            raise RuntimeError(message)
        return Net.forward(self, x)

    monkeypatch.setattr(Hungry, "forward", forward)
    history = train(Hungry(4), PLAIN, batch_split="auto").history
    assert history == train(Hungry(4), PLAIN, batch_split=3).history
    message = "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"
    with pytest.raises(RuntimeError, match="EXECUTION_FAILED"):
        train(Hungry(4), PLAIN, batch_split="auto")


def test_processes_talk_before_the_memory_is_tried(monkeypatch):
    """NCCL takes its buffers with the first message."""
    order = []
    copy, fitted = ranks.broadcast_from_rank0, TrainSetup.fitted
    monkeypatch.setattr(ranks, "broadcast_from_rank0", lambda t: (order.append("copy"), copy(t))[1])
    monkeypatch.setattr(TrainSetup, "fitted", lambda *a: (order.append("fit"), fitted(*a))[1])
    train(Hungry(4), PLAIN, batch_split="auto")
    assert order == ["copy", "fit"]


def test_bf16_is_asked_of_the_device(monkeypatch):
    """Not of the current one."""
    current = [0]

    class On:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", On)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: current[-1] == 1)
    assert default_precision("cuda:1")[0] == "bf16"
    assert default_precision("cuda:0")[0] == "fp16"
