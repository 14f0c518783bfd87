"""A package of AOTInductor, which PyTorch alone runs, from Python or C++; compiled for CPUs."""

import copy
from pathlib import Path

import torch
from torch import Tensor

from bitkern import _torch
from bitkern.backends import use_backend
from bitkern.convert import fold
from bitkern.export.common import with_suffix
from bitkern.transfer.finished import FinishedRun

REQUIRES: tuple[str, ...] = ()


def write(run: FinishedRun, out: Path) -> None:
    with_suffix(out, ".pt2")
    model = fold(copy.deepcopy(run.model))
    images = torch.zeros(2, 3, run.crop, run.crop)
    # Of PyTorch's own operators, so that the package runs where bitkern is not installed.
    with use_backend("reference"), torch.no_grad():
        batch = torch.export.Dim("batch")
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
        _torch.aoti_package(program, out)


def logits(run: FinishedRun, out: Path, images: Tensor) -> Tensor:
    result: Tensor = _torch.load_aoti_package(out)(images)
    return result
