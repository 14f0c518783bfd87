"""The loop: its arithmetic, exact resumption, and what it leaves behind when it fails."""

import dataclasses
import json
import math
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitkern.transfer import HyperRule, runs, trainer
from bitkern.transfer.loader import eval_batches, to_input, train_batches
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


def train(model, rule=RULE, **arguments):
    return trainer.train(model, image_set(), rule, **{"progress": False, **arguments})


def state_of(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same_bits(model, state):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("batch_split", [2, 3, 4, 10])
def test_micro_batches_add_up_to_the_batch(batch_split):
    whole, split = Net(torch.float64), Net(torch.float64)
    losses = train(whole, PLAIN).history
    split_losses = train(split, PLAIN, batch_split=batch_split).history
    assert split.calls == batch_split * PLAIN.steps
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], tensor, rtol=1e-11, atol=1e-13)
    for record, expected in zip(split_losses, losses, strict=True):
        assert math.isclose(record["loss"], expected["loss"], rel_tol=1e-11)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_is_sgd_with_momentum_along_the_schedule(weight_decay):
    model, expected = Net(torch.float64), Net(torch.float64)
    history = train(model, PLAIN, weight_decay=weight_decay).history
    momentum = {name: torch.zeros_like(p) for name, p in expected.named_parameters()}
    batches = train_batches(image_set(), PLAIN, seed=0)
    for step, (images, labels) in enumerate(batches):
        loss = F.cross_entropy(expected(to_input(images, "cpu")), labels)
        grads = torch.autograd.grad(loss, expected.parameters())
        lr = PLAIN.lr(step)
        assert history[step]["step"] == step + 1
        assert history[step]["lr"] == lr
        assert math.isclose(history[step]["loss"], loss.item(), rel_tol=1e-11)
        with torch.no_grad():
            for (name, p), grad in zip(expected.named_parameters(), grads, strict=True):
                momentum[name] = 0.9 * momentum[name] + grad + weight_decay * p
                p -= lr * momentum[name]
    for name, p in expected.named_parameters():
        torch.testing.assert_close(model.state_dict()[name], p.detach(), rtol=1e-10, atol=1e-12)


def test_mixup_draws_one_lambda_per_step_and_a_permutation_per_micro_batch(monkeypatch):
    calls = []

    def spy(x, y, lam, permutation):
        calls.append((lam, permutation.tolist()))
        return original(x, y, lam, permutation)

    original = trainer.mixup
    monkeypatch.setattr(trainer, "mixup", spy)
    rule = dataclasses.replace(RULE, batch_size=20)
    train(Net(), rule, batch_split=2)
    steps = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert len(steps) == rule.steps
    assert all(first[0] == second[0] for first, second in steps)
    assert len({first[0] for first, _ in steps}) == rule.steps
    assert all(first[1] != second[1] for first, second in steps)
    assert all(sorted(permutation) == list(range(10)) for _, permutation in calls)


def test_lambda_follows_the_beta_distribution(monkeypatch):
    lams = []
    monkeypatch.setattr(trainer, "mixup", lambda x, y, lam, p: lams.append(lam) or (x, y, y[p]))
    rule = dataclasses.replace(RULE, steps=300, batch_size=2, mixup_alpha=0.1, resize=8)
    train(Net(), rule)
    alpha = rule.mixup_alpha
    # The mean of Beta(a, a) is 1/2, its variance 1 / (4 (2a + 1)); five standard errors allowed.
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(np.mean(lams) - 0.5) < 5 * math.sqrt(variance / 300)
    assert abs(np.var(lams) - variance) < 5 * 0.25 * math.sqrt(1 / 300)


def test_no_lambda_without_mixup(monkeypatch):
    monkeypatch.setattr(trainer, "mixup", None)
    train(Net(), PLAIN)


def test_only_trainable_parameters_move():
    model = Net()
    model.backbone.requires_grad_(False)
    before = state_of(model)
    train(model)
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_learns():
    model = Net()
    rule = dataclasses.replace(RULE, steps=60, decay_steps=(40,), base_lr=0.1)
    result = train(model, rule, eval_set=image_set(per_class=9))
    assert result.metrics["top1"] == 1.0
    assert [r["step"] for r in result.history if "top1" in r] == list(range(6, 61, 6))


