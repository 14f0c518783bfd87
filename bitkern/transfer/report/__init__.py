"""The report of an evaluation: a page to look at, report.json and predictions.csv beside it."""

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bitkern import files
from bitkern.transfer.compute import require
from bitkern.transfer.data.images import ImageSet
from bitkern.transfer.report import pictures
from bitkern.transfer.report.numbers import confusion_matrix, image_name, numbers_of, right, scores
from bitkern.transfer.report.outcome import Outcome, judge
from bitkern.transfer.report.page import render
from bitkern.transfer.run import Record

__all__ = ["check_report", "scores", "write_report"]

NUMBERS, PREDICTIONS = "report.json", "predictions.csv"
COLUMNS = ("image", "labels", "predicted", "probability", "right", "rank")
SEPARATOR = "|"  # between the names in a cell, each quoted as in a CSV file


def write_report(
    page: str | os.PathLike[str],
    outputs: Tensor,
    data: ImageSet,
    *,
    history: Sequence[Record] = (),
    about: Mapping[str, Any] = {},
) -> dict[str, Any]:
    """Write ``page`` (.html), and beside it report.json and predictions.csv; returns the former.

    ``outputs``: the fp32 logits (N, classes) of ``data`` in order; ``history``: the records of a
    run's metrics.jsonl; ``about``: settings and versions to show, what JSON can hold, mappings in
    it too. An earlier report of that name is replaced. docs/report.md describes the files.

    Raises ValueError naming the argument or file, as ``check_report`` and ``scores`` do.
    """
    page = Path(page)
    check_report(page)
    try:
        about = json.loads(json.dumps(about, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"about: expected what JSON can hold: {error}") from None
    outcome = judge(outputs, data)
    report = {"page": page.name, **numbers_of(outcome, data), "about": about}
    matrix, support = confusion_matrix(outcome), outcome.truth.sum(0)
    text = render(
        report,
        confusion=pictures.confusion(matrix, support, data.classes),
        calibration=pictures.calibration(report["calibration"]["bins"]),
        curves=pictures.curves(history) if history else None,
        thumbnails=[pictures.thumbnail(data.images[m["index"]]) for m in report["mistakes"]],
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    # report.json first: it is what says that the others are ours.
    with files.replacing(page.with_name(NUMBERS)) as part:
        part.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    with files.replacing(page.with_name(PREDICTIONS)) as part:
        # A path keeps its bytes, also those that are no UTF-8.
        with open(part, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *_rows(outcome, data)])
    with files.replacing(page) as part:
        part.write_text(text, encoding="utf-8")
    return report


def check_report(page: str | os.PathLike[str]) -> None:
    """Raise ValueError unless ``write_report`` can write ``page`` and the files beside it."""
    require("sklearn", "matplotlib", "PIL")
    page = Path(page)
    if page.suffix != ".html":
        raise ValueError(f"{page}: expected the name of an .html file to write")
    folder = next(folder for folder in page.parents if folder.exists())
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, found a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: expected a folder that can be written to")
    report, predictions = page.with_name(NUMBERS), page.with_name(PREDICTIONS)
    advice = "write into another folder, or move it away"
    if report.exists():
        with files.reading(report, "a report of bitkern"):
            content = json.loads(report.read_bytes())
            of = content["page"] if {"page", "per_class", "calibration"} <= set(content) else None
        if of != page.name:
            whose = "no report of bitkern" if of is None else f"of {files.in_a_line(of)}"
            raise ValueError(f"{report}: is {whose}, not of {page.name}; {advice}")
    elif page.exists():
        raise ValueError(f"{page}: is no report of bitkern; {advice}")
    if predictions.exists():
        with open(predictions, "rb") as file:
            if file.readline().strip() != ",".join(COLUMNS).encode():
                raise ValueError(f"{predictions}: is of no report of bitkern; {advice}")


def _rows(outcome: Outcome, data: ImageSet) -> Iterable[tuple[Any, ...]]:
    """The rows of predictions.csv."""
    probability, correct = outcome.probabilities.max(1), right(outcome)
    for i in range(len(outcome.rank)):
        yield (
            image_name(data, i),
            _names(data.classes, outcome.truth[i]),
            _names(data.classes, outcome.predicted[i]),
            f"{probability[i]:.6f}",
            int(correct[i]),
            outcome.rank[i] or "",
        )


def _names(classes: Sequence[str], chosen: Any) -> str:
    """The names of the classes chosen, in a line of CSV with ``SEPARATOR`` between them."""
    written = io.StringIO()
    names = [classes[c] for c in chosen.nonzero()[0]]
    csv.writer(written, delimiter=SEPARATOR).writerow(names)
    return written.getvalue().removesuffix("\r\n")
