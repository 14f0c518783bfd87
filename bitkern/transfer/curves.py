"""Plots of a training's records."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitkern import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]


def draw_curves(path: Path, records: Sequence[Record]) -> None:
    """Write a PNG of the training loss and, where there are evaluations, top-1 by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    plot_curves(figure, records)
    with files.atomic_write(path) as part:
        figure.savefig(part, format="png")


def plot_curves(figure: "Figure", records: Sequence[Record]) -> None:
    """Draw the two plots of ``draw_curves`` into a figure."""
    losses = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "top1" in r]
    steps = [r["step"] for r in evaluations]
    loss_axes, top1_axes = figure.subplots(1, 2)
    loss_axes.plot([r["step"] for r in losses], [r["loss"] for r in losses], linewidth=1)
    loss_axes.plot(steps, [r["eval_loss"] for r in evaluations], "o-")
    loss_axes.set(xlabel="step", ylabel="loss")
    loss_axes.legend(["train", "evaluation"])
    top1_axes.plot(steps, [r["top1"] for r in evaluations], "o-")
    top1_axes.set(xlabel="step", ylabel="top-1 accuracy", ylim=(0, 1))
