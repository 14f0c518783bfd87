"""MixUp (arXiv 1710.09412) as BiT uses it: one lambda for the batch, labels mixed in the loss."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkern.transfer.checks import check


def cross_entropy(logits: Tensor, y: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of ``logits`` (N, classes), in fp32 at least, and labels ``y``.

    ``y`` int64 (N,) with a softmax; or bool (N, classes), any number of labels each, with a sigmoid
    for each class, summed over classes. ``class_weight`` (classes,) multiplies what an image of the
    class, or its being labelled with it, adds to the mean over the N images.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
    if y.ndim == 2:
        total = F.binary_cross_entropy_with_logits(
            logits, y.to(logits.dtype), pos_weight=class_weight, reduction="sum"
        )
        return total / len(y)
    if class_weight is None:
        return F.cross_entropy(logits, y)
    return F.cross_entropy(logits, y, class_weight, reduction="sum") / len(y)


def mixup(x: Tensor, y: Tensor, lam: float, permutation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mix each image with another of the batch: ``lam * x + (1 - lam) * x[permutation]``.

    ``x`` floating point (N, ...); ``y`` labels (N, ...); ``lam`` in [0, 1]; ``permutation`` int64
    (N,), a permutation of 0 … N-1. Returns ``(x_mixed, y, y_perm)`` for ``mixup_loss``, where
    ``y_perm = y[permutation]``; the inputs are left alone. Raises ``ValueError`` or ``TypeError``.
    """
    check(0 <= lam <= 1, "lam", "a number in [0, 1]", lam)
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if y.shape[:1] != x.shape[:1]:
        raise ValueError(f"y: expected {x.shape[0]} labels as x has images, got {tuple(y.shape)}")
    if permutation.dtype != torch.int64 or permutation.shape != x.shape[:1]:
        raise ValueError(
            f"permutation: expected int64 of shape ({x.shape[0]},), "
            f"got {permutation.dtype} of shape {tuple(permutation.shape)}"
        )
    indices = torch.arange(x.shape[0], device=permutation.device)
    if not torch.equal(permutation.sort().values, indices):
        raise ValueError(f"permutation: expected each of 0 … {x.shape[0] - 1} exactly once")
    return mix(x, y, lam, permutation)


def mix(
    x: Tensor, y: Tensor, lam: float | Tensor, permutation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``mixup`` without its checks, which read the device; ``lam`` may be there as well."""
    return torch.lerp(x[permutation], x, lam), y, y[permutation]


def mixup_loss(
    logits: Tensor,
    y: Tensor,
    y_perm: Tensor,
    lam: float,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> Tensor:
    """``lam * loss(logits, y) + (1 - lam) * loss(logits, y_perm)``, the mean over the batch.

    ``logits`` (N, classes), computed in fp32 at least; ``y`` and ``y_perm`` int64 (N,), or bool
    (N, classes) where an image may have several labels; ``lam`` in [0, 1]; ``loss`` of logits and
    labels, by default cross-entropy, with which it equals cross-entropy against the soft label
    ``lam * onehot(y) + (1 - lam) * onehot(y_perm)``. Raises ``ValueError``.
    """
    check(0 <= lam <= 1, "lam", "a number in [0, 1]", lam)
    if logits.ndim != 2:
        raise ValueError(f"logits: expected shape (N, classes), got {tuple(logits.shape)}")
    for name, labels in (("y", y), ("y_perm", y_perm)):
        one = labels.dtype == torch.int64 and labels.shape == logits.shape[:1]
        several = labels.dtype == torch.bool and labels.shape == logits.shape
        if not one and not several:
            raise ValueError(
                f"{name}: expected int64 of shape ({logits.shape[0]},) or bool of shape "
                f"{tuple(logits.shape)}, got {labels.dtype} of shape {tuple(labels.shape)}"
            )
    return mixed_loss(logits, y, y_perm, lam, loss)


def mixed_loss(
    logits: Tensor,
    y: Tensor,
    y_perm: Tensor,
    lam: float | Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """``mixup_loss`` without its checks; ``lam`` may be on the device."""
    return lam * loss(logits, y) + (1 - lam) * loss(logits, y_perm)
