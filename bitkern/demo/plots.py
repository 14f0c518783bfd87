"""The demo's table, curves and sheet of predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bitkern import files
from bitkern.transfer import HyperRule, ImageSet


class DemoRun(NamedTuple):
    """A training: its name, settings, model, history and last top-1."""

    name: str
    images: int
    rule: HyperRule
    model: torch.nn.Module
    history: list[dict[str, Any]]
    top1: float


def table(pairs: dict[str, tuple[DemoRun, DemoRun]], test_images: int) -> str:
    lines = [f"{'digits per class':18}{'images':>8}{'steps':>8}{'transfer':>10}{'scratch':>10}"]
    for shots, (transfer, scratch) in pairs.items():
        counts = f"{transfer.images:>8}{transfer.rule.steps:>8}"
        lines.append(f"{shots:18}{counts}{transfer.top1:>10.3f}{scratch.top1:>10.3f}")
    top1 = pairs["all"][0].top1
    error = (top1 * (1 - top1) / test_images) ** 0.5
    lines.append(f"top-1 on the same {test_images} held-out digits, one run each")
    lines.append(
        f"standard error of the last row {error:.3f}; of few digits, the choice counts more"
    )
    return "\n".join(lines)


def _curve(axes: Any, run: DemoRun, key: str, *style: str, **options: Any) -> None:
    points = [(r["step"], r[key]) for r in run.history if key in r]
    axes.plot(*zip(*points, strict=True), *style, **options)


def draw_curves(path: Path, upstream: DemoRun, pairs: dict[str, tuple[DemoRun, DemoRun]]) -> None:
    """Plot the upstream losses, transfer and training from scratch, and few-shot results."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    before, during, few = figure.subplots(1, 3)
    _curve(before, upstream, "loss", color="tab:gray", linewidth=0.8, label="training")
    _curve(before, upstream, "eval_loss", "o-", color="black", label="letters in unseen fonts")
    before.set(title=f"Upstream: {upstream.images} letters", xlabel="step", ylabel="loss", ylim=0)
    before.legend()
    styles = {"transfer": "tab:blue", "scratch": "tab:orange"}
    for run, (label, color) in zip(pairs["all"], styles.items(), strict=True):
        _curve(during, run, "top1", "o-", color=color, label=label)
    title = f"Downstream: {pairs['all'][0].images} digits"
    during.set(title=title, xlabel="step", ylabel="top-1, held-out digits", ylim=(0, 1.02))
    during.legend(loc="lower right")
    for i, (label, color) in enumerate(styles.items()):
        heights = [pair[i].top1 for pair in pairs.values()]
        places = np.arange(len(pairs)) + 0.4 * i
        bars = few.bar(places, heights, 0.38, color=color, label=label)
        few.bar_label(bars, fmt="%.2f", fontsize=8)
    few.set_xticks(np.arange(len(pairs)) + 0.2, pairs)
    few.set(title="Few digits", xlabel="digits per class", ylabel="top-1", ylim=(0, 1.2))
    few.legend(loc="upper left", ncols=2)
    with files.atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=120)


def draw_predictions(
    path: Path, data: ImageSet, upstream: ImageSet, logits: torch.Tensor, columns: int = 16
) -> None:
    """Draw a sheet of upstream letters, the first held-out digits, and the mistakes."""
    from matplotlib.figure import Figure

    confidence, predicted = (t.numpy() for t in logits.softmax(1).max(1))
    wrong = np.flatnonzero(predicted != data.labels)
    wrong = wrong[np.argsort(-confidence[wrong])][: 2 * columns].tolist()
    letters_shown, digits_shown = (
        range(min(count, len(source.images)))
        for count, source in ((columns, upstream), (2 * columns, data))
    )
    mistakes = f"{(predicted != data.labels).sum()} of {len(data.images)} are wrong"
    sections: list[tuple[str, ImageSet, Sequence[int]]] = [
        ("Upstream: letters rendered from fonts", upstream, letters_shown),
        ("Downstream: the first held-out digits, predicted", data, digits_shown),
        (f"{mistakes}, most confident first (labels in brackets)", data, wrong),
    ]
    rows = [max(1, -(-len(indices) // columns)) for _, _, indices in sections]
    figure = Figure(figsize=(columns * 0.72, sum(rows) * 1.0 + 1.4), layout="constrained")
    parts: Any = figure.subfigures(len(sections), 1, height_ratios=[r + 0.35 for r in rows])
    for part, count, (title, source, indices) in zip(parts, rows, sections, strict=True):
        part.suptitle(title, x=0.01, ha="left", fontsize=11)
        for axes in part.subplots(count, columns, squeeze=False).flat:
            axes.set_axis_off()
        for axes, i in zip(part.axes, indices, strict=False):
            # Interpolated, like the network's input.
            axes.imshow(source.images[i], cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
            name, color = source.classes[source.labels[i]], "black"
            if source is data:
                right = predicted[i] == data.labels[i]
                color = "black" if right else "tab:red"
                truth = "" if right else f" [{name}]"
                name = f"{data.classes[predicted[i]]}{truth}\n{confidence[i]:.0%}"
            axes.set_title(name, fontsize=8, color=color, pad=2)
    with files.atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=120)
