"""Unbalanced classes: what is drawn, and what the loss is."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from sklearn.utils.class_weight import compute_class_weight

from bitkern.transfer import hyperrule, mixup_loss, train_batches
from bitkern.transfer.balance import class_weights, sample_weights
from bitkern.transfer.recipes.mixup import cross_entropy
from bitkern.transfer.schedule import Schedule
from tests.transfer.images import image_set
from tests.transfer.net import PLAIN, RULE, Net, assert_same_bits, train

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
        of_class = times[UNBALANCED == label]
        assert abs(of_class.mean() - expected) < 0.5
        assert of_class.min() > 0.3 * expected and of_class.max() < 2 * expected
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
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], tensor, rtol=1e-11, atol=1e-13)
    plain = Net(torch.float64)
    train(plain, PLAIN, train_set=data)
    with pytest.raises(AssertionError):
        assert_same_bits(plain, whole.state_dict())


def test_several_labels_are_learnt():
    data = image_set(per_class=6)
    labels = np.eye(3, dtype=np.bool_)[data.labels] | (np.arange(3) == 0)
    data = data._replace(labels=labels)  # the first class is on every image
    rule = dataclasses.replace(hyperrule(18, (13, 17)).with_steps(60), resize=12, crop=8)
    rule = dataclasses.replace(rule, batch_size=10, base_lr=0.1)
    net = Net()
    metrics = train(net, rule, train_set=data, eval_set=data, batch_split=2).metrics
    assert metrics["top1"] == 1 and metrics["eval_loss"] < 0.5
    images, y = next(iter(train_batches(data, rule, seed=0)))
    assert y.dtype == torch.bool and y.shape == (10, 3) and images.dtype == torch.uint8
