"""The files of a run: metrics.jsonl and last.pt during the training, the results at the end.

All but the appended metrics.jsonl are written atomically.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bitkern import files
from bitkern.models import ARCHITECTURES, ResNetV2, create_model
from bitkern.models.checkpoints import read_metadata, save_safetensors
from bitkern.text import one_line
from bitkern.transfer.curves import Record, draw_curves

NAMES = METRICS, CHECKPOINT, SUMMARY, CURVES, WEIGHTS, REPORT = (
    "metrics.jsonl",
    "last.pt",
    "summary.json",
    "curves.png",
    "model.safetensors",
    "report.html",
)
OPTIONS = ("seed", "batch_split", "balance", "flip", "decoder")  # arguments of train
OnRecord = Callable[[Record], object]


class RunError(ValueError):
    """The output folder cannot be used; the message names it and says what to do."""


class Progress(NamedTuple):
    """The state of a run: finished steps, seconds of wall time, bytes of metrics.jsonl.

    ``corrupt`` are the training images that could not be read.
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
    """The records of a run, which are lines of metrics.jsonl if there is an output folder."""

    def __init__(self, out: Path | None, size: int = 0, on_record: OnRecord | None = None) -> None:
        """``size``: the bytes of metrics.jsonl to keep; later lines of a stopped run are cut."""
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
        self.records.append(record)
        if self.file:
            with files.explain_write_errors(Path(self.file.name)):
                self.file.write(json.dumps(record).encode() + b"\n")
                self.file.flush()
        if self.on_record:
            self.on_record(dict(record))

    def synced_size(self) -> int:
        """Flush metrics.jsonl to the disk and return its bytes."""
        if self.file is None:
            return 0
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        if self.file:
            self.file.close()


@dataclasses.dataclass(eq=False, repr=False)
class Run:
    """A training and its folder; without one, and in all processes but rank 0, nothing is written.

    ``state`` holds the objects of a checkpoint, ``settings`` must be the same on resuming,
    ``about`` are a user's entries of summary.json.
    """

    out: Path | None
    state: Mapping[str, Any]
    settings: dict[str, Any]
    about: dict[str, Any]
    done: Progress
    journal: Journal = dataclasses.field(default_factory=lambda: Journal(None))

    @contextlib.contextmanager
    def recording(self, resume: bool, on_record: OnRecord | None) -> Iterator[Journal]:
        """Open the journal for the block, the training; ``on_record`` gets each record.

        A run can be resumed from its start on, however it is killed. One that fails before a step
        is saved, and was not resumed, leaves nothing behind.
        """
        if self.out is None:
            self.journal = Journal(None, on_record=on_record)
            yield self.journal
            return
        created = not self.out.exists()
        self.out.mkdir(parents=True, exist_ok=True)
        files.remove_temporary_files(self.out)
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
        """Write last.pt, from which ``load_checkpoint`` continues."""
        if self.out is None:
            return
        done = done._replace(journal=self.journal.synced_size())
        state = {name: part.state_dict() for name, part in self.state.items()}
        with files.atomic_write(self.out / CHECKPOINT) as part:
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
            files.write_json(self.out / SUMMARY, summary)
            (self.out / CHECKPOINT).unlink(missing_ok=True)


def read_checkpoint(out: Path) -> dict[str, Any]:
    """Read last.pt. Raises ``RunError`` if it is damaged."""
    path = out / CHECKPOINT
    try:
        with files.explain_read_errors(path, "a checkpoint of a run"):
            state: dict[str, Any] = torch.load(path, "cpu", weights_only=True, mmap=True)
            Progress(**state["progress"])
            dict(state["settings"]["rule"], **state["model"], **state["optimizer"])
            dict(state["about"])
            dict(state["scaler"], **state["settings"])["precision"]
    except ValueError as error:
        raise RunError(str(error)) from None
    return state


def load_checkpoint(
    out: Path, checkpoint: Mapping[str, Any], state: Mapping[str, Any], settings: Mapping[str, Any]
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
            # A scaler is empty in other precisions; early versions had no "kept".
            if name not in ("scaler", "kept") or checkpoint.get(name):
                part.load_state_dict(checkpoint[name])
    except (RuntimeError, ValueError, KeyError) as error:
        raise RunError(f"{path}: does not fit the model: {one_line(error)}") from None
    return Progress(**checkpoint["progress"])


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the settings of the rule to "rule.NAME"."""
    rule = {f"rule.{name}": value for name, value in settings["rule"].items()}
    return {**{name: value for name, value in settings.items() if name != "rule"}, **rule}


class FinishedRun(NamedTuple):
    """The result of ``load_run``.

    ``model`` maps images (N, 3, crop, crop) in [-1, 1] to logits (N, classes), of a softmax, or
    with ``multi_label`` of a sigmoid for each class. ``architecture`` is its bare name, such as
    ``"R50x1"``. ``summary`` is the content of summary.json, ``history`` that of
    metrics.jsonl; empty where there is none. ``decoder`` is that of the training images.
    """

    model: ResNetV2
    architecture: str
    classes: tuple[str, ...]
    crop: int
    multi_label: bool
    summary: dict[str, Any]
    history: list[Record]
    decoder: str = "pillow"


def load_run(path: str | PathLike[str]) -> FinishedRun:
    """Load the folder of a run, or its model.safetensors.

    Raises ValueError naming the file and what is wrong with it, FileNotFoundError if it is missing.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / WEIGHTS).exists() and (path / CHECKPOINT).exists():
            raise ValueError(f"{path}: the run is not finished; continue it with resume=True")
        path = path / WEIGHTS
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected the folder of a run, or its {WEIGHTS}")
    metadata = read_metadata(path)
    if not {"model", "classes", "crop"} <= metadata.keys():
        raise ValueError(f"{path}: holds no class names; expected a file of a run of bitkern")
    architecture, classes = metadata["model"], tuple(metadata["classes"])
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path}: holds a custom model ({architecture})")
    model = create_model(architecture, weights=path)
    if model.num_classes != len(classes):
        raise ValueError(f"{path}: names {len(classes)} classes, its head has {model.num_classes}")
    multi_label = metadata.get("multi_label", False)
    (summary,) = _read_objects(path.with_name(SUMMARY), lambda text: [text]) or [{}]
    history = _read_objects(path.with_name(METRICS), str.splitlines)
    crop, decoder = metadata["crop"], metadata.get("decoder", "pillow")
    return FinishedRun(model, architecture, classes, crop, multi_label, summary, history, decoder)


def _read_objects(path: Path, parts: Callable[[str], list[str]]) -> list[dict[str, Any]]:
    """Read the JSON objects in the parts of a file; [] if there is no file."""
    if not path.exists():
        return []
    with files.explain_read_errors(path, "a file of a run"):
        objects = [json.loads(part) for part in parts(path.read_text())]
        if not all(isinstance(each, dict) for each in objects):
            raise ValueError("expected an object")
        return objects
