"""An AOTInductor package for CPUs, which runs with PyTorch alone, from Python or C++."""

import copy
from pathlib import Path

import torch
from torch import Tensor

from bitkern import _torch
from bitkern.backends import use_backend
from bitkern.convert import fold
from bitkern.export.common import with_suffix
from bitkern.transfer.run import FinishedRun

REQUIRES: tuple[str, ...] = ()


def write(run: FinishedRun, out: Path) -> None:
    with_suffix(out, ".pt2")
    model = fold(copy.deepcopy(run.model))
    images = torch.zeros(2, 3, run.crop, run.crop)
    # The reference uses PyTorch's operators only, so the package runs without bitkern.
    with use_backend("reference"), torch.no_grad():
        batch = torch.export.Dim("batch")
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
        _torch.aoti_package(program, out)


def logits(run: FinishedRun, out: Path, images: Tensor) -> Tensor:
    result: Tensor = _torch.load_aoti_package(out)(images)
    return result
