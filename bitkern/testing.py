"""Bounds on errors, and inputs that find faults, for tests and benchmarks of kernels.

An error is bounded against PyTorch at the same dtype: both results are compared with one computed
in float64. The inputs have means far from zero, scales that differ by channel, constant channels,
parameters of both signs and unusual strides.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "affine",
    "assert_accurate",
    "inaccuracy",
    "maps",
    "poisoned_memory",
    "pytorch_group_norm",
    "strided",
]


def inaccuracy(
    ours: Tensor, peer: Tensor, exact: Tensor, summed: Tensor | None = None, roundings: int = 1
) -> str | None:
    """Say in words how ``ours`` is further from ``exact`` than twice the distance of ``peer``.

    The distance is measured as max-abs and as relative L2. ``roundings`` of the result's dtype are
    allowed on top, at the largest magnitude: two correct roundings of one value may differ by one.

    Args:
        ours: the result to judge, of any shape and floating dtype.
        peer: PyTorch's result, in the shape and dtype of ``ours``.
        exact: the float64 result, in the same shape.
        summed: where terms that cancel are summed, the sum of their absolute values in the same
            shape: a rounding is relative to the terms.
        roundings: how many roundings are allowed beside the distance.

    Returns:
        None if ``ours`` is accurate enough.
    """
    if ours.shape != exact.shape:
        return f"shape {ours.shape}, expected {exact.shape}"
    if ours.dtype != peer.dtype:
        return f"dtype {ours.dtype}, expected {peer.dtype}"
    if not torch.equal(ours.isnan(), peer.isnan()):
        return "NaN in other places than PyTorch"
    finite = exact.isfinite() & peer.isfinite()
    eps = roundings * torch.finfo(peer.dtype).eps
    size = exact if summed is None else torch.maximum(exact.abs(), summed)
    ours, peer, exact, size = (t.detach().double()[finite] for t in (ours, peer, exact, size))
    if exact.numel() == 0:
        return None
    norm = float(exact.norm().clamp_min(1e-30))
    for measure, order, unit in (("max-abs", torch.inf, 1.0), ("relative L2", 2, norm)):
        error, peer_error, largest = (
            float(torch.linalg.vector_norm(t, order)) / unit
            for t in (ours - exact, peer - exact, size)
        )
        allowed = 2 * peer_error + eps * largest
        if not error <= allowed:
            return (
                f"{measure} error {error:.3e}, allowed {allowed:.3e} "
                f"(PyTorch {peer_error:.3e}, {eps:.1e} of {largest:.3e})"
            )
    return None


def assert_accurate(
    ours: Tensor,
    peer: Tensor,
    exact: Tensor,
    what: str = "",
    summed: Tensor | None = None,
    roundings: int = 1,
) -> None:
    """Raise an AssertionError that begins with ``what`` and says the :func:`inaccuracy`, if any."""
    fault = inaccuracy(ours, peer, exact, summed, roundings)
    assert fault is None, f"{what}: {fault}"


def strided(
    x: Tensor, kind: Literal["contiguous", "channels_last", "slice", "transposed"]
) -> Tensor:
    """Return ``x`` of shape (N, C, H, W) with other strides, the last two kinds not dense."""
    if kind == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "slice":  # of a wider tensor, as torch.cat's backward hands out
        wide = torch.full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), float("nan")).to(x)
        wide[:, 2 : 2 + x.shape[1]] = x
        return wide[:, 2 : 2 + x.shape[1]]
    if kind == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert kind == "contiguous"
    return x.contiguous()


def maps(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shift: float = 3.0,
    constant: bool = True,
) -> Tensor:
    """Make hostile feature maps on the CPU.

    Args:
        shape: (N, C, *).
        dtype: of the maps; they are drawn in float32.
        seed: of their random generator.
        shift: the mean, in standard deviations of the middle channel.
        constant: make one channel constant.

    Returns:
        Maps whose scales go from 0.1 in the first channel to 10 in the last.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    channels = shape[1]
    scale = torch.logspace(-1, 1, channels).reshape(1, -1, *[1] * (len(shape) - 2))
    x = x * scale + shift
    if constant and channels > 1 and x.numel():
        x[:, channels // 2] = 1.5
    return x.to(dtype)


def affine(
    channels: int, dtype: torch.dtype = torch.float32, seed: int = 1, samples: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Make a weight and a bias of shape (channels,), of both signs, away from 1 and 0.

    With ``samples=(N,)`` their shape is (N, channels): parameters of each sample.
    """
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(2, *samples, channels, generator=generator)
    return weight.to(dtype), bias.to(dtype)


def pytorch_group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalize (N, C, *) by torch.group_norm, with parameters (C,) or (N, C), at x's dtype."""
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    if all(p is None or p.ndim == 1 for p in (weight, bias)):
        return torch.group_norm(x, num_groups, weight, bias, eps)
    y, ones = torch.group_norm(x, num_groups, eps=eps), [1] * (x.ndim - 2)
    if weight is not None:
        y = y * weight.reshape(*weight.shape, *ones)
    return y if bias is None else y + bias.reshape(*bias.shape, *ones)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every torch.empty with NaN, so that an element that nobody writes is found."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
