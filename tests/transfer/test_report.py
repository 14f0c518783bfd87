"""The evaluation report: its numbers, its files, and what it refuses."""

import csv
import io
import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics

from bitkern.transfer import ImageSet, check_report, report, scores, write_report
from bitkern.transfer.report.intervals import wilson
from bitkern.transfer.report.pictures import CELLS
from tests.transfer.images import CLASSES, image_set, picture

FILES = ["predictions.csv", "report.html", "report.json"]
HOSTILE = (
    '<script>alert("x")</script>',
    'a,"b"|c\r\nd',
    "жук $x^{$ 虫 \u202e",
    "&amp;" + "long " * 400,
)
HISTORY = [{"step": s, "loss": 1 / s, "lr": 0.1} for s in (1, 2)]
HISTORY += [{"step": 2, "top1": 0.5, "top5": 1.0, "eval_loss": 0.7}]


def logits(labels, classes, seed=0):
    """Random ones that tend to the label."""
    outputs = torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(seed))
    outputs[torch.arange(len(labels)), torch.from_numpy(labels)] += 1.5
    return outputs


def arrays(labels, classes):
    return ImageSet([picture(0, 0)] * len(labels), labels, tuple(classes))


def hand_made(labels, outputs, classes=("a", "b", "c")):
    return scores(torch.tensor(outputs), arrays(np.array(labels), classes))


@pytest.fixture(scope="module")
def single():
    """Logits and labels of 300 images of 7 classes, and a class without images."""
    labels = np.random.default_rng(0).integers(7, size=300)
    return logits(labels, 8), labels, scores(logits(labels, 8), arrays(labels, "abcdefgh"))


@pytest.fixture(scope="module")
def several():
    """As above, but several labels an image, or none."""
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
    assert found["bins"] == [pytest.approx(bin, rel=1e-5) for bin in expected]
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
    ("labels", "classes"),
    [
        ([1], 2),
        ([0, 0], 1),
        ([[True]], 1),
        ([[False, False]], 2),
        ([[True, True], [True, True]], 2),
        ([0] * 5, 3),
    ],
)
def test_smallest_sets(tmp_path, labels, classes):
    data = arrays(np.array(labels), "abc"[:classes])
    for outputs in (torch.zeros(len(labels), classes), torch.full((len(labels), classes), -3e38)):
        found = write_report(tmp_path / "report.html", outputs, data)
        assert found["intervals"]["top1"][0] < found["intervals"]["top1"][1]
        assert len(found["per_class"]) == classes
    huge = torch.zeros(len(labels), classes)
    huge[:, 0], huge[:, -1] = 3e38, -3e38
    json.dumps(scores(huge, data), allow_nan=False)


def bad(value=0.0, shape=(15, 3), dtype=torch.float32):
    outputs = torch.zeros(shape, dtype=dtype)
    outputs.view(-1)[4:5] = value
    return outputs


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (bad(math.nan), "outputs: expected finite logits, got NaN or infinity for image 1"),
        (bad(-math.inf), "outputs: expected finite logits"),
        (bad(shape=(15, 4)), r"outputs: expected .* \(15, 3\), got torch.float32 \(15, 4\)"),
        (bad(shape=(14, 3)), r"got torch.float32 \(14, 3\)"),
        (bad(shape=(45,)), r"got torch.float32 \(45,\)"),
        (bad(dtype=torch.int64), "expected floating-point logits .* got torch.int64"),
    ],
)
def test_bad_outputs(tmp_path, outputs, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "report.html", outputs, image_set())
    assert not list(tmp_path.iterdir())


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


