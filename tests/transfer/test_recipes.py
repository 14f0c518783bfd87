"""The BiT-HyperRule against a table (arXiv 1912.11370, section 3.3); MixUp; unbalanced classes."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from sklearn.utils.class_weight import compute_class_weight

from bitkern.transfer import hyperrule, mixup, mixup_loss
from bitkern.transfer.balance import class_weights, sample_weights
from bitkern.transfer.recipes.mixup import cross_entropy
from bitkern.transfer.schedule import Schedule
from tests.transfer.images import image_set
from tests.transfer.net import PLAIN, RULE, Net, assert_same_bits, train

SHORT = (500, (200, 300, 400), 100, 0.0)
MIDDLE = (10_000, (3000, 6000, 9000), 500, 0.1)
LONG = (20_000, (6000, 12_000, 18_000), 500, 0.1)


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [(1, 19_999, SHORT), (20_000, 499_999, MIDDLE), (500_000, 1_281_167, LONG)],
)
def test_schedule(least, most, expected):
    for num_examples in (least, most):
        rule = hyperrule(num_examples, (224, 224))
        assert (rule.steps, rule.decay_steps, rule.warmup_steps, rule.mixup_alpha) == expected
        assert (rule.base_lr, rule.batch_size) == (0.003, 512)


@pytest.mark.parametrize(
    ("expected", "sizes"),
    [
        ((160, 128), [(8, 8), (95, 97), (97, 95)]),  # up to 9215 pixels
        ((512, 480), [(96, 96), (1, 9216), (480, 640)]),
    ],
)
def test_resolution(expected, sizes):
    for size in sizes:
        rule = hyperrule(1000, size)
        assert (rule.resize, rule.crop) == expected, size


@pytest.mark.parametrize(
    ("num_examples", "rates"),
    [
        (10, {0: 0, 1: 3e-5, 50: 0.0015, 99: 0.003 * 0.99, 100: 0.003, 200: 0.003, 201: 3e-4}),
        (10, {300: 3e-4, 301: 3e-5, 400: 3e-5, 401: 3e-6, 499: 3e-6}),
        (20_000, {499: 0.003 * 499 / 500, 500: 0.003, 3000: 0.003, 3001: 3e-4, 9001: 3e-6}),
        (500_000, {250: 0.0015, 6000: 0.003, 6001: 3e-4, 19_999: 3e-6}),
    ],
)
def test_lr(num_examples, rates):
    rule = hyperrule(num_examples, (32, 32))
    assert {step: rule.lr(step) for step in rates} == pytest.approx(rates, rel=1e-15, abs=0)


def test_lr_scales_with_base_lr_and_may_start_without_warm_up():
    rule = dataclasses.replace(hyperrule(10, (32, 32)), base_lr=0.02, warmup_steps=0)
    assert [rule.lr(step) for step in (0, 200)] == [0.02, 0.02]
    assert math.isclose(rule.lr(201), 0.002)


def test_with_steps_keeps_the_proportions():
    rule = hyperrule(10, (32, 32)).with_steps(50)
    assert (rule.steps, rule.decay_steps, rule.warmup_steps) == (50, (20, 30, 40), 10)
    assert rule.with_steps(500) == hyperrule(10, (32, 32))
    tiny = rule.with_steps(1)
    assert tiny.lr(0) > 0, "a run of one step must move"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"resize": 127}, "resize"),
        ({"crop": 0}, "crop"),
        ({"steps": 0}, "steps"),
        ({"decay_steps": (300, 200)}, "decay_steps"),
        ({"decay_steps": (-1,)}, "decay_steps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"mixup_alpha": -0.1}, "mixup_alpha"),
        ({"mixup_alpha": math.nan}, "mixup_alpha"),
        ({"base_lr": 0.0}, "base_lr"),
        ({"base_lr": math.inf}, "base_lr"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_rejects_a_rule_that_makes_no_schedule(change, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        dataclasses.replace(hyperrule(10, (32, 32)), **change)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: hyperrule(0, (32, 32)), "num_examples"),
        (lambda: hyperrule(10, (0, 32)), "image_size"),
        (lambda: hyperrule(10, (32, 32, 3)), "image_size"),
        (lambda: hyperrule(10, (32, 32)).lr(-1), "step"),
        (lambda: hyperrule(10, (32, 32)).with_steps(0), "steps"),
    ],
)
def test_rejects_bad_arguments(call, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        call()


def test_quick_is_smaller_in_all_and_no_larger_in_anything():
    rule = hyperrule(1000, (480, 480)).quick()
    assert (rule.resize, rule.crop, rule.steps, rule.batch_size) == (160, 128, 100, 64)
    assert (rule.warmup_steps, rule.decay_steps, rule.base_lr) == (20, (40, 60, 80), 0.003)
    small = dataclasses.replace(rule.with_steps(10), resize=40, crop=32, batch_size=7)
    assert small.quick() == small


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, 5, 4, generator=generator, dtype=torch.float64) * 3 + 1
    y = torch.tensor([0, 1, 2, 2, 4, 3, 0])
    return x, y, torch.randperm(7, generator=generator)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.97, 1.0])
def test_loss_and_gradient_equal_soft_labels(batch, lam):
    x, y, permutation = batch
    logits = (x.flatten(1)[:, :5] * 4).requires_grad_()
    _, y, y_perm = mixup(x, y, lam, permutation)
    loss = mixup_loss(logits, y, y_perm, lam)
    onehot = torch.eye(5, dtype=torch.float64)
    soft = F.cross_entropy(logits, lam * onehot[y] + (1 - lam) * onehot[y[permutation]])
    torch.testing.assert_close(loss, soft, rtol=1e-12, atol=0)
    ours, expected = (torch.autograd.grad(value, logits)[0] for value in (loss, soft))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_mixes_each_image_with_its_partner(batch, lam, dtype, format):
    x, y, permutation = batch
    x = x.to(dtype).contiguous(memory_format=format)
    before = x.clone()
    mixed, y_same, y_perm = mixup(x, y, lam, permutation)
    for i, j in enumerate(permutation):
        expected = (lam * x[i].double() + (1 - lam) * x[j].double()).to(dtype)
        torch.testing.assert_close(mixed[i], expected)
    assert mixed.dtype == dtype and mixed.is_contiguous(memory_format=format)
    assert torch.equal(y_same, y) and torch.equal(y_perm, y[permutation])
    assert torch.equal(x, before)


def test_half_precision_logits_are_reduced_in_fp32(batch):
    _, y, permutation = batch
    logits = torch.randn(7, 5).half()
    loss = mixup_loss(logits, y, y[permutation], 0.4)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, mixup_loss(logits.float(), y, y[permutation], 0.4))


@pytest.mark.parametrize("n", [0, 1])
def test_batch_of_one_and_of_none(n):
    x, y = torch.randn(n, 3, 4, 4), torch.zeros(n, dtype=torch.int64)
    mixed, _, y_perm = mixup(x, y, 0.3, torch.arange(n))
    assert y_perm.shape == (n,)
    torch.testing.assert_close(mixed, x)


X, Y, P = torch.randn(4, 3, 2, 2), torch.arange(4), torch.tensor([3, 2, 1, 0])
LOGITS = torch.randn(4, 5)


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (mixup, (X, Y, 1.1, P), "lam"),
        (mixup, (X, Y, -0.1, P), "lam"),
        (mixup, (X, Y, float("nan"), P), "lam"),
        (mixup, (X.to(torch.uint8), Y, 0.5, P), "x"),
        (mixup, (X, Y[:3], 0.5, P), "y"),
        (mixup, (X, Y, 0.5, P[:3]), "permutation"),
        (mixup, (X, Y, 0.5, P.int()), "permutation"),
        (mixup, (X, Y, 0.5, torch.tensor([0, 0, 1, 2])), "permutation"),
        (mixup, (X, Y, 0.5, torch.tensor([1, 2, 3, 4])), "permutation"),
        (mixup_loss, (LOGITS[0], Y, Y, 0.5), "logits"),
        (mixup_loss, (LOGITS, Y[:3], Y, 0.5), "y"),
        (mixup_loss, (LOGITS, Y.float(), Y, 0.5), "y"),
        (mixup_loss, (LOGITS, Y, Y[:3], 0.5), "y_perm"),
        (mixup_loss, (LOGITS, Y, Y, 2), "lam"),
    ],
)
def test_mixup_rejects(function, arguments, named):
    with pytest.raises((ValueError, TypeError), match=f"^{named}: expected"):
        function(*arguments)


UNBALANCED = np.repeat(np.arange(3), [60, 4, 16])
LABELS = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0]], np.bool_)


def epochs(labels, weights, count, seed=0):
    """The examples of the first epochs."""
    rule = dataclasses.replace(RULE, steps=count, batch_size=len(labels))
    schedule = Schedule(len(labels), rule, seed, weights=weights)
    return [np.array([index for index, _ in batch]) for batch in schedule.micro_batches()]


def test_classes_are_drawn_equally_often():
    drawn = epochs(UNBALANCED, sample_weights(UNBALANCED), 40)
    for epoch in drawn:
        counts = np.bincount(UNBALANCED[epoch], minlength=3)
        assert counts.min() >= 26 and counts.max() <= 28 and counts.sum() == 80
    times = np.bincount(np.concatenate(drawn), minlength=80)
    # Every example has its turn: 40 epochs * 80 / 3 for each class, shared by those of the class.
    for label, expected in enumerate((17.8, 266.7, 66.7)):
        own = times[UNBALANCED == label]
        assert abs(own.mean() - expected) < 0.5
        assert own.min() > 0.3 * expected and own.max() < 2 * expected
    assert not np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[3], epochs(UNBALANCED, sample_weights(UNBALANCED), 4)[3])


def test_balanced_classes_are_drawn_once_each():
    labels = np.repeat(np.arange(3), 5)
    for epoch in epochs(labels, sample_weights(labels), 5):
        assert sorted(epoch) == list(range(15))


def test_labels_that_are_kept_sparse_weigh_the_same():
    labels = np.random.default_rng(0).random((50, 7)) < [0.01, 0.1, 0.3, 0.5, 0.02, 0.9, 0]
    assert not labels.any(1).all()
    sparse = csr_array(labels)
    assert np.array_equal(sample_weights(sparse), sample_weights(labels))
    assert np.array_equal(class_weights(sparse, 7), class_weights(labels, 7))
    rarity = 1 / np.maximum(labels.sum(0), 1)
    expected = [max((rarity[c] for c in np.flatnonzero(row)), default=None) for row in labels]
    expected = [1 / expected.count(None) if value is None else value for value in expected]
    assert np.array_equal(sample_weights(labels), expected)


def test_images_of_several_labels_go_by_the_rarest():
    # Four images of class 0, one of them also the only one of class 1; none of class 2; two bare.
    assert sample_weights(LABELS).tolist() == [1, 1 / 4, 1 / 2, 1 / 4, 1 / 2, 1 / 4]


def test_class_weights():
    weights = class_weights(UNBALANCED, 4)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=UNBALANCED)
    np.testing.assert_allclose(weights[:3], expected, rtol=1e-12)
    assert weights[3] == 1
    assert np.isclose(weights[UNBALANCED].mean(), 1)
    assert class_weights(LABELS, 3).tolist() == [2 / 4, 5, 1]


def test_weighted_loss_is_a_mean_over_images_whatever_the_batch():
    logits = torch.randn(12, 3, dtype=torch.float64)
    y, weight = torch.randint(3, (12,)), torch.tensor([0.5, 3.0, 1.0], dtype=torch.float64)
    each = F.cross_entropy(logits, y, reduction="none") * weight[y]
    torch.testing.assert_close(cross_entropy(logits, y, weight), each.mean())
    parts = [cross_entropy(a, b, weight) for a, b in zip(logits.split(4), y.split(4), strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(), each.mean())


def test_loss_of_several_labels_is_summed_over_classes():
    logits, y = torch.randn(5, 4, dtype=torch.float64), torch.rand(5, 4) < 0.4
    weight = torch.tensor([1.0, 2.0, 0.5, 7.0], dtype=torch.float64)
    p = logits.sigmoid()
    each = -(weight * y * p.log() + ~y * (1 - p).log()).sum(1)
    torch.testing.assert_close(cross_entropy(logits, y, weight), each.mean())
    other = y[torch.randperm(5)]
    mixed = mixup_loss(logits, y, other, 0.3)
    soft = 0.3 * y.double() + 0.7 * other.double()
    expected = F.binary_cross_entropy_with_logits(logits, soft, reduction="sum") / 5
    torch.testing.assert_close(mixed, expected)
    with pytest.raises(ValueError, match=r"y: expected int64 of shape \(5,\) or bool of shape"):
        mixup_loss(logits, y.float(), other, 0.3)


@pytest.mark.parametrize("balance", ["sample", "loss"])
def test_training_in_micro_batches_is_the_same(balance):
    # Class 0 three times as frequent as the others.
    data = image_set().subset([0, 1, 2, 3, 4, 5, 10])
    whole, split = Net(torch.float64), Net(torch.float64)
    train(whole, PLAIN, train_set=data, balance=balance)
    train(split, PLAIN, train_set=data, balance=balance, batch_split=5)
    torch.testing.assert_close(split.state_dict(), whole.state_dict(), rtol=1e-11, atol=1e-13)
    plain = Net(torch.float64)
    train(plain, PLAIN, train_set=data)
    with pytest.raises(AssertionError):
        assert_same_bits(plain, whole.state_dict())
