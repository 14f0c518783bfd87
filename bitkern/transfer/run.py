"""The files of a run: metrics.jsonl and last.pt while it trains, the results when it is done.

All but the appended metrics.jsonl are written under a temporary name, synced, and renamed.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bitkern import files
from bitkern.models.checkpoints import save_safetensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = METRICS, CHECKPOINT, SUMMARY, CURVES, WEIGHTS, REPORT = (
    "metrics.jsonl",
    "last.pt",
    "summary.json",
    "curves.png",
    "model.safetensors",
    "report.html",
)
OPTIONS = ("seed", "batch_split", "balance", "flip", "decoder")  # of a training, by their names
Record = dict[str, Any]
OnRecord = Callable[[Record], object]


class RunError(ValueError):
    """The output folder cannot be used; the message names it and says what to do."""


class Progress(NamedTuple):
    """How far a run is: finished steps, seconds of wall time, bytes of metrics.jsonl.

    And the training images that could not be read.
    """

    step: int = 0
    seconds: float = 0.0
    journal: int = 0
    corrupt: tuple[int, ...] = ()


def check_out(out: Path, resume: bool) -> None:
    """Raise ``RunError`` unless ``out`` is free (or, to resume, holds an unfinished run)."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: expected a folder, found a file")
    unfinished = (out / CHECKPOINT).exists()
    if resume:
        if unfinished:
            return
        finished = "the run is finished" if (out / SUMMARY).exists() else f"no {CHECKPOINT}"
        raise RunError(f"{out}: nothing to resume, {finished}")
    held = [name for name in NAMES if (out / name).exists()]
    if held:
        advice = "continue it with resume=True or" if unfinished else "delete it or"
        raise RunError(
            f"{out}: already contains a run ({', '.join(held)}); {advice} use another folder"
        )


class Journal:
    """The records of a run, each also a line of metrics.jsonl when there is an output folder."""

    def __init__(self, out: Path | None, size: int = 0, on_record: OnRecord | None = None) -> None:
        """``size``: the bytes of metrics.jsonl to keep; what a stopped run wrote later is cut."""
        self.records: list[Record] = []
        self.on_record = on_record
        self.file = None
        if out is not None:
            # Binary, so that tell() counts bytes and the file can be cut at any checkpoint.
            self.file = open(out / METRICS, "r+b" if size else "w+b")
            kept = self.file.read(size)
            if len(kept) != size:
                raise RunError(f"{out / METRICS}: shorter than when {CHECKPOINT} was written")
            self.file.truncate(size)
            self.records = [json.loads(line) for line in kept.splitlines()]

    def add(self, **record: Any) -> None:
        """Append a record."""
        self.records.append(record)
        if self.file:
            with files.writing(Path(self.file.name)):
                self.file.write(json.dumps(record).encode() + b"\n")
                self.file.flush()
        if self.on_record:
            self.on_record(dict(record))

    def synced_size(self) -> int:
        """The bytes of metrics.jsonl, all of which outlive a power cut."""
        if self.file is None:
            return 0
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        """Close the file; the records stay."""
        if self.file:
            self.file.close()