def test_bf16_autocast_stays_near_fp32():
    exact, rounded = Net(), Net()
    expected = train(exact, PLAIN).history
    history = train(rounded, PLAIN, precision="bf16").history
    assert rounded.head.weight.dtype == torch.float32
    pairs = [(a["loss"], b["loss"]) for a, b in zip(history, expected, strict=True)]
    assert any(a != b for a, b in pairs), "autocast did nothing"
    # bf16 keeps 8 bits: each of the few layers rounds by 2^-9 relative.
    assert all(math.isclose(a, b, rel_tol=0.05) for a, b in pairs)


def test_evaluate_against_a_plain_loop():
    model, data = Net().train(), image_set(per_class=7)
    for batch_size in (1, 4, 100):
        metrics = trainer.evaluate(model, data, 8, batch_size=batch_size)
        with torch.no_grad():
            logits = torch.cat([model(to_input(x, "cpu")) for x, _ in eval_batches(data, 8)])
        labels = torch.from_numpy(data.labels)
        assert metrics["top1"] == (logits.argmax(1) == labels).double().mean().item()
        assert metrics["top5"] == 1.0  # of three classes
        loss = F.cross_entropy(logits, labels).item()
        assert math.isclose(metrics["eval_loss"], loss, rel_tol=1e-5)
    logits = trainer.predict(model, data, 8)
    assert logits.shape == (21, 3) and logits.dtype == torch.float32


def test_top5_counts_the_five_best():
    class Ranked(nn.Module):
        def forward(self, x):
            return torch.arange(8.0).flip(0).expand(len(x), 8)

    data = image_set(per_class=2)._replace(labels=np.array([0, 4, 5, 7, 1, 0]))
    metrics = trainer.evaluate(Ranked(), data, 8)
    assert (metrics["top1"], metrics["top5"]) == (2 / 6, 4 / 6)


class Crash(RuntimeError):
    pass


def interrupt(call):
    if call == 3 * 10 - 1:  # within the tenth step of three micro-batches
        signal.raise_signal(signal.SIGINT)


def crash(call):
    if call == 3 * 13 - 1:
        raise Crash


