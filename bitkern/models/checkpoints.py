"""Checkpoints: the official BiT ``.npz``, state dicts of other code bases, safetensors.

Whatever the file, its tensors are first renamed and laid out as ``ResNetV2`` has them, then
checked against the model, key by key, and only then copied into it. Nothing is ever unpickled.
"""

import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from bitkern import files
from bitkern.models.resnetv2 import ARCHITECTURES, Architecture

StateDict = dict[str, Tensor]

# Names in the .npz of BiT without the prefix resnet/ -> names here. Its kernels are HWIO.
NPZ_TOP = {
    "root_block/standardized_conv2d/kernel": "stem.conv.weight",
    "group_norm/gamma": "norm.weight",
    "group_norm/beta": "norm.bias",
    "head/conv2d/kernel": "head.fc.weight",
    "head/conv2d/bias": "head.fc.bias",
}
NPZ_UNIT = {"a/proj/standardized_conv2d/kernel": "downsample.conv.weight"}
for _letter, _number in zip("abc", "123", strict=True):
    NPZ_UNIT[f"{_letter}/standardized_conv2d/kernel"] = f"conv{_number}.weight"
    NPZ_UNIT[f"{_letter}/group_norm/gamma"] = f"norm{_number}.weight"
    NPZ_UNIT[f"{_letter}/group_norm/beta"] = f"norm{_number}.bias"

# State dicts of other code bases: pattern -> replacement, applied one after the other.
RENAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    # torch.nn.DataParallel, in which big_transfer saves its models
    (r"^module\.", ""),
    # big_transfer
    (r"^root\.", "stem."),
    (
        r"^body\.block(\d+)\.unit(\d+)\.",
        lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 1}.",
    ),
    (r"\.gn(\d)\.", r".norm\1."),
    (r"\.downsample\.weight$", ".downsample.conv.weight"),
    (r"^head\.gn\.", "norm."),
    (r"^head\.conv\.", "head.fc."),
    # transformers
    (r"^bit\.", ""),
    (r"^embedder\.convolution\.", "stem.conv."),
    (r"^encoder\.stages\.(\d+)\.layers\.", r"stages.\1.blocks."),
    (r"^classifier\.1\.", "head.fc."),
)


def _name_of_npz_key(key: str) -> str:
    key = key.removeprefix("resnet/")
    if unit := re.fullmatch(r"block(\d+)/unit(\d+)/(.+)", key):
        leaf = NPZ_UNIT.get(unit[3], unit[3])
        return f"stages.{int(unit[1]) - 1}.blocks.{int(unit[2]) - 1}.{leaf}"
    return NPZ_TOP.get(key, key)


def _npz_key_of_name(name: str) -> str:
    if unit := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)", name):
        leaf = {leaf: key for key, leaf in NPZ_UNIT.items()}[unit[3]]
        return f"resnet/block{int(unit[1]) + 1}/unit{int(unit[2]) + 1:02d}/{leaf}"
    return "resnet/" + {name: key for key, name in NPZ_TOP.items()}[name]


