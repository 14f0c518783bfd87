"""BiT's own format, that of its released checkpoints."""

from pathlib import Path

from torch import Tensor

from bitkern.export.common import with_suffix
from bitkern.models import create_model, save_npz
from bitkern.transfer.run import FinishedRun

REQUIRES: tuple[str, ...] = ()


def write(run: FinishedRun, out: Path) -> None:
    with_suffix(out, ".npz")
    save_npz(run.model, out)


def logits(run: FinishedRun, out: Path, images: Tensor) -> Tensor:
    result: Tensor = create_model(run.architecture, weights=out).eval()(images)
    return result