@pytest.mark.parametrize(
    ("stop", "error", "resumed_at"), [(interrupt, KeyboardInterrupt, 10), (crash, Crash, 10)]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues_with_the_same_bits(tmp_path, stop, error, resumed_at, workers):
    options = dict(eval_set=image_set(2), batch_split=3, seed=5, eval_every=4, checkpoint_every=5)
    straight = Net()
    expected = train(straight, out=tmp_path / "straight", **options)

    out = tmp_path / "stopped"
    stopped = Net()
    stopped.on_call = stop
    with pytest.raises(error):
        train(stopped, out=out, workers=workers, **options)
    assert torch.load(out / "last.pt", weights_only=True)["progress"]["step"] == resumed_at

    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 11}\n' * 1000 + b'{"step')  # steps after the checkpoint, one cut off

    resumed = Net()
    nn.init.zeros_(resumed.head.weight)  # whatever it was, the checkpoint decides
    result = train(resumed, out=out, resume=True, workers=workers, **options)
    assert resumed.calls == 3 * (RULE.steps - resumed_at)
    assert_same_bits(resumed, straight.state_dict())
    assert result.history == expected.history and result.metrics == expected.metrics
    written = (out / "metrics.jsonl").read_bytes()
    assert written == (tmp_path / "straight" / "metrics.jsonl").read_bytes()
    assert [json.loads(line) for line in written.splitlines()] == expected.history


def test_interrupt_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    train(Net(), PLAIN)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def at_a_terminal():
    """SIGINT interrupts, as it does not in a job that a script started in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("at_a_terminal")
def test_second_interrupt_stops_at_once(tmp_path):
    model = Net()
    model.on_call = lambda call: call >= 2 and signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(model, batch_split=10, out=tmp_path / "run", checkpoint_every=20)
    assert model.calls == 3
    assert not (tmp_path / "run").exists()


def test_resuming_a_complete_run_trains_no_further(tmp_path):
    model = Net()
    expected = train(model, eval_set=image_set(2), out=tmp_path)
    again = Net()
    result = train(again, eval_set=image_set(2), out=tmp_path, resume=True)
    assert again.calls == 0
    assert_same_bits(again, model.state_dict())
    assert result.metrics == expected.metrics and result.history == expected.history


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": dataclasses.replace(RULE, base_lr=0.2)}, "the run has base_lr 0.1, got 0.2"),
        ({"seed": 1}, "the run has seed 0, got 1"),
        ({"batch_split": 2}, "the run has batch_split 1, got 2"),
        ({"weight_decay": 0.1}, "the run has weight_decay 0.0, got 0.1"),
        ({"flip": False}, "the run has flip True, got False"),
        ({"train_set": image_set(4)}, "the run has training images 15, got 12"),
        ({"train_set": image_set()._replace(classes=("x", "y", "z"))}, "the run has classes"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 3))}, "the run has parameters"),
    ],
)
def test_resume_needs_the_settings_of_the_run(tmp_path, change, message):
    arguments = {"model": Net(), "train_set": image_set(), "rule": RULE, "progress": False}
    trainer.train(**arguments, out=tmp_path)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    changed = {**arguments, "model": Net(), **change}
    before = state_of(changed["model"])
    with pytest.raises(runs.RunError, match=message):
        trainer.train(**changed, out=tmp_path, resume=True)
    assert_same_bits(changed["model"], before)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_damaged_run_folders(tmp_path):
    train(Net(), out=tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(runs.RunError, match=r"metrics.jsonl: shorter than when last.pt"):
        train(Net(), out=tmp_path, resume=True)
    whole = (tmp_path / "last.pt").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"nothing"):
        (tmp_path / "last.pt").write_bytes(broken)
        with pytest.raises(runs.RunError, match=r"last.pt: not a readable checkpoint"):
            train(Net(), out=tmp_path, resume=True)


def test_does_not_overwrite_a_run(tmp_path):
    train(Net(), PLAIN, out=tmp_path)
    with pytest.raises(runs.RunError, match="holds a run .*continue it with --resume"):
        train(Net(), PLAIN, out=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(runs.RunError, match="expected a folder, found a file"):
        train(Net(), PLAIN, out=tmp_path / "file")
    with pytest.raises(runs.RunError, match="nothing to resume, no last.pt"):
        train(Net(), PLAIN, out=tmp_path / "new", resume=True)


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = Net()
    rule = dataclasses.replace(RULE, base_lr=1e30, warmup_steps=0)
    with pytest.raises(trainer.TrainingError, match=r"the loss is (nan|inf) at step \d+: lower"):
        train(model, rule, out=tmp_path / "run", checkpoint_every=20)
    assert not (tmp_path / "run").exists()


def test_last_step_may_not_diverge_unseen(tmp_path):
    rule = dataclasses.replace(PLAIN, base_lr=1e38, warmup_steps=0, decay_steps=(), steps=1)
    with pytest.raises(trainer.TrainingError, match="the evaluation loss is (nan|inf) at step 1"):
        train(Net(), rule, out=tmp_path, eval_set=image_set(2))
    assert list(tmp_path.iterdir()) == [], "a folder that was there stays, empty"


def test_failure_after_a_checkpoint_leaves_it(tmp_path):
    model = Net()
    model.on_call = crash
    with pytest.raises(Crash):
        train(model, out=tmp_path, batch_split=3, checkpoint_every=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_split": 0}, "batch_split: expected 1 to 10"),
        ({"batch_split": 11}, "batch_split: expected 1 to 10"),
        ({"eval_every": 0}, "eval_every: expected"),
        ({"checkpoint_every": -1}, "checkpoint_every: expected"),
        ({"precision": "fp8"}, "precision: expected fp32 or bf16, got 'fp8'"),
        ({"resume": True}, "resume: expected out"),
        ({"train_set": image_set().subset([])}, "train_set: expected images"),
        ({"model": Net().requires_grad_(False)}, "model: expected trainable"),
    ],
)
def test_rejects_bad_arguments(tmp_path, arguments, message):
    arguments = {"model": Net(), "train_set": image_set(), "rule": RULE, **arguments}
    if "resume" not in arguments:
        arguments["out"] = tmp_path / "run"
    with pytest.raises(ValueError, match=f"^{message}"):
        trainer.train(**arguments)
    assert not (tmp_path / "run").exists()


def test_predict_rejects_no_images():
    with pytest.raises(ValueError, match="images: expected at least one"):
        trainer.predict(Net(), image_set().subset([]), 8)


def test_atomic_leaves_old_or_new_but_nothing_between(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(Crash), runs.atomic(path) as part:
        part.write_text("half")
        raise Crash
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with runs.atomic(path) as part:
        part.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.gpu
def test_trains_on_a_gpu_in_channels_last_bf16():
    model = Net()
    train(model, eval_set=image_set(2), device="cuda", precision="bf16")
    assert model.backbone.weight.is_cuda
    assert model.backbone.weight.is_contiguous(memory_format=torch.channels_last)
