"""The smallest number of micro-batches that fits, found without a trace; free memory; fp16."""

import contextlib
import dataclasses
import json
import re
import resource
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from bitkern.transfer import TrainingError, micro_batch, ranks, trainer
from bitkern.transfer.data import memory
from bitkern.transfer.device_config import default_precision
from bitkern.transfer.micro_batch import smallest_split
from bitkern.transfer.trainer import Trainer
from tests.transfer.net import (
    PLAIN,
    RULE,
    Crash,
    Net,
    assert_same_bits,
    crash_always,
    state_of,
    stopped,
    train,
)


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


SPLITS = [(10, 1, 0.0), (9, 2, 0.2), (4, 3, 0.0), (3, 4, 0.2), (1, 10, 0.2)]


@pytest.mark.parametrize(("images", "split", "mixup_alpha"), SPLITS)
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
        r"estimate: \d+\.\d GB of memory, \S+ m?s per step, \S+ m?s in total "
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
    monkeypatch.setattr(trainer, "images_that_fit", lambda *_: 4)
    auto = Hungry(10)
    train(auto, PLAIN, batch_split="auto")
    assert auto.largest == 4
    message = "not enough memory on cpu for 5 images at a time: raise batch_split"
    with pytest.raises(TrainingError, match=message):
        train(Hungry(10), PLAIN, batch_split=2, progress=True)
    monkeypatch.setattr(trainer, "images_that_fit", lambda *_: 10**9)
    many = Hungry(100)
    train(many, dataclasses.replace(PLAIN, batch_size=100, steps=1), batch_split="auto")
    assert many.largest == 15, "of up to 16, seven parts of a hundred"


def test_what_a_micro_batch_takes_is_measured():
    with micro_batch._peak_memory(torch.device("cpu")) as peak:
        before = micro_batch.resident_memory()
        held = torch.ones(50_000_000)
        held += held.square()
    assert 200e6 < peak() - before + 1e6 < 600e6


NOTHING_FITS = "not enough memory on cpu for one image at a time"


def test_nothing_fits(tmp_path):
    model = Hungry(0)
    before = state_of(model)
    with pytest.raises(TrainingError, match=NOTHING_FITS):
        train(model, out=tmp_path / "run", batch_split="auto")
    assert not (tmp_path / "run").exists()
    assert_same_bits(model, before)


def test_resuming_takes_what_the_run_began_with(tmp_path):
    model, resumed = Hungry(4), Hungry(10)
    model.on_call = lambda call: call == 36 and crash_always()
    with pytest.raises(Crash):
        train(model, out=tmp_path, batch_split="auto", checkpoint_every=5)
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
    ("message", "raised"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`", NOTHING_FITS),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", NOTHING_FITS),
        ("Triton Error [CUDA]: out of memory", NOTHING_FITS),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "EXECUTION_FAILED"),
    ],
)
def test_libraries_that_have_no_memory(message, raised, monkeypatch):
    """They say so in words of their own; other errors are not taken for that."""
    monkeypatch.setattr(Hungry, "forward", Mock(side_effect=RuntimeError(message)))
    with pytest.raises(RuntimeError, match=raised):
        train(Hungry(4), PLAIN, batch_split="auto")


def test_processes_talk_before_the_memory_is_tried(monkeypatch):
    """NCCL takes its buffers with the first message."""
    order = []
    copy, fitted = ranks.broadcast_from_rank0, Trainer.fit_memory
    monkeypatch.setattr(ranks, "broadcast_from_rank0", lambda t: (order.append("copy"), copy(t))[1])
    monkeypatch.setattr(Trainer, "fit_memory", lambda *a: (order.append("fit"), fitted(*a))[1])
    train(Hungry(4), PLAIN, batch_split="auto")
    assert order == ["copy", "fit"]


def test_bf16_is_asked_of_the_device(monkeypatch):
    """Not of the current one."""
    current = [0]

    @contextlib.contextmanager
    def on(device):
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: current[-1] == 1)
    assert default_precision("cuda:1")[0] == "bf16"
    assert default_precision("cuda:0")[0] == "fp16"


V2 = ("memory.max", "memory.current", "memory.stat")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 5000 * 1024),
        ({"v2": ("max", "9", "inactive_file 1")}, 5000 * 1024),
        ({"v2": ("1000", "900", "inactive_file 50")}, 150),
        ({"v2/a/job": ("10", "20", "file 1")}, 0),
        ({"v2/a/job": ("max", "20", "file 1"), "v2/a": ("900", "200", "file 1")}, 700),
        ({"v2/other": ("10", "9", "file 1")}, 5000 * 1024),
        ({"v1/b": ("2000", "500", "cache 1\ntotal_inactive_file 100")}, 1600),
    ],
)
def test_free_memory(tmp_path, monkeypatch, files, free):
    assert 0 < memory.free_memory() < 1 << 50
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:   5000 kB\n")
    (tmp_path / "own").write_text("3:cpu:/\n2:memory:/b\n0::/a/job\n")
    for name, texts in files.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for file, text in zip(V1 if "v1" in name else V2, texts, strict=True):
            (tmp_path / name / file).write_text(f"{text}\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "own")
    monkeypatch.setattr(memory, "CGROUPS", {"": tmp_path / "v2", "memory": tmp_path / "v1"})
    assert memory.free_memory() == free


@pytest.mark.parametrize(("limit", "used"), [("RLIMIT_AS", 100), ("RLIMIT_DATA", 60)])
def test_within_ulimit(tmp_path, monkeypatch, limit, used):
    (tmp_path / "statm").write_text("100 20 0 0 0 60 0\n")
    monkeypatch.setattr(memory, "STATM", tmp_path / "statm")
    page, none = resource.getpagesize(), resource.RLIM_INFINITY
    limits = {getattr(resource, limit): 1000 * page}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits.get(which, none), none))
    assert memory.free_memory() == (1000 - used) * page
