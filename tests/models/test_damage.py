"""Checkpoints with a few bytes changed anywhere: read, or refused in one short printable line."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bitkern.models import read_checkpoint
from bitkern.models.checkpoints import read_metadata
from bitkern.transfer import run
from tests.transfer.net import Net, stopped, train

ATTEMPTS = 400


@pytest.fixture(params=["good.npz", "good.pth", "old.pth", "good.safetensors"])
def checkpoint(request, tmp_path):
    path = tmp_path / request.param
    state = {"stem.conv.weight": torch.randn(4, 3, 2, 2), "norm.weight": torch.randn(4).half()}
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
    elif path.suffix == ".pth":
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization="good" in path.name)
    else:
        save_file(state, path, {"format": "pt", "bitkern": '{"classes": ["a", "b"]}'})
    return path


def changed(content, chance):
    content = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(content))
        content[place : place + chance.choice((1, 1, 4))] = chance.randbytes(chance.choice((1, 4)))
    return bytes(content[: chance.randrange(len(content)) if chance.random() < 0.2 else None])


def assert_reads_or_refuses(path, *readers):
    content, chance = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(ATTEMPTS):
        path.unlink()
        path.write_bytes(changed(content, chance))
        for reader in readers:
            try:
                result = reader(path)
            except ValueError as error:
                refused += 1
                message = str(error)
                assert message.startswith(f"{path}: ") and message.isprintable(), message
                assert len(message) - len(str(path)) < 240, message
            else:
                assert isinstance(result, dict)
    assert refused > ATTEMPTS / 10


def test_any_damage(checkpoint):
    readers = [read_checkpoint]
    readers += [read_metadata] if checkpoint.suffix == ".safetensors" else []
    assert_reads_or_refuses(checkpoint, *readers)


def test_any_damage_to_a_run(tmp_path):
    stopped(tmp_path)
    assert_reads_or_refuses(tmp_path / "last.pt", lambda path: run.read_checkpoint(path.parent))


@pytest.mark.parametrize("change", [{"optimizer": None}, {"model": {}}, {"settings": {}}])
def test_a_run_of_other_content(tmp_path, change):
    stopped(tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True) | change
    state = {name: part for name, part in state.items() if part is not None}
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(run.RunError) as error:
        train(Net(), out=tmp_path, resume=True, checkpoint_every=5)
    assert str(error.value).startswith(f"{tmp_path}/last.pt: ") and str(error.value).isprintable()
