"""The documentation's pictures are those that the script draws from their data."""

import tomllib
from xml.etree import ElementTree

import pytest

from benchmarks import pictures
from tests import ROOT
from tests.process import python

COMMITTED = ROOT / "docs" / "pictures"


def drawn(name, folder):
    path = folder / f"{name}.svg"
    pictures.PICTURES[name](path)
    return path


def test_the_committed_ones_are_those_of_the_script(tmp_path):
    python("-m", "benchmarks.pictures", tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in COMMITTED.glob("*.svg")}
    for name in names:
        again = "python -m benchmarks.pictures docs/pictures"
        assert (tmp_path / name).read_bytes() == (COMMITTED / name).read_bytes(), again


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_everything_is_inside(name, tmp_path):
    root = ElementTree.parse(drawn(name, tmp_path)).getroot()
    width, height = map(float, root.get("viewBox").split()[2:])
    for box in root.iter("{*}rect"):
        assert 0 <= float(box.get("x")) <= float(box.get("x")) + float(box.get("width")) <= width
        assert 0 <= float(box.get("y")) <= float(box.get("y")) + float(box.get("height")) <= height
    assert all(0 < float(text.get("y")) < height - 10 for text in root.iter("{*}text"))


def test_a_text_that_does_not_fit_is_an_error():
    drawing = pictures.Drawing("")
    drawing.text(0, 0, "m" * 10, room=118, size=21)
    with pytest.raises(ValueError, match="needs 129 of 118"):
        drawing.text(0, 0, "m" * 11, room=118, size=21)


def test_a_figure_that_changes_changes_the_picture(tmp_path, monkeypatch):
    results = pictures.results
    before = drawn("speed_memory", tmp_path).read_text()

    def slower(name):
        measured = results(name)
        measured["rows"][0]["ours_ms"] *= 2
        return measured

    ours = round(results("cpu_models.json")["rows"][0]["ours_ms"])
    assert f">{ours}<" in before
    monkeypatch.setattr(pictures, "results", slower)
    assert f">{ours}<" not in drawn("speed_memory", tmp_path).read_text()


def test_the_parts_are_those_of_the_package():
    rows = [{*parts} - {"csrc"} for parts in pictures.PARTS]
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = contracts["contracts"][0]["layers"]
    assert rows == [{*layer.split(" | ")} for layer in layers[: layers.index("files | layout")]]
