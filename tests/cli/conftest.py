"""Weights, and a finished run."""

import pytest
import torch

from bitkern.models import create_model, save_npz
from tests.cli.commands import SMALL, call
from tests.transfer.images import write_folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "BiT-M-R26x0.5.npz"
    torch.manual_seed(0)
    save_npz(create_model("R26x0.5", num_classes=5, zero_head=False), path)
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory, weights):
    """A finished run and its data; not to be changed."""
    root = tmp_path_factory.mktemp("run")
    folder = write_folder(root / "data")
    arguments = ["--data", folder, "--weights", weights, "--out", root / "out"]
    options = ["--batch-split", "2", "--mixup-alpha", "0.1", "--base-lr", "0.01"]
    assert call("finetune", *arguments, *options, *SMALL) == 0
    return root
