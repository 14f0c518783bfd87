"""The files of a run: metrics.jsonl and last.pt while it trains, the results when it is done.

All but the appended metrics.jsonl are written under a temporary name and then renamed.
"""

import contextlib
import json
import os
import pickle
from pathlib import Path

import torch

from bitkern.models.checkpoints import save_safetensors

METRICS, CHECKPOINT, SUMMARY, CURVES, WEIGHTS = (
    "metrics.jsonl",
    "last.pt",
    "summary.json",
    "curves.png",
    "model.safetensors",
)


class RunError(ValueError):
    """The output folder cannot be used; the message names it and says what to do."""


@contextlib.contextmanager
def atomic(path: Path):
    """A temporary path in ``path``'s folder, renamed to ``path`` when the block succeeds."""
    part = path.with_name(f".part-{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_out(out: Path, resume: bool) -> None:
    """Raise :class:`RunError` unless ``out`` is free (or, to resume, holds an unfinished run)."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: expected a folder, found a file")
    unfinished = (out / CHECKPOINT).exists()
    if resume:
        if unfinished:
            return
        finished = "the run is finished" if (out / SUMMARY).exists() else f"no {CHECKPOINT}"
        raise RunError(f"{out}: nothing to resume, {finished}")
    held = [f for f in (METRICS, CHECKPOINT, SUMMARY, CURVES, WEIGHTS) if (out / f).exists()]
    if held:
        advice = "continue it with --resume or" if unfinished else "delete it or"
        raise RunError(f"{out}: holds a run ({', '.join(held)}); {advice} use another --out")


class Journal:
    """The records of a run, each also a line of metrics.jsonl when there is an output folder."""

    def __init__(self, out: Path | None, size: int = 0):
        """``size``: the bytes of metrics.jsonl to keep; what a stopped run wrote later is cut."""
        self.records = []
        self.file = None
        if out is not None:
            # Binary, so that tell() counts bytes and the file can be cut at any checkpoint.
            self.file = open(out / METRICS, "r+b" if size else "w+b")
            kept = self.file.read(size)
            if len(kept) != size:
                raise RunError(f"{out / METRICS}: shorter than when {CHECKPOINT} was written")
            self.file.truncate(size)
            self.records = [json.loads(line) for line in kept.splitlines()]

    def add(self, **record) -> None:
        self.records.append(record)
        if self.file:
            self.file.write(json.dumps(record).encode() + b"\n")
            self.file.flush()

    def size(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        if self.file:
            self.file.close()


@contextlib.contextmanager
def open_journal(out: Path | None, size: int):
    """The :class:`Journal` of a run; one that ends without a checkpoint leaves nothing behind."""
    if out is None:
        yield Journal(None)
        return
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out, size)
    try:
        yield journal
    finally:
        journal.close()
        if not (out / CHECKPOINT).exists():
            (out / METRICS).unlink()
            if created:
                out.rmdir()


def save_checkpoint(out: Path, model, optimizer, settings: dict, progress: dict) -> None:
    """Write last.pt: what :func:`load_checkpoint` needs to continue with ``progress``."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with atomic(out / CHECKPOINT) as part:
        torch.save({**state, "settings": settings, "progress": progress}, part)


def load_checkpoint(out: Path, model, optimizer, settings: dict) -> dict:
    """Restore ``model`` and ``optimizer`` from last.pt; returns its progress.

    Raises :class:`RunError` if the file is broken or the run had other settings.
    """
    path = out / CHECKPOINT
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RunError(f"{path}: not a readable checkpoint ({error})") from None
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            raise RunError(
                f"{path}: the run has {name} {state['settings'].get(name)!r}, got {value!r}: "
                f"resume with the options it was started with"
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["progress"]


def draw_curves(path: Path, records: list[dict]) -> None:
    """Draw the training loss and, where there are evaluations, top-1 against the step."""
    from matplotlib.figure import Figure

    losses = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "top1" in r]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, top1_axes = figure.subplots(1, 2)
    loss_axes.plot([r["step"] for r in losses], [r["loss"] for r in losses], linewidth=1)
    loss_axes.plot([r["step"] for r in evaluations], [r["eval_loss"] for r in evaluations], "o-")
    loss_axes.set(xlabel="step", ylabel="loss")
    loss_axes.legend(["train", "evaluation"])
    top1_axes.plot([r["step"] for r in evaluations], [r["top1"] for r in evaluations], "o-")
    top1_axes.set(xlabel="step", ylabel="top-1 accuracy", ylim=(0, 1))
    with atomic(path) as part:
        figure.savefig(part, format="png")


def write_results(out: Path, model, records: list[dict], summary: dict, **metadata) -> None:
    """Write curves.png, model.safetensors (with ``metadata``) and summary.json.

    summary.json comes last and marks the run as finished; last.pt is then removed.
    """
    draw_curves(out / CURVES, records)
    save_safetensors(model, out / WEIGHTS, **metadata)
    with atomic(out / SUMMARY) as part:
        part.write_text(json.dumps(summary, indent=2) + "\n")
    (out / CHECKPOINT).unlink(missing_ok=True)
