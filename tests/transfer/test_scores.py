"""The numbers of the evaluation report, against scikit-learn and against what a hand can count."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from bitkern.transfer import ImageSet, scores
from bitkern.transfer.report.metrics import wilson
from tests.transfer.images import CLASSES, arrays, logits, picture


def hand_made(labels, outputs, classes=("a", "b", "c")):
    return scores(torch.tensor(outputs), arrays(np.array(labels), classes))


@pytest.fixture(scope="module")
def single():
    """Logits and labels of 300 images of 7 classes, and a class without images."""
    labels = np.random.default_rng(0).integers(7, size=300)
    return logits(labels, 8), labels, scores(logits(labels, 8), arrays(labels, "abcdefgh"))


@pytest.fixture(scope="module")
def several():
    """As above, but several labels per image, or none."""
    random = np.random.default_rng(1)
    labels = random.random((200, 6)) < (0, 0.05, 0.2, 0.3, 0.4, 0.5)
    outputs = torch.from_numpy(random.normal(size=(200, 6)) + 2 * labels - 1).float()
    return outputs, labels, scores(outputs, arrays(labels, "abcdef"))


def column(found, key):
    return [row[key] for row in found["per_class"]]


def test_one_label_an_image_against_scikit_learn(single):
    outputs, labels, found = single
    predicted, chances = outputs.argmax(1).numpy(), outputs.double().softmax(1).numpy()
    occurring = {"labels": range(7), "average": "macro", "zero_division": 0}
    expected = {
        "top1": metrics.accuracy_score(labels, predicted),
        "top5": metrics.top_k_accuracy_score(labels, chances, k=5, labels=range(8)),
        "exact_match": metrics.accuracy_score(labels, predicted),
        "loss": metrics.log_loss(labels, chances, labels=range(8)),
        "balanced_accuracy": metrics.recall_score(labels, predicted, **occurring),
        "macro_precision": metrics.precision_score(labels, predicted, **occurring),
        "macro_f1": metrics.f1_score(labels, predicted, **occurring),
        "micro_f1": metrics.f1_score(labels, predicted, average="micro"),
        "baseline_top1": np.bincount(labels).max() / 300,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    truth = np.eye(8)[labels]
    brier = np.square(chances - truth).sum(1).mean()
    assert found["calibration"]["brier"] == pytest.approx(brier, rel=1e-5)
    confusion = metrics.confusion_matrix(labels, predicted, labels=range(8))
    assert found["confusion"]["matrix"] == confusion.tolist()
    ranking = [metrics.average_precision_score(truth[:, c], chances[:, c]) for c in range(7)]
    assert column(found, "average_precision") == [*map(pytest.approx, ranking), None]
    assert found["mean_average_precision"] == pytest.approx(np.mean(ranking))
    assert (found["images"], found["classes"], found["multi_label"]) == (300, 8, False)


def test_several_labels_an_image_against_scikit_learn(several):
    outputs, labels, found = several
    chances = outputs.double().sigmoid().numpy()
    predicted = chances >= 0.5
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, predicted, zero_division=np.nan
    )
    assert not support[0] and predicted[:, 0].any(), "a class that is only predicted"
    assert column(found, "precision") == [*map(pytest.approx, precision)]
    assert column(found, "recall") == [None, *map(pytest.approx, recall[1:])]
    assert column(found, "f1") == [*map(pytest.approx, f1)]
    assert column(found, "support") == support.tolist()
    assert column(found, "predicted") == predicted.sum(0).tolist()
    first, best = chances.argmax(1), np.argsort(-chances, 1)[:, :5]
    losses = -np.where(labels, np.log(chances), np.log1p(-chances))
    expected = {
        "top1": labels[np.arange(200), first].mean(),
        "top5": np.take_along_axis(labels, best, 1).any(1).mean(),
        "exact_match": metrics.accuracy_score(labels, predicted),
        "loss": losses.sum(1).mean(),
        "balanced_accuracy": recall[1:].mean(),
        "macro_f1": f1[1:].mean(),
        "micro_precision": metrics.precision_score(labels, predicted, average="micro"),
        "micro_recall": metrics.recall_score(labels, predicted, average="micro"),
        "micro_f1": metrics.f1_score(labels, predicted, average="micro"),
        "mean_average_precision": metrics.average_precision_score(labels[:, 1:], chances[:, 1:]),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    brier = np.square(chances - labels).sum(1).mean()
    assert found["calibration"]["brier"] == pytest.approx(brier, rel=1e-5)
    assert found["multi_label"] and (~labels.any(1)).any(), "images without labels count"


def test_one_schema(single, several):
    def shape(value):
        if isinstance(value, dict):
            return {key: shape(inner) for key, inner in value.items()}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [shape(value[0])]
        return type(value) in (list, tuple) and "list"

    assert shape(single[2]) == shape(several[2])


def test_what_a_hand_can_count():
    found = hand_made([0, 0, 0, 1], [[3.0, 0, 0], [2, 0, 0], [0, 0, 4], [9, 0, 0]])
    assert found["confusion"]["matrix"] == [[2, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert found["confusion"]["pairs"] == [
        {"true": "a", "predicted": "c", "count": 1, "share": 1 / 3},
        {"true": "b", "predicted": "a", "count": 1, "share": 1.0},
    ]
    a, b, c = found["per_class"]
    assert (a["precision"], a["recall"], a["f1"]) == (2 / 3, 2 / 3, 2 / 3)
    assert (b["precision"], b["recall"], b["f1"]) == (None, 0, 0), "never predicted"
    assert (c["precision"], c["recall"], c["f1"]) == (0, None, 0), "never occurs"
    assert found["balanced_accuracy"] == found["macro_precision"] == pytest.approx(1 / 3)
    assert (found["baseline_top1"], found["largest_class"]) == (0.75, "a")
    assert found["rarest"] == ["c", "b", "a"]
    mistakes = [(m["image"], m["labels"], m["class"], m["kind"]) for m in found["mistakes"]]
    assert mistakes == [(3, ["b"], "a", "false positive"), (2, ["a"], "c", "false positive")]
    assert found["mistakes"][0]["probability"] == pytest.approx(1 / (1 + 2 * math.exp(-9)))


def test_calibration_by_hand():
    """Three times 0.9, right twice; once 0.65, right: bins 13 and 9 of 15."""
    sure, less = math.log(9), math.log(0.65 / 0.35)
    found = hand_made([0, 0, 1, 0], [[sure, 0.0]] * 3 + [[less, 0.0]], ("a", "b"))["calibration"]
    empty = {"confidence": None, "accuracy": None, "count": 0}
    expected = [empty] * 15
    expected[9] = {"confidence": 0.65, "accuracy": 1.0, "count": 1}
    expected[13] = {"confidence": 0.9, "accuracy": 2 / 3, "count": 3}
    for bin, values in zip(found["bins"], expected, strict=True):
        assert bin == (pytest.approx(values, rel=1e-5) if values["count"] else values)
    assert found["ece"] == pytest.approx(0.75 * (0.9 - 2 / 3) + 0.25 * 0.35, rel=1e-5)
    assert found["brier"] == pytest.approx((2 * 0.02 + 1.62 + 0.245) / 4, rel=1e-5)


def test_calibration_of_several_labels_is_of_every_class():
    labels = np.array([[True, False], [False, False]])
    outputs = [[math.log(9), -math.log(9)], [math.log(9), -math.log(9)]]
    found = hand_made(labels, outputs, "ab")["calibration"]
    filled = {i: bin["accuracy"] for i, bin in enumerate(found["bins"]) if bin["count"]}
    assert filled == {1: 0.0, 13: 0.5}
    assert found["ece"] == pytest.approx(0.1 / 2 + 0.4 / 2)


def test_confusions_of_several_labels():
    """b missed and c named wrongly twice, once also a; d missed alone is confused with nothing."""
    labels = [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    predicted = np.array([[1, 0, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    outputs = (10.0 * predicted - 5).tolist()
    found = hand_made(np.array(labels, bool), outputs, "abcd")
    assert found["confusion"]["matrix"] == [[1, 0, 0, 0], [1, 0, 2, 0], [0] * 4, [0] * 4]
    (most, other) = found["confusion"]["pairs"]
    assert most == {"true": "b", "predicted": "c", "count": 2, "share": 1.0}
    assert (other["predicted"], other["share"]) == ("a", 0.5)
    kinds = [(m["kind"], m["index"], m["class"]) for m in found["mistakes"]]
    assert [k for k in kinds if k[0] == "false negative"] == [
        ("false negative", i, c) for i, c in ((0, "b"), (1, "b"), (2, "d"))
    ]
    assert len(kinds) == 6


def test_wilson():
    """Against the roots of (p - x)^2 = z^2 x (1 - x) / n, which define the interval."""
    for share, count in ((0.0, 1), (1.0, 1), (0.9, 10), (0.5, 1000)):
        for end in wilson(share, count):
            inside = 1.959964**2 * end * (1 - end) / count
            assert (share - end) ** 2 == pytest.approx(inside, abs=1e-12)
    assert wilson(0.0, 1)[0] == 0 and wilson(1.0, 5)[1] == 1


def test_intervals_hold_the_value_of_many_images():
    """In 36 of 40 small evaluations or more: 38 are expected, and these draws are the same ever."""
    rate = np.array([0.9, 0.6, 0.8, 0.5])
    random = np.random.default_rng(0)

    def evaluated(count):
        labels = random.integers(4, size=count)
        right = random.random(count) < rate[labels]
        predicted = np.where(right, labels, (labels + 1) % 4)
        outputs = torch.from_numpy(5.0 * np.eye(4)[predicted])
        return scores(outputs, arrays(labels, "abcd"))

    many = evaluated(50_000)
    held = {"top1": 0, "balanced_accuracy": 0, "macro_f1": 0}
    for _ in range(40):
        few = evaluated(80)
        for name, (low, high) in few["intervals"].items():
            assert low < few[name] < high and high - low < 0.3
            held[name] += low <= many[name] <= high
    assert min(held.values()) >= 36, held


def test_ties_go_to_the_first_class():
    found = hand_made([0, 1, 2], [[0.0] * 3] * 3)
    assert (found["top1"], found["top5"]) == (1 / 3, 1)
    assert column(found, "predicted") == [3, 0, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3], "data: expected labels from 0 to 2, got 0 to 3"),
        ([0, 1, -1], "data: expected labels from 0 to 2, got -1 to 1"),
        ([0, 1], r"data: expected integer labels \(3,\), got int64 \(2,\)"),
        ([0.0, 1.0, 2.0], "data: expected integer labels .* got float64"),
        ([[True, False]] * 3, r"data: expected bool labels \(3, 3\), got bool \(3, 2\)"),
        ([[1, 0, 1]] * 3, "data: expected bool labels .* got int64"),
    ],
)
def test_bad_labels(labels, message):
    data = ImageSet([picture(0, 0)] * 3, np.array(labels), CLASSES)
    with pytest.raises(ValueError, match=message):
        scores(torch.zeros(3, 3), data)
    with pytest.raises(ValueError, match="data: expected images of classes, got 0 of 3"):
        scores(torch.zeros(0, 3), ImageSet([], np.zeros(0, np.int64), CLASSES))
