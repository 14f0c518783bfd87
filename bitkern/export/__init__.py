"""Export finished runs to other libraries, one module per target."""

import importlib.util
from os import PathLike
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bitkern import files
from bitkern.export import aoti, npz, onnx, timm, transformers
from bitkern.transfer.checks import check_choice
from bitkern.transfer.run import FinishedRun, load_run

TOLERANCE = 1e-4


class Target(Protocol):
    """The interface of a target's module."""

    REQUIRES: tuple[str, ...]  # packages that must be installed

    def write(self, run: FinishedRun, out: Path) -> None:
        """Write ``out``, a file or folder that is not there yet.

        Raises ValueError if the target cannot hold the run's model.
        """

    def logits(self, run: FinishedRun, out: Path, images: Tensor) -> Tensor:
        """Run the exported model on images (N, 3, crop, crop) in [-1, 1]: (N, classes)."""


TARGETS: dict[str, Target] = {
    "timm": timm,
    "transformers": transformers,
    "npz": npz,
    "onnx": onnx,
    "aoti": aoti,
}


class ExportError(RuntimeError):
    """The exported model's logits differ from the run's; it has been deleted."""


def export(run: str | PathLike[str], to: str, out: str | PathLike[str]) -> float:
    """Export the model of a finished run to another library, and compare the two.

    Args:
        run: folder of a run, or its model.safetensors.
        to: ``"timm"``, a folder for ``timm.create_model("local-dir:OUT", pretrained=True)``;
            ``"transformers"``, one for ``AutoModelForImageClassification.from_pretrained``;
            ``"npz"``, BiT's own format; ``"onnx"``; ``"aoti"``, a package of AOTInductor for the
            CPUs of this kind.
        out: what to write; it must not exist.

    Returns:
        The largest difference of the logits of random images in float32, relative to the largest
        logit unless all are 0.

    Raises:
        ValueError: for a bad argument, a package that is missing, or a model that the library
            does not have.
        ExportError: if the difference is above 1e-4; then nothing is left.
    """
    check_choice("to", to, TARGETS)
    target, out = TARGETS[to], Path(out)
    for package in target.REQUIRES:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed: pip install {package}")
    if out.exists():
        raise ValueError(f"{out}: already exists; delete it or choose another out")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder")
    finished = load_run(run)
    model, crop = finished.model.eval(), finished.crop
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, crop, crop, generator=generator) * 2 - 1
    with torch.inference_mode():
        expected = model(images)
    with files.atomic_create(out) as part:
        target.write(finished, part)
        with torch.inference_mode():
            logits = target.logits(finished, part, images)
        largest = float(expected.abs().max())
        difference = float((logits - expected).abs().max()) / (largest or 1.0)
        if not difference <= TOLERANCE:
            raise ExportError(f"{out}: logits differ by {difference:.1e}, expected {TOLERANCE:g}")
    return difference