class Page(HTMLParser):
    """What a browser would load and nest; every tag closed in order."""

    VOID = {"meta", "img", "br", "path", "use"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.texts, self.alts = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data")]
        self.alts += [dict(attributes).get("alt")] * (tag == "img")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


@pytest.fixture(scope="module", params=["one label", "several labels"])
def hostile(request, tmp_path_factory):
    """A report of files with odd names in classes with odd names, one of them deleted since."""
    folder = tmp_path_factory.mktemp("report")
    names = [b"\xff <b>&.png", b'say "hi", you.jpg', b"gone.png"]
    paths = [os.path.join(folder, os.fsdecode(name)) for name in names]
    for path in paths[:2]:
        Image.fromarray(picture(0, 0, 400, 900)).save(path)
    labels = np.array([1, 0, 2, 3])
    if request.param == "several labels":
        labels = np.array([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]], bool)
    data = ImageSet([*paths, picture(1, 1)], labels, HOSTILE)
    outputs = torch.tensor([[4.0, -1, -2, -3], [-1, 3, -2, -3], [5, -1, -2, -3], [-1, -2, -3, 2]])
    about = {"model": "<i>R50x1</i>", "rule": {"steps": 3, "names": list(HOSTILE)}, 'w"': None}
    options = {"history": HISTORY, "about": about}
    found = write_report(folder / "out" / "report.html", outputs, data, **options)
    return folder / "out", found, data, outputs, options


