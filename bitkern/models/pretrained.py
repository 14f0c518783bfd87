"""The released weights and their names."""

import difflib
import re
from collections.abc import Iterator
from typing import NamedTuple

PUBLISHED = ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4")  # architectures
# Classes of ILSVRC-2012, ImageNet-21k and JFT-300M (never released).
UPSTREAM_CLASSES = {"S": 1000, "M": 21843, "L": 18291}
TIMM_TAGS = {
    "goog_in21k_ft_in1k": 1000,
    "goog_in21k": 21843,
    "goog_distilled_in1k": 1000,
    "goog_teacher_in21k_ft_in1k": 1000,
    "goog_teacher_in21k_ft_in1k_384": 1000,
}
# Tags that timm has of every architecture, the first of them its default, and of one.
COMMON_TAGS = ("goog_in21k_ft_in1k", "goog_in21k")
OWN_TAGS = {
    "R50x1": ("goog_distilled_in1k",),
    "R152x2": ("goog_teacher_in21k_ft_in1k", "goog_teacher_in21k_ft_in1k_384"),
}
DISTILLED = {"R50x1": ("R50x1_160", "R50x1_224"), "R152x2": ("R152x2_T_224", "R152x2_T_384")}
# Runs on the tasks of VTAB-1k, each with as many classes as its task.
VTAB = re.compile(rf"vtab/BiT-M-({'|'.join(PUBLISHED)})-run[012]-\w[\w-]*")
HUB = "hf-hub:"


class Release(NamedTuple):
    """Weights as they were released.

    ``classes`` is the size of the head, None where only the file says it. ``repository`` is the one
    on the Hugging Face hub; without one they are BiT's own ``NAME.npz``.
    """

    name: str
    architecture: str
    classes: int | None
    repository: str | None = None


def timm_name(architecture: str) -> str:
    """``"resnetv2_50x1_bit"`` of ``"R50x1"``."""
    return f"resnetv2_{architecture[1:]}_bit"


def _releases() -> Iterator[Release]:
    for architecture in PUBLISHED:
        yield Release(f"BiT-S-{architecture}", architecture, UPSTREAM_CLASSES["S"])
        yield Release(f"BiT-M-{architecture}", architecture, UPSTREAM_CLASSES["M"])
        yield Release(f"BiT-M-{architecture}-ILSVRC2012", architecture, 1000)
    for architecture, names in DISTILLED.items():
        for name in names:
            yield Release(f"distill/{name}", architecture, 1000)
    for architecture in PUBLISHED:
        for tag in OWN_TAGS.get(architecture, ()) + COMMON_TAGS:
            name = f"{timm_name(architecture)}.{tag}"
            yield Release(name, architecture, TIMM_TAGS[tag], f"timm/{name}")


RELEASES = {release.name: release for release in _releases()}
# timm's names without a tag.
_DEFAULTS = {name.partition(".")[0]: name for name in reversed(RELEASES) if "." in name}


def find_release(name: str) -> Release | None:
    """The weights released under a name; timm's without a tag means the tag timm takes."""
    if vtab := VTAB.fullmatch(name):
        return Release(name, vtab[1], None)
    return RELEASES.get(_DEFAULTS.get(name, name))


def get_release(name: str) -> Release:
    """As ``find_release``, but raises ValueError with suggestions for a name without weights."""
    if release := find_release(name):
        return release
    if name.startswith("BiT-L-"):
        raise ValueError(f"{name}: BiT-L was never released; BiT-S and BiT-M were")
    if own := [known for known, r in RELEASES.items() if r.architecture == name]:
        where = f"of this architecture: {', '.join(own)}"
    else:
        lower = {known.lower(): known for known in RELEASES}
        near = [lower[found] for found in difflib.get_close_matches(name.lower(), lower, n=3)]
        where = f"did you mean {' or '.join(near)}?" if near else "see bitkern weights list"
    raise ValueError(f"{name}: no such file or folder, nor weights of this name, {where}")
