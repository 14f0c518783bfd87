"""The page: one HTML file, without scripts and external resources."""

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitkern.text import one_line
from bitkern.transfer.report.plots import CELLS
from bitkern.transfer.report.style import CSS

WORST = 25  # classes in the table of the worst; smaller sets have the full table only
Report = Mapping[str, Any]
NONE = "–"  # an undefined value


def render(
    report: Report,
    *,
    confusion: str,
    calibration: str,
    curves: str | None,
    thumbnails: Sequence[str | None],
) -> str:
    """Render the page of a report (report.json) with plots as SVG, and a thumbnail per mistake."""
    images, classes = report["images"], report["classes"]
    title = f"Evaluation of {_count(images, 'image')}, {_count(classes, 'class', 'classes')}"
    sections = [
        _headline(report),
        _classes(report),
        _confusion(report, confusion),
        _mistakes(report, thumbnails),
        _calibration(report, calibration),
        _section("Training", _figure(curves, "Loss and top-1 accuracy by step.")) if curves else "",
        _about(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<header><h1>{title}</h1></header>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _text(value: object, limit: int = 80) -> str:
    return html.escape(one_line(value, limit))


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f}&nbsp;%"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n" + "\n".join(parts) + "\n</section>\n"


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Render a scrollable table of HTML cells; the first cell of a row is its heading."""
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>\n'
        for first, *rest in rows
    )
    return (
        f'<div class="wide" role="region" aria-label="{caption}" tabindex="0"><table>'
        f"<caption>{caption}</caption><thead><tr>{columns}</tr></thead>"
        f"<tbody>\n{body}</tbody></table></div>"
    )


def _figure(svg: str, caption: str) -> str:
    return f'<figure><div class="wide">{svg}</div><figcaption>{caption}</figcaption></figure>'


def _headline(report: Report) -> str:
    multi_label, images = report["multi_label"], report["images"]
    right = round(report["top1"] * images)
    verb = "is one of the labels of" if multi_label else "is right for"
    occurring = sum(row["support"] > 0 for row in report["per_class"])
    cards = {
        "top1": (
            "Precision at 1" if multi_label else "Top-1 accuracy",
            f"The most probable class {verb} {right} of {images} images. Always naming "
            f"<b>{_text(report['largest_class'])}</b>, the most frequent class, would reach "
            f"{_percent(report['baseline_top1'])}.",
        ),
        "top5": ("Top-5", f"One of the five most probable {verb} these."),
        "balanced_accuracy": (
            "Balanced accuracy",
            f"The mean recall of {_count(occurring, 'class', 'classes')} with images: rare ones "
            "count as much as frequent ones.",
        ),
        "macro_f1": (
            "Macro F1",
            "The mean F1 of the same classes: it falls with what is missed and with false alarms.",
        ),
        "mean_average_precision": (
            "Mean average precision",
            "How well a class's images are ranked before all others, whatever the threshold.",
        ),
        "micro_f1": ("Micro F1", "F1 over all labels of all images together."),
        "exact_match": ("Exact match", "All labels of an image, and no others."),
    }
    left_out = {"top5"} if report["classes"] <= 5 else set()
    left_out |= set() if multi_label else {"micro_f1", "exact_match"}
    shown = (_card(report, key, *cards[key]) for key in cards if key not in left_out)
    words = (
        "Ranges are 95 % confidence intervals for images from the same source; they say nothing "
        "about other sources. There is none where the images are too few or too alike."
    )
    return _section("Accuracy", f'<dl class="cards">{"".join(shown)}</dl>', f"<p>{words}</p>")


def _card(report: Report, key: str, name: str, words: str) -> str:
    between = ""
    if interval := report["intervals"].get(key):
        low, high = (f"{100 * end:.1f}" for end in interval)
        between = f' <span class="interval">{low} to {high} %</span>'
    value = f"<strong>{_percent(report[key])}</strong>{between}"
    return f"<div><dt>{name}</dt><dd>{value}</dd><dd>{words}</dd></div>\n"


def _classes(report: Report) -> str:
    rows = [{"number": i, **row} for i, row in enumerate(report["per_class"], 1)]
    words = (
        "<p>Precision: of the images for which a class was predicted, the share that have it. "
        "Recall: of the images that have it, the share for which it was predicted. "
        f"{NONE}: undefined (no such images).</p>"
    )
    full_table = _class_table("All classes", rows)
    if len(rows) <= WORST:
        return _section("Class by class", words, full_table)
    occurring = [row for row in rows if row["support"]]
    worst = sorted(occurring, key=lambda row: row["f1"])[:WORST]
    rarest = sorted(rows, key=lambda row: row["support"])[: len(report["rarest"])]
    return _section(
        "Class by class",
        words,
        _class_table(f"The {len(worst)} classes of lowest F1", worst),
        _class_table(f"The {len(rarest)} rarest classes", rarest),
        f"<details><summary>All {len(rows)} classes</summary>{full_table}</details>",
    )


def _class_table(caption: str, rows: Iterable[Mapping[str, Any]]) -> str:
    head = ("Class", "No.", "Images", "Predicted", "Precision", "Recall", "F1", "Average precision")
    shares = ("precision", "recall", "f1", "average_precision")
    cells = (
        [
            _text(row["class"], 60),
            *(str(row[key]) for key in ("number", "support", "predicted")),
            *(_percent(row[key]) for key in shares),
        ]
        for row in rows
    )
    return _table(caption, head, cells)


def _confusion(report: Report, svg: str) -> str:
    multi_label, pairs = report["multi_label"], report["confusion"]["pairs"]
    words = (
        "A row holds the images with a label: on the diagonal those for which it was found, "
        "elsewhere those for which it was missed and the class of the column predicted wrongly."
        if multi_label
        else "A row holds the images of a class, a column those for which a class was predicted."
    )
    words += " Blue is right, orange wrong; the stronger, the larger the share of the row's class."
    if report["classes"] > CELLS:
        words += (
            " A dot stands for several neighbouring classes, with the largest share; confusions "
            "within a blue one are not drawn."
        )
    if not pairs:
        return _section("Confusion", _figure(svg, words), "<p>There is none.</p>")
    verb = "missed, and named" if multi_label else "taken for"
    listed = "".join(
        f"<li><b>{_text(pair['true'])}</b> {verb} <b>{_text(pair['predicted'])}</b>: "
        f"{_count(pair['count'], 'image')}, {_percent(pair['share'])}</li>\n"
        for pair in pairs
    )
    return _section(
        "Confusion",
        _figure(svg, words),
        "<h3>The most frequent confusions, with their share of the class</h3>",
        f"<ol>{listed}</ol>",
    )


def _mistakes(report: Report, thumbnails: Sequence[str | None]) -> str:
    pairs = list(zip(report["mistakes"], thumbnails, strict=True))
    groups = {
        "false positive": "Most confident wrong predictions",
        "false negative": "Labels given the lowest probability",
    }
    parts = []
    for kind, title in groups.items():
        cards = [_mistake(m, picture) for m, picture in pairs if m["kind"] == kind]
        if cards:
            parts += [f"<h3>{title}</h3>", f'<div class="pictures">{"".join(cards)}</div>']
    if not parts:
        return _section("Most confident mistakes", "<p>There are no mistakes.</p>")
    words = "<p>Look at the labels first: a confident mistake may be a wrong label.</p>"
    return _section("Most confident mistakes", words, *parts)


def _mistake(mistake: Mapping[str, Any], picture: str | None) -> str:
    image = mistake["image"]
    name = f"image {image}" if isinstance(image, int) else "/".join(Path(image).parts[-2:])
    name = _text(name, 120)
    shown = (
        f'<img src="{picture}" alt="{name}" loading="lazy">'
        if picture
        else '<div class="gone">cannot be read</div>'
    )
    labels = ", ".join(_text(label, 40) for label in mistake["labels"]) or "no label"
    verb = "predicted" if mistake["kind"] == "false positive" else "missed"
    return (
        f"<figure>{shown}<figcaption>{verb} <b>{_text(mistake['class'], 40)}</b>, "
        f"{_percent(mistake['probability'])}<br>true: <b>{labels}</b><br>"
        f"<small>{name}</small></figcaption></figure>\n"
    )


def _calibration(report: Report, svg: str) -> str:
    values = report["calibration"]
    what = "a class of an image" if report["multi_label"] else "the predicted class"
    words = (
        f"For each predicted probability of {what}, how often the prediction was right. On the "
        "dashed line the two are equal; below it the model is "
        "overconfident, above it underconfident. "
        f"The mean distance (expected calibration error) is {_percent(values['ece'])}, "
        f"the Brier score {values['brier']:.4f}, the loss {report['loss']:.4f}."
    )
    return _section("Calibration", _figure(svg, words))


def _about(report: Report) -> str:
    rows = [(_text(name), _text(value, 160)) for name, value in _flat(report["about"])]
    if not rows:
        return ""
    return _section("Settings and versions", _table("What was evaluated", ("Name", "Value"), rows))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}, ")
        else:
            yield f"{prefix}{name}", value