def test_page_is_whole_escaped_and_self_contained(hostile):
    folder, found, data, *_ = hostile
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base", "i"} & set(page.tags)
    assert page.links and all(link.startswith(("data:image/", "#")) for link in page.links)
    addresses = set(re.findall(r"\w+://[^\"]*", text))
    names = {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert addresses == names, "of XML, which nobody loads"
    assert "@import" not in text and "url(data" not in text
    words = " ".join(page.texts)
    assert HOSTILE[0] in words and "<i>R50x1</i>" in words and "жук $x^{$ 虫 ?" in words
    assert HOSTILE[3] not in words and "&amp;long long" in words, "cut, and escaped once"
    assert "cannot be read any more" in words and "gone.png" in words
    assert all(page.alts) and page.tags.count("img") == len(page.alts)
    assert page.tags.count("svg") == text.count('role="img"') == 3
    assert '<html lang="en">' in text and "<title>Evaluation of 4 images, 4 classes<" in text
    identifiers = re.findall(r' id="([^"]*)"', text)
    assert {link[1:] for link in page.links if link[0] == "#"} <= set(identifiers)
    assert "$\\mathdefault" not in text


def test_files_say_what_was_returned(hostile):
    folder, found, data, outputs, options = hostile
    assert sorted(path.name for path in folder.iterdir()) == FILES
    read = json.loads((folder / "report.json").read_bytes(), parse_constant=pytest.fail)
    assert read == json.loads(json.dumps(found))
    assert read["page"] == "report.html" and read["about"] == options["about"]
    numbers = json.loads(json.dumps(scores(outputs, data)))
    assert {name: read[name] for name in numbers} == numbers
    with open(
        folder / "predictions.csv", encoding="utf-8", errors="surrogateescape", newline=""
    ) as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [*data.images[:3], "3"]
    truth = data.labels if data.multi_label else np.eye(4, dtype=bool)[data.labels]
    predicted = outputs.numpy() > 0
    for i, row in enumerate(rows):
        for cell, chosen in (("labels", truth[i]), ("predicted", predicted[i])):
            names = next(csv.reader(io.StringIO(row[cell], newline=""), delimiter="|"), [])
            assert names == [name for name, c in zip(HOSTILE, chosen, strict=True) if c]
        assert row["right"] == str(int((truth[i] == predicted[i]).all()))
    assert [row["rank"] for row in rows] == ["2", "2", "" if data.multi_label else "3", "1"]
    chances = outputs.sigmoid() if data.multi_label else outputs.softmax(1)
    assert [float(r["probability"]) for r in rows] == pytest.approx(
        chances.amax(1).tolist(), abs=1e-6
    )


def test_same_bytes_again(hostile, tmp_path):
    folder, _, data, outputs, options = hostile
    write_report(tmp_path / "report.html", outputs, data, **options)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_many_classes(tmp_path):
    """A page of bounded size, with the worst and the rarest before the whole table."""
    count = CELLS + 50
    labels = np.random.default_rng(0).integers(count - 1, size=3000)
    data = arrays(labels, [f"class {c}" for c in range(count)])
    history = [{"step": s, "loss": 1 / s, "lr": 0.1} for s in range(1, 50_000)] + HISTORY[-1:]
    outputs = logits(labels, count)
    found = write_report(tmp_path / "report.html", outputs, data, history=history)
    assert found["confusion"]["matrix"] is None and len(found["confusion"]["pairs"]) == 25
    assert len(found["mistakes"]) == 24 and found["rarest"][0] == f"class {count - 1}"
    chances = [m["probability"] for m in found["mistakes"]]
    assert chances == sorted(chances, reverse=True)
    wrong = outputs.softmax(1).amax(1)[outputs.argmax(1) != torch.from_numpy(labels)]
    assert chances[0] == wrong.max().item()
    text = (tmp_path / "report.html").read_text()
    assert len(text) < 700_000
    page = Page(text)
    rows = page.tags.count("tr")
    assert rows == count + 25 + 10 + 3, "and a heading each"
    assert page.tags.count("details") == 1
    assert "nan" not in " ".join(page.texts).lower()


def test_no_mistakes(tmp_path):
    data = image_set()
    outputs = 9 * torch.eye(3)[torch.from_numpy(data.labels)]
    found = write_report(tmp_path / "report.html", outputs, data)
    assert found["top1"] == 1 and found["mistakes"] == found["confusion"]["pairs"] == []
    assert found["intervals"]["macro_f1"] is None and found["intervals"]["top1"][0] < 0.9
    assert "There are no mistakes." in (tmp_path / "report.html").read_text()


def test_replaces_its_own_and_nothing_else(tmp_path):
    page, outputs, data = tmp_path / "one.html", torch.zeros(15, 3), image_set()
    write_report(page, outputs, data)
    before = page.read_bytes()
    write_report(page, outputs + torch.arange(3), data)
    assert page.read_bytes() != before
    page.unlink()
    check_report(page)
    with pytest.raises(ValueError, match="report.json: is of one.html, not of two.html"):
        write_report(tmp_path / "two.html", outputs, data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.csv", "report.json"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("report.json", '{"page": "report.html"}', "report.json: is no report of bitkern"),
        ("report.json", "[]", "report.json: is no report of bitkern"),
        ("report.json", "{", "report.json: truncated or not a report of bitkern"),
        ("report.json", "5", "report.json: truncated or not a report of bitkern"),
        ("predictions.csv", "image,label\n", "predictions.csv: is of no report of bitkern"),
        ("report.html", "<html>", "report.html: is no report of bitkern"),
    ],
)
def test_refuses_what_is_not_its_own(tmp_path, monkeypatch, name, content, message):
    (tmp_path / name).write_text(content)
    monkeypatch.setattr(report, "judge", pytest.fail)
    with pytest.raises(ValueError, match=message) as error:
        write_report(tmp_path / "report.html", torch.zeros(15, 3), image_set())
    assert "\n" not in str(error.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == [content]


def test_refuses_bad_names_and_settings_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "judge", pytest.fail)
    for name in ("report.json", "report", "report.htm"):
        with pytest.raises(ValueError, match=f"{name}: expected the name of an .html file"):
            write_report(tmp_path / name, torch.zeros(15, 3), image_set())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: expected a folder, found a file"):
        check_report(tmp_path / "file" / "deeper" / "report.html")
    for value in (object(), math.nan):
        with pytest.raises(ValueError, match="about: expected what JSON can hold"):
            write_report(
                tmp_path / "report.html", torch.zeros(15, 3), image_set(), about={"x": [value]}
            )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failure_leaves_no_part_behind(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(report, "_rows", fail)
    with pytest.raises(OSError, match="no space left"):
        write_report(tmp_path / "report.html", torch.zeros(15, 3), image_set())
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
