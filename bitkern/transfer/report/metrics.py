"""The metrics of report.json; docs/report.md explains them."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bitkern.packages import require
from bitkern.transfer.data.images import ImageSet
from bitkern.transfer.report.evaluation import Evaluation, evaluate_logits
from bitkern.transfer.rng import BOOTSTRAP, random_stream

if TYPE_CHECKING:
    from scipy.sparse import csr_array

BINS = 15  # of probability, for the calibration
LARGEST_MATRIX = 100  # classes
PAIRS, RAREST, MISTAKES = 25, 10, 24
RESAMPLES = 500
Z_95 = 1.959964  # standard deviations on each side that hold 95 % of a normal distribution
Interval = tuple[float, float]


def scores(outputs: Tensor, data: ImageSet) -> dict[str, Any]:
    """Compute the metrics of report.json from fp32 logits (N, classes) of ``data``, in order.

    All are JSON values; an undefined one, such as the recall of a class that never occurs, is
    None. Raises ValueError, naming the argument, for another shape and for logits that are not
    finite.
    """
    require("sklearn")
    return compute_scores(evaluate_logits(outputs, data), data)


def compute_scores(evaluation: Evaluation, data: ImageSet) -> dict[str, Any]:
    truth, predicted, rank = evaluation.truth, evaluation.predicted, evaluation.rank
    correct, support, positives = (truth & predicted).sum(0), truth.sum(0), predicted.sum(0)
    per_class = _per_class(evaluation, data.classes)
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
    resampled = bootstrap_intervals(evaluation, means["balanced_accuracy"], means["macro_f1"])
    rarest = np.argsort(support, kind="stable")[:RAREST]
    return {
        "images": len(rank),
        "classes": len(data.classes),
        "multi_label": data.multi_label,
        "top1": top1,
        "top5": float(np.mean((rank > 0) & (rank <= 5))),
        "exact_match": float(np.mean(evaluation.exact_matches)),
        "loss": evaluation.loss,
        "baseline_top1": int(support.max()) / len(rank),
        "largest_class": data.classes[support.argmax()],
        **means,
        "micro_precision": _ratio(correct.sum(), positives.sum()),
        "micro_recall": _ratio(correct.sum(), support.sum()),
        "micro_f1": _ratio(2 * correct.sum(), support.sum() + positives.sum()),
        "intervals": {"top1": wilson(top1, len(rank)), **resampled},
        "per_class": per_class,
        "rarest": [data.classes[c] for c in rarest],
        "calibration": _calibration(evaluation, data.multi_label),
        "confusion": _confusion(evaluation, data.classes),
        "mistakes": _mistakes(evaluation, data),
    }


def confusion_matrix(evaluation: Evaluation) -> "csr_array":
    """int64 (C, C): the number of images of class i for which j was predicted.

    For a multi-label set the images with label i for which i was missed and j predicted wrongly; on
    the diagonal those for which i was found.
    """
    from scipy.sparse import csr_array, diags_array

    missed = csr_array(evaluation.truth & ~evaluation.predicted, dtype=np.int64)
    wrong = csr_array(evaluation.predicted & ~evaluation.truth, dtype=np.int64)
    found = (evaluation.truth & evaluation.predicted).sum(0, dtype=np.int64)
    matrix = missed.T @ wrong + diags_array(found, dtype=np.int64)
    matrix.eliminate_zeros()
    return matrix


def image_name(data: ImageSet, index: int) -> str | int:
    """Return the path of an image, or the index of an array."""
    source = data.images[index]
    return index if isinstance(source, np.ndarray) else str(source)


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def _per_class(evaluation: Evaluation, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    from sklearn.metrics import average_precision_score

    truth, predicted, chances = evaluation.truth, evaluation.predicted, evaluation.probabilities
    counts = (truth & predicted).sum(0), truth.sum(0), predicted.sum(0)
    return [
        {
            "class": name,
            "precision": _ratio(correct, positives),
            "recall": _ratio(correct, support),
            "f1": _ratio(2 * correct, support + positives),
            "support": int(support),
            "predicted": int(positives),
            "average_precision": (
                float(average_precision_score(truth[:, c], chances[:, c])) if support else None
            ),
        }
        for c, (name, correct, support, positives) in enumerate(zip(classes, *counts, strict=True))
    ]


def _calibration(evaluation: Evaluation, multi_label: bool) -> dict[str, Any]:
    chances, truth = evaluation.probabilities, evaluation.truth
    brier = float(np.square(chances - truth, dtype=np.float32).sum(1).mean())
    if not multi_label:
        chances, truth = chances[evaluation.predicted], truth[evaluation.predicted]
    chances, truth = chances.ravel(), truth.ravel().astype(np.float32)
    histogram: dict[str, Any] = {"bins": BINS, "range": (0.0, 1.0)}
    counts, _ = np.histogram(chances, **histogram)
    sums, _ = np.histogram(chances, weights=chances, **histogram)
    hits, _ = np.histogram(chances, weights=truth, **histogram)
    bins = [
        {"confidence": _ratio(total, n), "accuracy": _ratio(hit, n), "count": int(n)}
        for total, hit, n in zip(sums, hits, counts, strict=True)
    ]
    ece = float(np.abs(sums - hits).sum() / len(chances))
    return {"ece": ece, "brier": brier, "bins": bins}


def _confusion(evaluation: Evaluation, classes: tuple[str, ...]) -> dict[str, Any]:
    matrix = confusion_matrix(evaluation)
    cells = matrix.tocoo()
    support = evaluation.truth.sum(0)
    wrong = np.flatnonzero(cells.row != cells.col)
    row, column, count = cells.row[wrong], cells.col[wrong], cells.data[wrong]
    most = np.lexsort((column, row, -count))[:PAIRS]
    pairs = [
        {
            "true": classes[i],
            "predicted": classes[j],
            "count": int(n),
            "share": float(n / support[i]),
        }
        for i, j, n in zip(row[most], column[most], count[most], strict=True)
    ]
    shown = matrix.toarray().tolist() if len(classes) <= LARGEST_MATRIX else None
    return {"pairs": pairs, "matrix": shown}


def _mistakes(evaluation: Evaluation, data: ImageSet) -> list[dict[str, Any]]:
    """List wrong classes of the highest probability and, if multi-label, labels of the lowest."""
    truth, predicted, chances = evaluation.truth, evaluation.predicted, evaluation.probabilities
    kinds = [("false positive", predicted & ~truth, -1)]
    if data.multi_label:
        kinds.append(("false negative", truth & ~predicted, 1))
    found = []
    for kind, where, sign in kinds:
        images, classes = np.nonzero(where)
        order = np.argsort(sign * chances[images, classes], kind="stable")
        for n in order[: MISTAKES // len(kinds)]:
            i, c = int(images[n]), classes[n]
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


def wilson(share: float, count: int) -> Interval:
    """Return Wilson's 95 % interval of a share of ``count`` images: never empty, in [0, 1]."""
    spread = Z_95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_intervals(
    evaluation: Evaluation, balanced_accuracy: float | None, macro_f1: float | None
) -> dict[str, Interval | None]:
    """Return 95 % intervals of the two values; None where all resamples are the same.

    The standard error of 500 resamples of the images goes to both sides of the value. Percentiles
    would be biased, because rare classes shift all resamples to one side.
    """
    from scipy.sparse import csr_array, hstack

    truth, predicted = csr_array(evaluation.truth), csr_array(evaluation.predicted)
    counted = hstack([truth * predicted, truth, predicted], format="csr", dtype=np.float64)
    count = len(evaluation.rank)
    resampled = []
    for resample in range(RESAMPLES):
        drawn = random_stream(BOOTSTRAP, resample).integers(count, size=count)
        times = np.bincount(drawn, minlength=count).astype(np.float64)
        correct, support, positives = np.split(times @ counted, 3)
        occurs = support > 0
        if occurs.any():  # multi-label images may have no labels
            correct, support, positives = correct[occurs], support[occurs], positives[occurs]
            resampled.append(
                ((correct / support).mean(), (2 * correct / (support + positives)).mean())
            )
    errors = Z_95 * np.std(resampled or [(0.0, 0.0)], axis=0)
    values = {"balanced_accuracy": balanced_accuracy, "macro_f1": macro_f1}
    return {
        name: (max(0.0, value - error), min(1.0, value + error))
        if value is not None and error
        else None
        for (name, value), error in zip(values.items(), errors.tolist(), strict=True)
    }
