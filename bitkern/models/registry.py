"""Names of models, as BiT and as timm have them, and ``create_model``."""

import difflib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Literal, overload

import torch

from bitkern.models.checkpoints import READERS, load_state_dict, num_classes_of, read_checkpoint
from bitkern.models.pretrained import (
    HUB,
    RELEASES,
    TIMM_TAGS,
    UPSTREAM_CLASSES,
    find_release,
    get_release,
    timm_name,
)
from bitkern.models.resnetv2 import ARCHITECTURES, Architecture, Device, FeatureNet, ResNetV2
from bitkern.models.weights import HUB_FILES, fetch


def _names() -> dict[str, tuple[Architecture, int | None]]:
    """Every name accepted -> (architecture, number of classes), those of VTAB apart."""
    names: dict[str, tuple[Architecture, int | None]] = {}
    for name, architecture in ARCHITECTURES.items():
        names[name] = architecture, 1000
        for upstream, classes in UPSTREAM_CLASSES.items():
            names[f"BiT-{upstream}-{name}"] = architecture, classes
        names[f"BiT-M-{name}-ILSVRC2012"] = architecture, 1000
        names[timm_name(name)] = architecture, 1000
        for tag, classes in TIMM_TAGS.items():
            names[f"{timm_name(name)}.{tag}"] = architecture, classes
    for release in RELEASES.values():
        names[release.name] = ARCHITECTURES[release.architecture], release.classes
    return names


NAMES = _names()
SAVED = HUB_FILES[0]  # in the folder of a run as well


def _look_up(name: str) -> tuple[Architecture, int | None]:
    if name in NAMES:
        return NAMES[name]
    if release := find_release(name):
        return ARCHITECTURES[release.architecture], release.classes
    lower = {known.lower(): known for known in NAMES}
    found = difflib.get_close_matches(name.lower(), lower, n=3)
    near = " or ".join(lower[known] for known in found)
    hint = f"did you mean {near}? " * bool(near)
    raise ValueError(
        f"name: unknown model {name!r}; {hint}Only BiT models can be fine-tuned: "
        f"{', '.join(ARCHITECTURES)}"
    )


def weights_path(
    weights: str | PathLike[str], name: str, cache_dir: str | PathLike[str] | None = None
) -> str | PathLike[str]:
    """The path that ``weights`` is, or that of the file it names, for the model ``name``."""
    release = find_release(weights) if isinstance(weights, str) else None
    if release and ARCHITECTURES[release.architecture] != _look_up(name)[0]:
        raise ValueError(
            f"weights: expected some for {name}, got {weights} of another architecture"
        )
    path = Path(weights)
    if path.is_dir() and not release:
        if not (path / SAVED).exists():
            raise ValueError(f"{path}: holds no {SAVED}; expected the folder of a finished run")
        return path / SAVED
    if not isinstance(weights, str):
        return weights
    is_path = path.suffix in READERS or path.is_file()
    return weights if is_path and not weights.startswith(HUB) else fetch(weights, cache_dir)


@overload
def create_model(
    name: str,
    num_classes: int | None = None,
    in_chans: int = 3,
    weights: str | PathLike[str] | None = None,
    zero_head: bool = True,
    output_stride: int = 32,
    features_only: Literal[False] = False,
    out_indices: None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
    pretrained: bool = False,
    cache_dir: str | PathLike[str] | None = None,
) -> ResNetV2: ...
@overload
def create_model(
    name: str,
    num_classes: int | None = None,
    in_chans: int = 3,
    weights: str | PathLike[str] | None = None,
    zero_head: bool = True,
    output_stride: int = 32,
    *,
    features_only: Literal[True],
    out_indices: Sequence[int] | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
    pretrained: bool = False,
    cache_dir: str | PathLike[str] | None = None,
) -> FeatureNet: ...
def create_model(
    name: str,
    num_classes: int | None = None,
    in_chans: int = 3,
    weights: str | PathLike[str] | None = None,
    zero_head: bool = True,
    output_stride: int = 32,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
    pretrained: bool = False,
    cache_dir: str | PathLike[str] | None = None,
) -> ResNetV2 | FeatureNet:
    """Build a BiT ResNetV2, with released weights or those of a checkpoint if asked for.

    Args:
        name: ``"BiT-M-R50x1"``, ``"BiT-M-R50x1-ILSVRC2012"``, timm's ``"resnetv2_50x1_bit"`` with
            or without a tag such as ``".goog_in21k"``, or the bare ``"R50x1"``. Architectures:
            R26x0.5 (small, for trials), R50x1, R50x3, R101x1, R101x3, R152x2, R152x4. Also the
            names of distilled weights and of runs on VTAB, such as ``"distill/R50x1_224"``.
        num_classes: size of the head, 0 for none. The checkpoint's head is kept if it has that
            many classes and dropped if not. None takes the number of the checkpoint, or without
            one that of ``name``.
        in_chans: channels of the images; RGB checkpoints are adapted, see
            ``load_state_dict``.
        weights: path of a checkpoint, see ``read_checkpoint``; the folder of a
            run; the name of released weights; or ``"hf-hub:ORG/NAME"``, a repository of the Hugging
            Face hub.
        zero_head: start a head that is not loaded at zero, as BiT does, and not at random.
        output_stride: 8, 16 or 32.
        features_only: return a ``FeatureNet`` with the maps ``out_indices``.
        pretrained: take the weights released as ``name``, from the cache or the network.
        cache_dir: the folder of downloaded weights, see docs/weights.md for the default.

    Returns:
        ``ResNetV2``, or ``FeatureNet``.

    Raises:
        ValueError: for an unknown name, a bad argument, or a checkpoint that does not fit.
        FileNotFoundError: if there is no file ``weights``.
        OSError: if weights cannot be downloaded; it says where to put them by hand.
    """
    architecture, default_classes = _look_up(name)
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices: expected with features_only=True, got {out_indices}")
    if pretrained and weights is not None:
        raise ValueError(f"pretrained: expected without weights, got weights {weights}")
    if pretrained:
        weights = get_release(name).name
    path = None if weights is None else weights_path(weights, name, cache_dir)
    state = None if path is None else read_checkpoint(path)
    checkpoint_classes = default_classes if state is None else num_classes_of(state)
    if features_only:
        num_classes = 0
    elif num_classes is None:
        num_classes = checkpoint_classes
    if num_classes is None:
        raise ValueError(f"num_classes: expected a number, {name} has that of its weights")
    model = ResNetV2(*architecture, num_classes, in_chans, output_stride, device, dtype)
    if num_classes and not zero_head:
        head = model.get_classifier()
        assert isinstance(head, torch.nn.Conv2d)
        head.reset_parameters()
    if state is not None and path is not None:
        load_state_dict(model, state, head=num_classes == checkpoint_classes, source=path)
    return FeatureNet(model, out_indices) if features_only else model
