"""Names of weights, their places, and what create_model makes of them."""

import re
import sys
from pathlib import Path

import pytest
import timm
import torch

from bitkern.files import cache_folder
from bitkern.models import ARCHITECTURES, create_model, save_npz
from bitkern.models import weights as module
from bitkern.models.pretrained import RELEASES, find_release, get_release
from bitkern.models.registry import NAMES
from bitkern.models.weights import fetch, find_cached, source
from tests.models.helpers import small
from tests.models.weights.server import serving


def test_what_google_released():
    names = [name for name, release in RELEASES.items() if not release.repository]
    assert len(names) == 6 * 3 + 4
    for name in names:
        release = RELEASES[name]
        assert re.search(r"R\d+x\d", name)[0] == release.architecture
        assert NAMES[name] == (ARCHITECTURES[release.architecture], release.classes)
        assert release.classes == (21843 if re.fullmatch(r"BiT-M-R\d+x\d", name) else 1000)


def test_what_timm_has_with_and_without_tags():
    theirs = timm.list_pretrained("resnetv2_*_bit*")
    assert sorted(theirs) == sorted(n for n, release in RELEASES.items() if release.repository)
    for name in theirs:
        config = timm.get_pretrained_cfg(name)
        assert RELEASES[name].repository == config.hf_hub_id
        assert RELEASES[name].classes == NAMES[name][1] == config.num_classes
        bare = name.partition(".")[0]
        assert find_release(bare).name == f"{bare}.{timm.get_pretrained_cfg(bare).tag}"


def test_addresses(monkeypatch):
    monkeypatch.delenv("BITKERN_WEIGHTS_URL", raising=False)
    task = "vtab/BiT-M-R101x3-run2-cifar-100"
    assert find_release(task)[1:3] == ("R101x3", None)
    assert source(get_release(task)) == f"https://storage.googleapis.com/bit_models/{task}.npz"
    timms = "resnetv2_50x3_bit.goog_in21k"
    assert source(get_release(timms)) == f"hf-hub:timm/{timms}"
    monkeypatch.setenv("BITKERN_WEIGHTS_URL", "http://here/bit/")
    assert source(get_release("BiT-S-R50x1")) == "http://here/bit/BiT-S-R50x1.npz"
    monkeypatch.setenv("BITKERN_WEIGHTS_URL", "/a/folder")
    with pytest.raises(ValueError, match="BITKERN_WEIGHTS_URL: expected http:.* got /a/folder"):
        source(get_release("BiT-S-R50x1"))


def test_cache_folder(monkeypatch, tmp_path):
    for name in ("BITKERN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "bitkern"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/bitkern")
    monkeypatch.setenv("BITKERN_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    assert cache_folder("there") == Path("there")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("R50x1", "of this architecture: BiT-S-R50x1, BiT-M-R50x1, BiT-M-R50x1-ILSVRC2012, dist"),
        ("BiT-L-R50x1", "BiT-L was never released"),
        ("R26x0.5", "no such file or folder, nor weights of this name, see bitkern weights list"),
        ("bit-m-r50x1", "did you mean BiT-M-R50x1 or "),
        ("BiT-M-R50x2", "did you mean BiT-M-R50x3 or BiT-M-R50x1"),
        ("resnetv2_50x3_bit.goog_distilled_in1k", "did you mean resnetv2_50x1_bit.goog_distilled"),
        ("vtab/BiT-M-R50x1-run3-dtd", "no such file or folder, nor weights of this name, "),
        ("vtab/BiT-M-R50x1-run0-../../x", "no such file or folder, nor weights of this name, "),
        ("vtab/BiT-L-R50x1-run0-dtd", "no such file or folder, nor weights of this name, "),
    ],
)
def test_names_without_weights(name, message):
    for ask in (get_release, fetch, find_cached, lambda name: create_model("R50x1", weights=name)):
        with pytest.raises(ValueError) as error:
            ask(name)
        assert str(error.value).startswith(f"{name}: ") and message in str(error.value)
        assert "\n" not in str(error.value)


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    monkeypatch.setenv("BITKERN_CACHE", str(tmp_path / "cache"))
    with serving({}) as server:
        monkeypatch.setenv("BITKERN_WEIGHTS_URL", server.url)
        yield server


def test_released_weights_become_a_model(mirror, tmp_path):
    weights = create_model("R50x1", 5, zero_head=False)
    save_npz(weights, tmp_path / "x.npz")
    name = "vtab/BiT-M-R50x1-run0-dtd"
    mirror.files[f"/{name}.npz"] = (tmp_path / "x.npz").read_bytes()
    expected = weights.state_dict()

    model = create_model(name, pretrained=True)
    assert model.num_classes == 5
    assert find_cached(name) == tmp_path / "cache" / f"{name}.npz"
    mirror.stop()
    for same in (
        model,
        create_model("R50x1", weights=name),
        create_model("BiT-M-R50x1", weights=name, pretrained=False),
    ):
        assert all(torch.equal(t, expected[k]) for k, t in same.state_dict().items())
    assert create_model(name, 3, pretrained=True).num_classes == 3
    assert len(mirror.requests) == 1

    with pytest.raises(ValueError, match="num_classes: expected a number, vtab/"):
        create_model(name)
    with pytest.raises(ValueError, match="got vtab/.*-dtd of another architecture"):
        create_model("R50x3", weights=name)


def test_a_cache_of_ones_own_and_damage_in_it(mirror, tmp_path):
    path = tmp_path / "mine" / "BiT-S-R50x1.npz"
    path.parent.mkdir()
    save_npz(small(), path)
    with pytest.raises(ValueError) as error:
        create_model("BiT-S-R50x1", pretrained=True, cache_dir=path.parent)
    assert str(error.value).startswith(f"{path}: stem.conv.weight: checkpoint has (32, ")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError) as error:
        create_model("BiT-S-R50x1", pretrained=True, cache_dir=path.parent)
    assert str(error.value).startswith(f"{path}: truncated or not a .npz")
    assert mirror.requests == []
    with pytest.raises(OSError, match="404 Not Found; nothing is kept; or put the file at .*cache"):
        create_model("BiT-S-R50x1", pretrained=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": True, "weights": "x.npz"}, "pretrained: expected without weights, got "),
        ({"weights": "BiT-S-R101x1"}, "weights: expected some for BiT-M-R50x1, got BiT-S-R101x1"),
        ({"weights": "resnetv2_50x3_bit"}, "weights: expected some for BiT-M-R50x1, got resnetv2"),
        ({"weights": "x.npz"}, "x.npz: no such file"),
        ({"weights": Path("BiT-M-R50x1")}, "BiT-M-R50x1: expected a file ending in .npz, "),
        ({"weights": "hf-hub:a/b/c.bin"}, "hf-hub:a/b/c.bin: Repo id must be "),
    ],
)
def test_bad_weights(mirror, options, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        create_model("BiT-M-R50x1", **options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert mirror.requests == []


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert module.find_cached("resnetv2_50x1_bit") is None
    with pytest.raises(ValueError, match=r"huggingface_hub is not installed: pip install 'bitk"):
        create_model("resnetv2_50x1_bit", pretrained=True)