def _renamed(state: Mapping[str, Tensor]) -> StateDict:
    """A state dict of any of the code bases, with the names and shapes of ours."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if name == "head.fc.weight" and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # a Linear in transformers
        renamed[name] = tensor
    return renamed


def _read_npz(path: Path) -> StateDict:
    arrays = np.load(path, allow_pickle=False)
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError("a single array")
    state = {}
    with arrays:
        for key in arrays.files:
            array = arrays[key]
            if array.dtype not in (np.float16, np.float32, np.float64):
                raise ValueError(f"{key} is an array of {array.dtype}, expected floats")
            if array.ndim == 4:
                array = array.transpose(3, 2, 0, 1)
            state[_name_of_npz_key(key)] = torch.from_numpy(array)
    return state


def _read_safetensors(path: Path) -> StateDict:
    return _renamed(safetensors.torch.load_file(path))


def _read_torch(path: Path) -> StateDict:
    state = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("state_dict", "model"):  # training scripts; big_transfer uses the second
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(torch.is_tensor(t) for t in state.values()):
        raise ValueError("expected a dict of tensors")
    return _renamed(state)


READERS: dict[str, Callable[[Path], StateDict]]
READERS = {".npz": _read_npz, ".safetensors": _read_safetensors}
READERS |= dict.fromkeys((".pth", ".pt", ".bin", ".tar"), _read_torch)


def read_checkpoint(path: str | PathLike[str]) -> StateDict:
    """Read a checkpoint in any of the formats; returns a state dict with the names of ours.

    A ``.npz`` of BiT; or a ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` or ``.tar`` with the
    state dict of timm, transformers, big_transfer or bitkern. Raises FileNotFoundError, or
    ValueError naming the file and what is wrong with it.
    """
    path = Path(path)
    reader = READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"{path}: expected a file ending in {', '.join(READERS)}")
    with files.explain_read_errors(path, f"a {path.suffix} checkpoint"):
        return reader(path)


def num_classes_of(state: Mapping[str, Tensor]) -> int:
    """The number of classes of the head in a state dict, 0 if it has none."""
    return state["head.fc.bias"].numel() if "head.fc.bias" in state else 0


def _architecture_of(state: Mapping[str, Tensor]) -> str:
    """The name of the architecture that a state dict holds, or a description of it."""
    blocks = {
        m.groups() for m in (re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", k) for k in state) if m
    }
    stem = state.get("stem.conv.weight")
    if not blocks or stem is None or stem.ndim != 4:
        return "not a BiT ResNet"
    count = Counter(stage for stage, _ in blocks)
    depths = tuple(count[stage] for stage in sorted(count))
    architecture: tuple[Any, float] = Architecture(depths, len(stem) / 64)  # type: ignore[arg-type]
    names: dict[Any, str] = {known: name for name, known in ARCHITECTURES.items()}
    return names.get(architecture, "ResNetV2 of depths {} and width {:g}".format(*architecture))


def _for_channels(stem: Tensor, in_chans: int) -> Tensor:
    """RGB filters (O, 3, kh, kw) for another kind of image: summed for one channel, else tiled."""
    if stem.ndim != 4 or stem.shape[1] != 3 or in_chans == 3:
        return stem
    if in_chans == 1:
        return stem.sum(1, keepdim=True)
    # As in timm. Standardization cancels the scale; it matters to whoever reads the weights.
    return stem.repeat(1, math.ceil(in_chans / 3), 1, 1)[:, :in_chans] * (3 / in_chans)


def load_state_dict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    head: bool = True,
    source: str | PathLike[str] = "state dict",
) -> None:
    """Copy a state dict of timm, transformers, big_transfer or bitkern into a ``ResNetV2``.

    Every name and shape is checked first, so that a model is never half loaded. RGB filters of the
    stem are adapted to a model of other channels: summed for one, tiled and rescaled for more.
    With ``head=False`` the head of the checkpoint is dropped, and the model's stays as it is.

    Raises:
        ValueError: naming ``source``, the first mismatching key, both shapes and architectures.
    """
    state = _renamed(state)
    own = model.state_dict()
    kinds = [f"{_architecture_of(s)} with {num_classes_of(s)} classes" for s in (state, own)]
    if not head:
        state, own = ({k: t for k, t in s.items() if k[:5] != "head."} for s in (state, own))
    if "stem.conv.weight" in state:
        in_chans = own["stem.conv.weight"].shape[1]
        state["stem.conv.weight"] = _for_channels(state["stem.conv.weight"], in_chans)
    for name in own | state:
        shapes = [tuple(s[name].shape) if name in s else "no such key" for s in (state, own)]
        if shapes[0] != shapes[1]:
            hint = "; head=False drops its head" if name.startswith("head.") else ""
            raise ValueError(
                f"{source}: {name}: checkpoint has {shapes[0]}, model has {shapes[1]} "
                f"(checkpoint is {kinds[0]}, model is {kinds[1]}{hint})"
            )
    model.load_state_dict(state, strict=head)


def load_npz(model: nn.Module, path: str | PathLike[str], *, head: bool = True) -> None:
    """Load a ``.npz`` in the format of BiT into a ``ResNetV2``; see ``load_state_dict``.

    Raises FileNotFoundError, or ValueError for a damaged file or one that does not fit the model,
    which is then untouched.
    """
    path = Path(path)
    with files.explain_read_errors(path, "a .npz checkpoint"):
        state = _read_npz(path)
    load_state_dict(model, state, head=head, source=path)


def save_npz(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write a ``ResNetV2`` to a ``.npz`` in the format of BiT, bit for bit.

    NumPy has no bfloat16: such a model is written as float32, which holds the same values.
    """
    arrays = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        array = tensor.numpy(force=True)
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        arrays[_npz_key_of_name(name)] = np.ascontiguousarray(array)
    with files.atomic_write(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def save_safetensors(model: nn.Module, path: str | PathLike[str], **metadata: Any) -> None:
    """Write a ``ResNetV2``, or any module, to a ``.safetensors`` file, bit for bit.

    ``metadata`` may hold anything JSON can, such as ``classes=[...]``; the name of the
    architecture is written with it, as ``"model"``. ``read_metadata`` returns it. The same
    tensors and metadata give the same bytes.
    """
    state, storages = {}, set()
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # The format knows no shared weights: each name has its own.
        state[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    metadata = {"model": _architecture_of(state)} | metadata
    header = {"format": "pt", "bitkern": json.dumps(metadata)}
    with files.atomic_write(path) as part:
        part.touch()
        mode = part.stat().st_mode
        # In a folder, because safetensors writes to a name of its own, which outlives a kill, and
        # lets the owner alone read the file.
        with tempfile.TemporaryDirectory(prefix=".part-", dir=part.parent) as folder:
            whole = Path(folder, part.name)
            safetensors.torch.save_file(state, whole, header)
            whole.replace(part)
        part.chmod(mode)
        _sort_metadata(part)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file, which comes in any order, into one."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise RuntimeError(f"{path}: the header grew from {size} to {len(text)} bytes")
        file.seek(8)
        file.write(text.ljust(size))


def read_metadata(path: str | PathLike[str]) -> dict[str, Any]:
    """The metadata of a file that ``save_safetensors`` wrote; {} for any other safetensors."""
    path = Path(path)
    with files.explain_read_errors(path, "a .safetensors checkpoint"):
        with safetensors.safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("bitkern", "{}"))
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no object")
        return metadata
