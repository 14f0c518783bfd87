"""The evaluation report: its files, and what it refuses."""

import csv
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from bitkern.transfer import ImageSet, check_report, report, scores, write_report
from bitkern.transfer.report.plots import CELLS
from tests.transfer.images import arrays, image_set, logits, picture
from tests.transfer.net import REPORT

HOSTILE = (
    '<script>alert("x")</script>',
    'a,"b"|c\r\nd',
    "жук $x^{$ 虫 \u202e",
    "&amp;" + "long " * 400,
)
HISTORY = [{"step": s, "loss": 1 / s, "lr": 0.1} for s in (1, 2)]
HISTORY += [{"step": 2, "top1": 0.5, "top5": 1.0, "eval_loss": 0.7}]


SMALLEST = [([1], 2), ([0, 0], 1), ([[True]], 1), ([[False, False]], 2), ([[True, True]] * 2, 2)]


@pytest.mark.parametrize(("labels", "classes"), [*SMALLEST, ([0] * 5, 3)])
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


class Page(HTMLParser):
    """Records what a browser would load and nest; every tag is closed in order."""

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
    found = write_report(str(folder / "out" / "report.html"), outputs, data, **options)
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
    assert "cannot be read" in words and "gone.png" in words
    assert all(page.alts) and page.tags.count("img") == len(page.alts)
    assert page.tags.count("svg") == text.count('role="img"') == 3
    assert '<html lang="en">' in text and "<title>Evaluation of 4 images, 4 classes<" in text
    identifiers = re.findall(r' id="([^"]*)"', text)
    assert {link[1:] for link in page.links if link[0] == "#"} <= set(identifiers)
    assert "$\\mathdefault" not in text


def test_files_say_what_was_returned(hostile):
    folder, found, data, outputs, options = hostile
    assert sorted(path.name for path in folder.iterdir()) == REPORT
    read = json.loads((folder / "report.json").read_bytes(), parse_constant=pytest.fail)
    assert read == json.loads(json.dumps(found))
    assert read["page"] == "report.html" and read["about"] == options["about"]
    numbers = json.loads(json.dumps(scores(outputs, data)))
    assert {name: read[name] for name in numbers} == numbers
    text = os.fsdecode((folder / "predictions.csv").read_bytes())
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["image"] for row in rows] == [*data.images[:3], "3"]
    truth = data.labels if data.multi_label else np.eye(4, dtype=bool)[data.labels]
    predicted = outputs.numpy() > 0
    for i, row in enumerate(rows):
        for cell, chosen in (("labels", truth[i]), ("predicted", predicted[i])):
            names = next(csv.reader(io.StringIO(row[cell], newline=""), delimiter="|"), [])
            assert names == [name for name, c in zip(HOSTILE, chosen, strict=True) if c]
        assert row["right"] == str(int((truth[i] == predicted[i]).all()))
    assert [row["rank"] for row in rows] == ["2", "2", "" if data.multi_label else "3", "1"]
    chances = (outputs.sigmoid() if data.multi_label else outputs.softmax(1)).amax(1).tolist()
    assert [float(row["probability"]) for row in rows] == pytest.approx(chances, abs=1e-6)


def test_same_bytes_again(hostile, tmp_path):
    folder, _, data, outputs, options = hostile
    write_report(tmp_path / "report.html", outputs, data, **options)
    for name in REPORT:
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
        ("report.json", '{"page": "report.html"}', "report.json: is not a report of bitkern"),
        ("report.json", "[]", "report.json: is not a report of bitkern"),
        ("report.json", "{", "report.json: truncated or not a report of bitkern"),
        ("report.json", "5", "report.json: truncated or not a report of bitkern"),
        ("predictions.csv", "image,label\n", "predictions.csv: is not part of a report of bitkern"),
        ("report.html", "<html>", "report.html: is not a report of bitkern"),
    ],
)
def test_refuses_what_is_not_its_own(tmp_path, monkeypatch, name, content, message):
    (tmp_path / name).write_text(content)
    monkeypatch.setattr(report, "evaluate_logits", pytest.fail)
    with pytest.raises(ValueError, match=message) as error:
        write_report(tmp_path / "report.html", torch.zeros(15, 3), image_set())
    assert "\n" not in str(error.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == [content]


def test_refuses_bad_names_and_settings_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "evaluate_logits", pytest.fail)
    for name in ("report.json", "report", "report.htm"):
        with pytest.raises(ValueError, match=f"{name}: expected the name of an .html file"):
            write_report(tmp_path / name, torch.zeros(15, 3), image_set())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: expected a folder, found a file"):
        check_report(tmp_path / "file" / "deeper" / "report.html")
    page = tmp_path / "report.html"
    for value in (object(), math.nan):
        with pytest.raises(ValueError, match="about: expected JSON values"):
            write_report(page, torch.zeros(15, 3), image_set(), about={"x": [value]})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_refuses_a_folder_that_cannot_be_written_to_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "evaluate_logits", pytest.fail)
    folder = tmp_path / "folder"
    folder.mkdir()
    # Permissions do not bind root.
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder or not mode & os.W_OK)
    for page in (folder / "report.html", folder / "new" / "report.html"):
        with pytest.raises(ValueError, match="folder: expected a folder that can be written to"):
            write_report(page, torch.zeros(15, 3), image_set())
    assert list(folder.iterdir()) == []


def test_a_failure_leaves_no_part_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_rows", Mock(side_effect=OSError("no space left on device")))
    with pytest.raises(OSError, match="no space left"):
        write_report(tmp_path / "report.html", torch.zeros(15, 3), image_set())
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
