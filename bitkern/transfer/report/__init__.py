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
from bitkern.packages import require
from bitkern.text import one_line
from bitkern.transfer.curves import Record
from bitkern.transfer.data.images import ImageSet
from bitkern.transfer.report import plots
from bitkern.transfer.report.evaluation import Evaluation, evaluate_logits
from bitkern.transfer.report.metrics import compute_scores, confusion_matrix, image_name, scores
from bitkern.transfer.report.page import render

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
    """Write ``page`` (.html), with report.json and predictions.csv beside it; returns the metrics.

    ``outputs``: the fp32 logits (N, classes) of ``data`` in order; ``history``: the records of a
    run's metrics.jsonl; ``about``: settings and versions to show, as JSON values, mappings
    included. An earlier report of that name is replaced. docs/report.md describes the files.

    Raises ValueError naming the argument or file, as ``check_report`` and ``scores`` do.
    """
    page = Path(page)
    check_report(page)
    try:
        about = json.loads(json.dumps(about, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"about: expected JSON values: {error}") from None
    evaluation = evaluate_logits(outputs, data)
    report = {"page": page.name, **compute_scores(evaluation, data), "about": about}
    matrix, support = confusion_matrix(evaluation), evaluation.truth.sum(0)
    text = render(
        report,
        confusion=plots.confusion(matrix, support, data.classes),
        calibration=plots.calibration(report["calibration"]["bins"]),
        curves=plots.curves(history) if history else None,
        thumbnails=[plots.thumbnail(data.images[m["index"]]) for m in report["mistakes"]],
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    # report.json first, because it identifies the other files as bitkern's.
    files.write_json(page.with_name(NUMBERS), report, allow_nan=False)
    with files.atomic_write(page.with_name(PREDICTIONS)) as part:
        # Paths keep their bytes, also those that are not UTF-8.
        with open(part, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *_rows(evaluation, data)])
    with files.atomic_write(page) as part:
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
        with files.explain_read_errors(report, "a report of bitkern"):
            content = json.loads(report.read_bytes())
            keys = {"page", "per_class", "calibration"}
            owner = content["page"] if keys <= set(content) else None
        if owner != page.name:
            found = "not a report of bitkern" if owner is None else f"of {one_line(owner)}"
            raise ValueError(f"{report}: is {found}, not of {page.name}; {advice}")
    elif page.exists():
        raise ValueError(f"{page}: is not a report of bitkern; {advice}")
    if predictions.exists():
        with open(predictions, "rb") as file:
            if file.readline().strip() != ",".join(COLUMNS).encode():
                raise ValueError(f"{predictions}: is not part of a report of bitkern; {advice}")


def _rows(evaluation: Evaluation, data: ImageSet) -> Iterable[tuple[Any, ...]]:
    probability, correct = evaluation.probabilities.max(1), evaluation.exact_matches
    for i in range(len(evaluation.rank)):
        yield (
            image_name(data, i),
            _names(data.classes, evaluation.truth[i]),
            _names(data.classes, evaluation.predicted[i]),
            f"{probability[i]:.6f}",
            int(correct[i]),
            evaluation.rank[i] or "",
        )


def _names(classes: Sequence[str], chosen: Any) -> str:
    """Join the names of the chosen classes by ``SEPARATOR``, quoted as in a CSV file."""
    line = io.StringIO()
    csv.writer(line, delimiter=SEPARATOR).writerow(classes[c] for c in chosen.nonzero()[0])
    return line.getvalue().removesuffix("\r\n")