class Run:
    """A training and its folder; without one, and in all processes but the first, nothing is kept.

    ``state`` holds the ``model``, the ``optimizer`` and the ``scaler``, ``settings`` what may not
    change on resuming, ``about`` what a user says of the run when it begins.
    """

    def __init__(
        self,
        out: Path | None,
        state: Mapping[str, Any],
        settings: dict[str, Any],
        about: dict[str, Any],
        done: Progress,
    ) -> None:
        self.out, self.state, self.settings, self.about = out, state, settings, about
        self.done = done
        self.journal = Journal(None)

    @contextlib.contextmanager
    def recording(self, resume: bool, on_record: OnRecord | None) -> Iterator[Journal]:
        """Keep the journal during the block, the training; ``on_record`` is told what is added.

        A run can be resumed from its start on, however it is killed. One that fails before a step
        is saved, and was not resumed, leaves nothing behind.
        """
        if self.out is None:
            self.journal = Journal(None, on_record=on_record)
            yield self.journal
            return
        created = not self.out.exists()
        self.out.mkdir(parents=True, exist_ok=True)
        files.remove_parts(self.out)
        try:
            if not resume:
                self.save(self.done)
            self.journal = Journal(self.out, self.done.journal, on_record)
            yield self.journal
        finally:
            self.journal.close()
            if self.done.step == 0 and not resume:
                for name in (CHECKPOINT, METRICS):
                    (self.out / name).unlink(missing_ok=True)
                if created:
                    with contextlib.suppress(OSError):  # on_record may keep files there
                        self.out.rmdir()

    def save(self, done: Progress) -> None:
        """Write last.pt: what ``load_checkpoint`` needs to go on from there."""
        if self.out is None:
            return
        done = done._replace(journal=self.journal.synced_size())
        state = {name: part.state_dict() for name, part in self.state.items()}
        with files.replacing(self.out / CHECKPOINT) as part:
            kept = {"settings": self.settings, "about": self.about, "progress": done._asdict()}
            torch.save({**state, **kept}, part)
        self.done = done

    def save_results(self, **metadata: Any) -> None:
        """Write curves.png and model.safetensors (with ``metadata``)."""
        if self.out is not None:
            draw_curves(self.out / CURVES, self.journal.records)
            save_safetensors(self.state["model"], self.out / WEIGHTS, **metadata)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, which marks the run as finished, and remove last.pt."""
        if self.out is not None:
            write_summary(self.out, summary)
            (self.out / CHECKPOINT).unlink(missing_ok=True)


def read_checkpoint(out: Path) -> dict[str, Any]:
    """The content of last.pt. Raises ``RunError`` if it is broken."""
    path = out / CHECKPOINT
    try:
        with files.reading(path, "a checkpoint of a run"):
            state: dict[str, Any] = torch.load(path, "cpu", weights_only=True, mmap=True)
            Progress(**state["progress"])
            dict(state["settings"]["rule"], **state["model"], **state["optimizer"])
            dict(state["about"])
            dict(state["scaler"], **state["settings"])["precision"]
    except ValueError as error:
        raise RunError(str(error)) from None
    return state


def load_checkpoint(
    out: Path,
    checkpoint: Mapping[str, Any],
    state: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Progress:
    """Restore the parts of ``state`` from last.pt; returns its progress.

    Raises ``RunError`` if the run had other settings, precision apart.
    """
    path, before = out / CHECKPOINT, checkpoint["settings"]
    before, now = {"keep": "last"} | _flat(before), _flat(settings)
    for name, value in now.items():
        had = before.get(name)
        if had != value and name != "precision":
            is_option = name.startswith("rule.") or name in OPTIONS
            name = name.removeprefix("rule.") + ("=" if is_option else " ")
            raise RunError(
                f"{path}: started with {name}{had!r}, now {value!r}: resume with the options it "
                "was started with"
            )
    try:
        for name, part in state.items():
            # Of another precision a scaler has no state; earlier versions kept no model.
            if name not in ("scaler", "kept") or checkpoint.get(name):
                part.load_state_dict(checkpoint[name])
    except (RuntimeError, ValueError, KeyError) as error:
        raise RunError(f"{path}: is of another model: {files.in_a_line(error)}") from None
    return Progress(**checkpoint["progress"])


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which those of the rule have names of their own."""
    rule = {f"rule.{name}": value for name, value in settings["rule"].items()}
    return {**{name: value for name, value in settings.items() if name != "rule"}, **rule}


def write_summary(out: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json."""
    with files.replacing(out / SUMMARY) as part:
        part.write_text(json.dumps(summary, indent=2) + "\n")


def draw_curves(path: Path, records: Sequence[Record]) -> None:
    """Draw the training loss and, where there are evaluations, top-1 against the step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    plot_curves(figure, records)
    with files.replacing(path) as part:
        figure.savefig(part, format="png")


def plot_curves(figure: "Figure", records: Sequence[Record]) -> None:
    """The two plots of ``draw_curves`` in a figure of matplotlib."""
    losses = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "top1" in r]
    loss_axes, top1_axes = figure.subplots(1, 2)
    loss_axes.plot([r["step"] for r in losses], [r["loss"] for r in losses], linewidth=1)
    loss_axes.plot([r["step"] for r in evaluations], [r["eval_loss"] for r in evaluations], "o-")
    loss_axes.set(xlabel="step", ylabel="loss")
    loss_axes.legend(["train", "evaluation"])
    top1_axes.plot([r["step"] for r in evaluations], [r["top1"] for r in evaluations], "o-")
    top1_axes.set(xlabel="step", ylabel="top-1 accuracy", ylim=(0, 1))
