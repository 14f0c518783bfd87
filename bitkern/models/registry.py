"""Names of models, as BiT and as timm have them, and :func:`create_model`."""

import difflib
from collections.abc import Sequence
from os import PathLike
from typing import Literal, overload

import torch

from bitkern.models.checkpoints import load_state_dict, num_classes_of, read_checkpoint
from bitkern.models.resnetv2 import ARCHITECTURES, Architecture, Device, FeatureNet, ResNetV2

# What the head of each was trained on: ILSVRC-2012, ImageNet-21k, JFT-300M (never released).
UPSTREAM_CLASSES = {"S": 1000, "M": 21843, "L": 18291}
TIMM_TAGS = {
    "goog_in21k": 21843,
    "goog_in21k_ft_in1k": 1000,
    "goog_distilled_in1k": 1000,
    "goog_teacher_in21k_ft_in1k": 1000,
    "goog_teacher_in21k_ft_in1k_384": 1000,
}


def _names() -> dict[str, tuple[Architecture, int]]:
    """Every name accepted -> (architecture, number of classes)."""
    names = {}
    for name, architecture in ARCHITECTURES.items():
        names[name] = architecture, 1000
        for upstream, classes in UPSTREAM_CLASSES.items():
            names[f"BiT-{upstream}-{name}"] = architecture, classes
        names[f"BiT-M-{name}-ILSVRC2012"] = architecture, 1000
        timm = f"resnetv2_{name[1:]}_bit"
        names[timm] = architecture, 1000
        for tag, classes in TIMM_TAGS.items():
            names[f"{timm}.{tag}"] = architecture, classes
    return names


NAMES = _names()


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
) -> ResNetV2 | FeatureNet:
    """Build a BiT ResNetV2, with the weights of a checkpoint if ``weights`` is given.

    Args:
        name: ``"BiT-M-R50x1"``, ``"BiT-M-R50x1-ILSVRC2012"``, timm's ``"resnetv2_50x1_bit"`` with
            or without a tag such as ``".goog_in21k"``, or the bare ``"R50x1"``. Architectures:
            R26x0.5 (small, for trials), R50x1, R50x3, R101x1, R101x3, R152x2, R152x4.
        num_classes: size of the head, 0 for none. The checkpoint's head is kept if it has that
            many classes and dropped if not. None takes the number of the checkpoint, or without
            one that of ``name``.
        in_chans: channels of the images; RGB checkpoints are adapted, see
            :func:`~bitkern.models.load_state_dict`.
        weights: path of a checkpoint, see :func:`~bitkern.models.read_checkpoint`.
        zero_head: start a head that is not loaded at zero, as BiT does, and not at random.
        output_stride: 8, 16 or 32.
        features_only: return a :class:`~bitkern.models.FeatureNet` with the maps ``out_indices``.

    Returns:
        :class:`~bitkern.models.ResNetV2`, or ``FeatureNet``.

    Raises:
        ValueError: for an unknown name, a bad argument, or a checkpoint that does not fit.
        FileNotFoundError: if there is no file ``weights``.
    """
    if name not in NAMES:
        lower = {known.lower(): known for known in NAMES}
        found = difflib.get_close_matches(name.lower(), lower, n=3)
        near = ", ".join(lower[known] for known in found) or ", ".join(ARCHITECTURES)
        raise ValueError(f"name: unknown model {name!r}, nearest: {near}")
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices: expected with features_only=True, got {out_indices}")
    architecture, default_classes = NAMES[name]
    state = None if weights is None else read_checkpoint(weights)
    checkpoint_classes = default_classes if state is None else num_classes_of(state)
    if features_only:
        num_classes = 0
    elif num_classes is None:
        num_classes = checkpoint_classes
    model = ResNetV2(*architecture, num_classes, in_chans, output_stride, device, dtype)
    if num_classes and not zero_head:
        head = model.get_classifier()
        assert isinstance(head, torch.nn.Conv2d)
        head.reset_parameters()
    if state is not None and weights is not None:
        load_state_dict(model, state, head=num_classes == checkpoint_classes, source=weights)
    return FeatureNet(model, out_indices) if features_only else model
