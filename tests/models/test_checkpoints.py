"""Checkpoints of every code base, there and back, and every way in which one can be wrong."""

import copy
import pickle
import re

import numpy as np
import pytest
import safetensors.torch
import torch
from timm.models import adapt_input_conv
from timm.models import load_state_dict as timm_load
from transformers import BitConfig, BitForImageClassification, BitModel

from bitkern.models import (
    ARCHITECTURES,
    ResNetV2,
    create_model,
    load_npz,
    load_state_dict,
    read_checkpoint,
    read_metadata,
    save_npz,
    save_safetensors,
)
from tests.models.helpers import PEER_EPS, randomize, small, timm_bit, with_eps
from tests.peers import relative


def assert_same_weights(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def blank(num_classes=7, **kwargs):
    return ResNetV2(*ARCHITECTURES["R26x0.5"], num_classes, **kwargs)


def test_official_npz(tmp_path):
    """timm reads the official files too, and so what we write; test_round_trip reads it back."""
    ours, theirs = small(), timm_bit("R26x0.5")
    save_npz(ours, tmp_path / "ours.npz")
    theirs.load_pretrained(str(tmp_path / "ours.npz"))
    assert_same_weights(ours, theirs)
    saved = np.load(tmp_path / "ours.npz", allow_pickle=False)
    assert len(saved) == len(ours.state_dict())
    assert {array.dtype for array in saved.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_round_trip(tmp_path, suffix, dtype):
    model = small().to(dtype, memory_format=torch.channels_last)
    path = tmp_path / f"model.{suffix}"
    (save_npz if suffix == "npz" else save_safetensors)(model, path)
    other = create_model("R26x0.5", weights=path, dtype=dtype)
    assert_same_weights(other, model)
    assert list(tmp_path.iterdir()) == [path]


def test_metadata(tmp_path):
    path = tmp_path / "model.safetensors"
    save_safetensors(small(), path, classes=["Ätna", "b"], crop=128)
    assert read_metadata(path) == {"model": "R26x0.5", "classes": ["Ätna", "b"], "crop": 128}
    assert create_model(read_metadata(path)["model"], weights=path).num_classes == 7
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    assert read_metadata(path) == {}


def big_transfer_name(name):
    name = re.sub(
        r"stages\.(\d)\.blocks\.(\d)",
        lambda m: f"body.block{int(m[1]) + 1}.unit{int(m[2]) + 1:02d}",
        name,
    )
    for ours, theirs in {
        "stem.": "root.",
        "downsample.conv": "downsample",
        ".norm": ".gn",
        "head.fc": "head.conv",
    }.items():
        name = name.replace(ours, theirs)
    return "module." + re.sub("^norm", "head.gn", name)


def test_big_transfer_training_checkpoint(tmp_path):
    model = small()
    state = {big_transfer_name(name): t for name, t in model.state_dict().items()}
    assert "module.body.block4.unit02.gn3.weight" in state and "module.head.gn.bias" in state
    path = tmp_path / "bit.pth.tar"
    torch.save({"step": 3, "model": state, "optim": {"state": {}, "param_groups": []}}, path)
    assert_same_weights(create_model("R26x0.5", weights=path), model)


def test_timm_checkpoints(tmp_path):
    theirs = timm_bit("R26x0.5")
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    torch.save({"state_dict": theirs.state_dict(), "epoch": 3}, tmp_path / "b.pt")
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "c.safetensors")
    for path in tmp_path.iterdir():
        assert_same_weights(create_model("R26x0.5", weights=path), theirs)
    save_safetensors(small(), tmp_path / "ours.safetensors")  # and back into timm
    theirs.load_state_dict(timm_load(tmp_path / "ours.safetensors"), strict=True)
    assert_same_weights(theirs, small())


def test_transformers_checkpoints(tmp_path):
    config = BitConfig(
        embedding_size=32, hidden_sizes=(128, 256, 512, 1024), depths=(2, 2, 2, 2), num_labels=7
    )
    theirs = randomize(BitForImageClassification(config)).half()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    ours = create_model("R26x0.5", weights=tmp_path / "pytorch_model.bin")
    assert ours.get_classifier().weight.dtype == torch.float32
    for mine, its in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(mine, its.float().reshape(mine.shape))

    body = randomize(BitModel(config), seed=1)
    safetensors.torch.save_file(body.state_dict(), tmp_path / "body.safetensors")
    ours = with_eps(create_model("R26x0.5", weights=tmp_path / "body.safetensors"), PEER_EPS)
    assert ours.num_classes == 0
    x = torch.randn(1, 3, 32, 32)
    assert relative(ours(x), body(x).pooler_output.flatten(1)) < 1e-5


@pytest.fixture
def damaged(tmp_path):
    """Return {name: path of a file with the right suffix and the wrong contents}."""
    model = small()
    save_npz(model, tmp_path / "good.npz")
    save_safetensors(model, tmp_path / "good.safetensors")
    torch.save(model.state_dict(), tmp_path / "good.pth")
    npz = bytearray((tmp_path / "good.npz").read_bytes())
    npz[len(npz) // 2] ^= 1
    (tmp_path / "bit_flip.npz").write_bytes(npz)
    for good in list(tmp_path.glob("good.*")):
        data = good.read_bytes()
        (tmp_path / f"empty{good.suffix}").touch()
        (tmp_path / f"cut_short{good.suffix}").write_bytes(data[: len(data) // 3])
        (tmp_path / f"without_last_byte{good.suffix}").write_bytes(data[:-1])
        (tmp_path / f"text{good.suffix}").write_text("<html>404: not found</html>")
        good.unlink()
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    np.savez(tmp_path / "integers.npz", x=np.arange(3))
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    torch.save({"stem.conv.weight": 3}, tmp_path / "number.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    return tmp_path


def test_damaged_files_are_named_in_one_line(damaged):
    files = sorted(damaged.iterdir())
    assert len(files) == 4 * 3 + 6
    for path in files:
        with pytest.raises(ValueError) as error:
            create_model("R26x0.5", weights=path)
        message = str(error.value)
        assert message.startswith(f"{path}: ") and "\n" not in message, path.name
        assert "truncated or not a" in message or "damaged, or holds more than" in message
        if path.suffix == ".npz":
            model = small()
            with pytest.raises(ValueError, match=re.escape(str(path))):
                load_npz(model, path)
            assert_same_weights(model, small())


class Bomb:
    fired = False

    def __reduce__(self):
        return setattr, (Bomb, "fired", True)


@pytest.mark.parametrize("name", ["bomb.pth", "bomb.npz"])
def test_nothing_is_unpickled(tmp_path, name):
    path = tmp_path / name
    if name.endswith("npz"):
        np.savez(path, **{"resnet/group_norm/gamma": np.array([Bomb()], dtype=object)})
    else:
        torch.save({"norm.weight": torch.zeros(3), "args": Bomb()}, path)
    plain = tmp_path / ("plain" + path.suffix)
    plain.write_bytes(pickle.dumps(Bomb(), protocol=2))
    for target in (path, plain):
        with pytest.raises(ValueError, match=re.escape(str(target))):
            create_model("R26x0.5", weights=target)
    assert not Bomb.fired
    pickle.loads(pickle.dumps(Bomb()))
    assert Bomb.fired  # it would have
    Bomb.fired = False


def test_missing_file_and_unknown_ending(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz: no such file"):
        create_model("R26x0.5", weights=tmp_path / "nothing.npz")
    with pytest.raises(ValueError, match=r"model\.h5: expected a file ending in \.npz, \.safet"):
        read_checkpoint(tmp_path / "model.h5")


SMALL = "R26x0.5 with 7 classes"
TWINS = f"(checkpoint is {SMALL}, model is {SMALL})"
# A whole checkpoint, or what differs in it; the error.
MISFITS = {
    "deeper": (
        lambda: ResNetV2((3, 4, 23, 3), 1, 9, device="meta").state_dict(),
        "stem.conv.weight: checkpoint has (64, 3, 7, 7), model has (32, 3, 7, 7) "
        f"(checkpoint is R101x1 with 9 classes, model is {SMALL})",
    ),
    "odd": (
        lambda: ResNetV2((2, 3, 2, 2), 0.5, 7).state_dict(),
        "stages.1.blocks.2.norm1.weight: checkpoint has (256,), model has no such key "
        "(checkpoint is ResNetV2 of depths (2, 3, 2, 2) and width 0.5 with 7 classes, "
        f"model is {SMALL})",
    ),
    "missing": (
        {"stages.2.blocks.1.norm3.bias": None},
        f"stages.2.blocks.1.norm3.bias: checkpoint has no such key, model has (128,) {TWINS}",
    ),
    "extra": (
        {"norm.running_mean": torch.zeros(1024)},
        f"norm.running_mean: checkpoint has (1024,), model has no such key {TWINS}",
    ),
    "transposed": (
        {"head.fc.weight": torch.zeros(1024, 7, 1, 1)},
        "head.fc.weight: checkpoint has (1024, 7, 1, 1), model has (7, 1024, 1, 1) "
        f"(checkpoint is {SMALL}, model is {SMALL}; head=False drops its head)",
    ),
    "classes": (
        {"head.fc.weight": torch.zeros(9, 1024, 1, 1), "head.fc.bias": torch.zeros(9)},
        "head.fc.weight: checkpoint has (9, 1024, 1, 1), model has (7, 1024, 1, 1) "
        f"(checkpoint is R26x0.5 with 9 classes, model is {SMALL}; head=False drops its head)",
    ),
    "channels": (
        {"stem.conv.weight": torch.zeros(32, 4, 7, 7)},
        f"stem.conv.weight: checkpoint has (32, 4, 7, 7), model has (32, 3, 7, 7) {TWINS}",
    ),
    "flat": (
        {"stem.conv.weight": torch.zeros(32)},
        "stem.conv.weight: checkpoint has (32,), model has (32, 3, 7, 7) "
        f"(checkpoint is not a BiT ResNet with 7 classes, model is {SMALL})",
    ),
    "foreign": (
        lambda: {"conv1.weight": torch.zeros(64, 3, 7, 7)},
        "stem.conv.weight: checkpoint has no such key, model has (32, 3, 7, 7) "
        f"(checkpoint is not a BiT ResNet with 0 classes, model is {SMALL})",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_misfits_say_what_differs_and_change_nothing(misfit):
    state, message = MISFITS[misfit]
    model = small()
    state = state() if callable(state) else model.state_dict() | state
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(ValueError) as error:
        load_state_dict(model, state, source="x.npz")
    assert str(error.value) == f"x.npz: {message}"
    assert_same_weights(model, small())


def test_misfit_npz_names_the_file(tmp_path):
    model, path = small(), tmp_path / "wide.npz"
    save_npz(ResNetV2((1, 1, 1, 1), 1, 7), path)
    with pytest.raises(ValueError, match=r"wide\.npz: stem\.conv\.weight: checkpoint has \(64"):
        load_npz(model, path)
    assert_same_weights(model, small())


def test_head_false_leaves_the_head_of_the_model(tmp_path):
    save_npz(small(21), tmp_path / "bit.npz")
    model = randomize(blank(), seed=1)
    head = copy.deepcopy(model.get_classifier())
    load_npz(model, tmp_path / "bit.npz", head=False)
    assert_same_weights(model.get_classifier(), head)
    assert torch.equal(model.norm.weight, small(21).norm.weight)


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 7])
def test_stem_adapts_to_the_images(in_chans):
    state = small().state_dict()
    rgb = state["stem.conv.weight"].clone()
    model = blank(in_chans=in_chans)
    load_state_dict(model, state)
    assert torch.equal(model.stem.conv.weight, adapt_input_conv(in_chans, rgb))
    assert torch.equal(state["stem.conv.weight"], rgb)


@pytest.mark.parametrize("save", [save_npz, save_safetensors])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, save, monkeypatch):
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save(small(), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
