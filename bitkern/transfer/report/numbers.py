"""The numbers of report.json; docs/report.md says what each of them means."""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bitkern.transfer.compute import require
from bitkern.transfer.data.images import ImageSet
from bitkern.transfer.report.intervals import bootstrapped, wilson
from bitkern.transfer.report.outcome import Bools, Outcome, judge

if TYPE_CHECKING:
    from scipy.sparse import csr_array

BINS = 15  # of probability, for the calibration
LARGEST_MATRIX = 100  # classes
PAIRS, RAREST, MISTAKES = 25, 10, 24


def scores(outputs: Tensor, data: ImageSet) -> dict[str, Any]:
    """The numbers of report.json, of fp32 logits (N, classes) for the images of ``data`` in order.

    All are JSON values; what is not defined, such as the recall of a class that never occurs, is
    None. Raises ValueError, naming the argument, for another shape and for logits that are not
    finite.
    """
    require("sklearn")
    return numbers_of(judge(outputs, data), data)


def numbers_of(outcome: Outcome, data: ImageSet) -> dict[str, Any]:
    """``scores`` of an outcome."""
    truth, predicted, rank = outcome.truth, outcome.predicted, outcome.rank
    found, support, named = (truth & predicted).sum(0), truth.sum(0), predicted.sum(0)
    per_class = _per_class(outcome, data.classes)
    occurring = [row for row in per_class if row["support"]]
    means = {
        name: float(np.mean([row[key] or 0.0 for row in occurring])) if occurring else None
        for name, key in (
            ("balanced_accuracy", "recall"),
            ("macro_precision", "precision"),
            ("macro_f1", "f1"),
            ("mean_average_precision", "average_precision"),
        )
    }
    top1 = float(np.mean(rank == 1))
    resampled = bootstrapped(outcome, means["balanced_accuracy"], means["macro_f1"])
    rarest = np.argsort(support, kind="stable")[:RAREST]
    return {
        "images": len(rank),
        "classes": len(data.classes),
        "multi_label": data.multi_label,
        "top1": top1,
        "top5": float(np.mean((rank > 0) & (rank <= 5))),
        "exact_match": float(np.mean(right(outcome))),
        "loss": outcome.loss,
        "baseline_top1": int(support.max()) / len(rank),
        "largest_class": data.classes[support.argmax()],
        **means,
        "micro_precision": _ratio(found.sum(), named.sum()),
        "micro_recall": _ratio(found.sum(), support.sum()),
        "micro_f1": _ratio(2 * found.sum(), support.sum() + named.sum()),
        "intervals": {"top1": wilson(top1, len(rank)), **resampled},
        "per_class": per_class,
        "rarest": [data.classes[c] for c in rarest],
        "calibration": _calibration(outcome, data.multi_label),
        "confusion": _confusion(outcome, data.classes),
        "mistakes": _mistakes(outcome, data),
    }


def right(outcome: Outcome) -> Bools:
    """bool (N,): whether the classes predicted for an image are its labels, all and no others."""
    equal: Bools = (outcome.truth == outcome.predicted).all(1)
    return equal


def confusion_matrix(outcome: Outcome) -> "csr_array":
    """int64 (C, C): the images of class i for which j was predicted.

    Of a multi-label set those that have i and for which i was missed and j named wrongly; on the
    diagonal those for which i was found.
    """
    from scipy.sparse import csr_array, diags_array

    missed = csr_array(outcome.truth & ~outcome.predicted, dtype=np.int64)
    wrong = csr_array(outcome.predicted & ~outcome.truth, dtype=np.int64)
    found = (outcome.truth & outcome.predicted).sum(0, dtype=np.int64)
    matrix = missed.T @ wrong + diags_array(found, dtype=np.int64)
    matrix.eliminate_zeros()
    return matrix


def image_name(data: ImageSet, index: int) -> str | int:
    """The path of an image, or the index of one that is an array."""
    source = data.images[index]
    return index if isinstance(source, np.ndarray) else str(source)


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def _per_class(outcome: Outcome, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    from sklearn.metrics import average_precision_score

    truth, predicted, chances = outcome.truth, outcome.predicted, outcome.probabilities
    counts = (truth & predicted).sum(0), truth.sum(0), predicted.sum(0)
    return [
        {
            "class": name,
            "precision": _ratio(found, named),
            "recall": _ratio(found, support),
            "f1": _ratio(2 * found, support + named),
            "support": int(support),
            "predicted": int(named),
            "average_precision": (
                float(average_precision_score(truth[:, c], chances[:, c])) if support else None
            ),
        }
        for c, (name, found, support, named) in enumerate(zip(classes, *counts, strict=True))
    ]


def _calibration(outcome: Outcome, multi_label: bool) -> dict[str, Any]:
    chances, truth = outcome.probabilities, outcome.truth
    brier = float(np.square(chances - truth, dtype=np.float32).sum(1).mean())
    if not multi_label:
        chances, truth = chances[outcome.predicted], truth[outcome.predicted]
    chances, truth = chances.ravel(), truth.ravel().astype(np.float32)
    of_bins: dict[str, Any] = {"bins": BINS, "range": (0.0, 1.0)}
    counts, _ = np.histogram(chances, **of_bins)
    sums, _ = np.histogram(chances, weights=chances, **of_bins)
    hits, _ = np.histogram(chances, weights=truth, **of_bins)
    bins = [
        {"confidence": _ratio(total, n), "accuracy": _ratio(hit, n), "count": int(n)}
        for total, hit, n in zip(sums, hits, counts, strict=True)
    ]
    ece = float(np.abs(sums - hits).sum() / len(chances))
    return {"ece": ece, "brier": brier, "bins": bins}


def _confusion(outcome: Outcome, classes: tuple[str, ...]) -> dict[str, Any]:
    matrix = confusion_matrix(outcome)
    cells = matrix.tocoo()
    of_class = outcome.truth.sum(0)
    wrong = np.flatnonzero(cells.row != cells.col)
    row, column, count = cells.row[wrong], cells.col[wrong], cells.data[wrong]
    most = np.lexsort((column, row, -count))[:PAIRS]
    pairs = [
        {
            "true": classes[i],
            "predicted": classes[j],
            "count": int(n),
            "share": float(n / of_class[i]),
        }
        for i, j, n in zip(row[most], column[most], count[most], strict=True)
    ]
    shown = matrix.toarray().tolist() if len(classes) <= LARGEST_MATRIX else None
    return {"pairs": pairs, "matrix": shown}


def _mistakes(outcome: Outcome, data: ImageSet) -> list[dict[str, Any]]:
    """The surest: wrong classes of high probability and, if multi-label, labels of low."""
    truth, predicted, chances = outcome.truth, outcome.predicted, outcome.probabilities
    kinds = [("false positive", predicted & ~truth, -1)]
    if data.multi_label:
        kinds.append(("false negative", truth & ~predicted, 1))
    found = []
    for kind, where, sign in kinds:
        images, classes = np.nonzero(where)
        surest = np.argsort(sign * chances[images, classes], kind="stable")
        for place in surest[: MISTAKES // len(kinds)]:
            i, c = int(images[place]), classes[place]
            found.append(
                {
                    "kind": kind,
                    "index": i,
                    "image": image_name(data, i),
                    "labels": [data.classes[label] for label in np.flatnonzero(truth[i])],
                    "class": data.classes[c],
                    "probability": float(chances[i, c]),
                }
            )
    return found
