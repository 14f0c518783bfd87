"""Finished runs: the model, and what it was trained on."""

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from bitkern import files
from bitkern.models import ARCHITECTURES, ResNetV2, create_model
from bitkern.models.checkpoints import read_metadata
from bitkern.transfer.run import CHECKPOINT, METRICS, SUMMARY, WEIGHTS, Record


class FinishedRun(NamedTuple):
    """What ``load_run`` returns.

    ``model`` maps images (N, 3, crop, crop) in [-1, 1] to logits (N, classes), of a softmax, or
    with ``multi_label`` of a sigmoid for each class. ``architecture`` is its bare name, such as
    ``"R50x1"``. ``summary`` is the content of summary.json, ``history`` that of
    metrics.jsonl; empty where there is none. ``decoder`` read the images it was trained on.
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
        raise ValueError(f"{path}: holds a model of one's own ({architecture})")
    model = create_model(architecture, weights=path)
    if model.num_classes != len(classes):
        raise ValueError(f"{path}: names {len(classes)} classes, its head has {model.num_classes}")
    multi_label = metadata.get("multi_label", False)
    (summary,) = _read_objects(path.with_name(SUMMARY), lambda text: [text]) or [{}]
    history = _read_objects(path.with_name(METRICS), str.splitlines)
    crop, decoder = metadata["crop"], metadata.get("decoder", "pillow")
    return FinishedRun(model, architecture, classes, crop, multi_label, summary, history, decoder)


def _read_objects(path: Path, parts: Callable[[str], list[str]]) -> list[dict[str, Any]]:
    """The JSON objects that are the parts of a file; none where there is no file."""
    if not path.exists():
        return []
    with files.reading(path, "a file of a run"):
        objects = [json.loads(part) for part in parts(path.read_text())]
        if not all(isinstance(each, dict) for each in objects):
            raise ValueError("expected an object")
        return objects
