"""The loop: its arithmetic, and when it stops."""

import dataclasses
import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.losses import Float64, losses
from bitkern.transfer import TrainingError, inference, train_batches, training
from bitkern.transfer.data.decoders import pillow
from bitkern.transfer.data.loader import eval_batches
from bitkern.transfer.data.resized import ResizedImages
from bitkern.transfer.recipes.mixup import mix
from bitkern.transfer.schedule import Schedule
from tests.transfer.images import image_set
from tests.transfer.net import CPU, PLAIN, RULE, Net, train


@pytest.mark.parametrize("batch_split", [2, 3, 10])
def test_micro_batches_add_up_to_the_batch(batch_split):
    whole, split = Net(torch.float64), Net(torch.float64)
    losses = train(whole, PLAIN).history
    split_losses = train(split, PLAIN, batch_split=batch_split).history
    assert split.calls == batch_split * PLAIN.steps
    torch.testing.assert_close(split.state_dict(), whole.state_dict(), rtol=1e-11, atol=1e-13)
    for record, expected in zip(split_losses, losses, strict=True):
        assert math.isclose(record["loss"], expected["loss"], rel_tol=1e-11)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_is_sgd_with_momentum_along_the_schedule(weight_decay):
    model, expected = Net(torch.float64), Net(torch.float64)
    history = train(model, dataclasses.replace(PLAIN, weight_decay=weight_decay)).history
    momentum = {name: torch.zeros_like(p) for name, p in expected.named_parameters()}
    batches = train_batches(image_set(), PLAIN, seed=0)
    for step, (images, labels) in enumerate(batches):
        loss = F.cross_entropy(expected(CPU.to_input(images)), labels)
        grads = torch.autograd.grad(loss, expected.parameters())
        lr = PLAIN.lr(step)
        assert history[step]["step"] == step + 1
        assert history[step]["lr"] == lr
        assert math.isclose(history[step]["loss"], loss.item(), rel_tol=1e-11)
        with torch.no_grad():
            for (name, p), grad in zip(expected.named_parameters(), grads, strict=True):
                decay = weight_decay if p.ndim > 1 else 0  # not of norms and biases
                momentum[name] = 0.9 * momentum[name] + grad + decay * p
                p -= lr * momentum[name]
    for name, p in expected.named_parameters():
        torch.testing.assert_close(model.state_dict()[name], p.detach(), rtol=1e-10, atol=1e-12)


def test_mixup_draws_one_lambda_per_step_and_a_permutation_per_micro_batch(monkeypatch):
    calls = []

    def spy(x, y, lam, permutation):
        calls.append((lam.item(), permutation.tolist()))
        return mix(x, y, lam, permutation)

    monkeypatch.setattr("bitkern.transfer.step.mix", spy)
    rule = dataclasses.replace(RULE, batch_size=20, steps=6)
    train(Net(), rule, batch_split=2)
    steps = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert len(steps) == rule.steps
    assert all(first[0] == second[0] for first, second in steps)
    assert len({first[0] for first, _ in steps}) == rule.steps
    assert all(first[1] != second[1] for first, second in steps)
    assert all(sorted(permutation) == list(range(10)) for _, permutation in calls)
    calls.clear()
    train(Net(), PLAIN)
    assert not calls


def test_lambda_follows_the_beta_distribution():
    alpha = 0.1
    schedule = Schedule(15, dataclasses.replace(RULE, steps=300, mixup_alpha=alpha), 0)
    lams = [schedule.step(step).lam for step in range(300)]
    # The mean of Beta(a, a) is 1/2, its variance 1 / (4 (2a + 1)); five standard errors allowed.
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(np.mean(lams) - 0.5) < 5 * math.sqrt(variance / 300)
    assert abs(np.var(lams) - variance) < 5 * 0.25 * math.sqrt(1 / 300)


def test_losses_are_those_that_were_written_down():
    """``python -m benchmarks.losses COMMIT`` compares two commits to the last bit."""
    golden = json.loads(Path(__file__).with_name("losses.json").read_text())
    assert losses(Float64) == {name: pytest.approx(v, rel=1e-7) for name, v in golden.items()}


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


def test_on_record_hears_every_record_and_the_interrupt_handler_is_put_back():
    heard, before = [], signal.getsignal(signal.SIGINT)
    history = train(Net(), PLAIN, eval_set=image_set(2), on_record=heard.append).history
    assert signal.getsignal(signal.SIGINT) is before
    assert heard == history and len(heard) == 6 + 6
    heard[0].clear()
    assert history[0], "what a listener does with a record is its own affair"


def test_evaluate_against_a_plain_loop():
    model, data = Net().train(), image_set(per_class=7)
    for batch_size in (1, 4, 100):
        metrics = inference.evaluate(model, data, 8, batch_size=batch_size)
        with torch.no_grad():
            batches = eval_batches(ResizedImages(data.images, 8, pillow), range(21), CPU)
            logits = torch.cat([model(CPU.to_input(x)) for x, _ in batches])
        labels = torch.from_numpy(data.labels)
        assert metrics["top1"] == (logits.argmax(1) == labels).double().mean().item()
        assert metrics["top5"] == 1.0  # of three classes
        loss = F.cross_entropy(logits, labels).item()
        assert math.isclose(metrics["eval_loss"], loss, rel_tol=1e-5)
    logits = inference.predict(model, data, 8)
    assert logits.shape == (21, 3) and logits.dtype == torch.float32
    with pytest.raises(ValueError, match="images: expected at least one"):
        inference.predict(model, data.subset([]), 8)


def test_top5_counts_the_five_best():
    class Ranked(nn.Module):
        def forward(self, x):
            return torch.arange(8.0).flip(0).expand(len(x), 8)

    data = image_set(per_class=2)._replace(labels=np.array([0, 4, 5, 7, 1, 0]))
    metrics = inference.evaluate(Ranked(), data, 8)
    assert (metrics["top1"], metrics["top5"]) == (2 / 6, 4 / 6)


def test_last_step_may_not_diverge_unseen(tmp_path):
    rule = dataclasses.replace(PLAIN, base_lr=1e38, warmup_steps=0, decay_steps=(), steps=1)
    with pytest.raises(TrainingError, match="the evaluation loss is (nan|inf) at step 1"):
        train(Net(), rule, out=tmp_path, eval_set=image_set(2))
    assert list(tmp_path.iterdir()) == [], "a folder that was there stays, empty"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_split": 0}, "batch_split: expected 1 to 10"),
        ({"batch_split": 11}, "batch_split: expected 1 to 10"),
        ({"eval_every": 0}, "eval_every: expected"),
        ({"checkpoint_every": -1}, "checkpoint_every: expected"),
        ({"precision": "fp8"}, "precision: expected auto, fp32, bf16, fp16, got 'fp8'"),
        ({"balance": "both"}, "balance: expected none, sample, loss, got 'both'"),
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
        training.train(**arguments)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def at_a_terminal():
    """SIGINT interrupts, as it does not in a job that a script started in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("at_a_terminal")
def test_second_interrupt_stops_at_once(tmp_path):
    model = Net()
    model.register_buffer("statistics", torch.zeros(1))  # with which steps are not broken off
    model.on_call = lambda call: call >= 2 and signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(model, batch_split=10, out=tmp_path / "run", checkpoint_every=20)
    assert model.calls == 3
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
def test_trains_on_a_gpu_in_channels_last_bf16():
    model = Net()
    train(model, eval_set=image_set(2), device="cuda", precision="bf16")
    assert model.backbone.weight.is_cuda
    assert model.backbone.weight.is_contiguous(memory_format=torch.channels_last)
