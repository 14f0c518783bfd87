"""The correctness bar, and inputs that find faults."""

import torch


def assert_accurate(ours, peer, exact, what="", summed=None):
    """``ours`` is within twice PyTorch's distance from the float64 result, at the same dtype.

    Measured as max-abs and as relative L2. One rounding of the result's dtype is allowed on top,
    at the largest magnitude: two correct roundings of one value may differ by that. Where terms
    that cancel are summed, a rounding is relative to the terms: ``summed`` is the sum of their
    absolute values, in the shape of the result.
    """
    assert ours.shape == exact.shape, f"{what}: shape {ours.shape}, expected {exact.shape}"
    assert ours.dtype == peer.dtype, f"{what}: dtype {ours.dtype}, expected {peer.dtype}"
    if exact.numel() == 0:
        return
    assert torch.equal(ours.isnan(), peer.isnan()), f"{what}: NaN in other places than PyTorch"
    finite = exact.isfinite() & peer.isfinite()
    eps = torch.finfo(peer.dtype).eps
    size = exact if summed is None else torch.maximum(exact.abs(), summed)
    ours, peer, exact, size = (t.detach().double()[finite] for t in (ours, peer, exact, size))
    if exact.numel() == 0:
        return
    norm = exact.norm().clamp_min(1e-30)
    for measure, of in (
        ("max-abs", lambda t: t.abs().max()),
        ("relative L2", lambda t: t.norm() / norm),
    ):
        error, peer_error = of(ours - exact), of(peer - exact)
        allowed = 2 * peer_error + eps * of(size)
        assert error <= allowed, (
            f"{what}: {measure} error {error:.3e}, allowed {allowed:.3e} "
            f"(PyTorch {peer_error:.3e}, {eps:.1e} of {of(size):.3e})"
        )


def strided(x, kind):
    """``x`` with other strides: contiguous, channels_last, or a view that is not dense."""
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


def maps(shape, dtype=torch.float32, seed=0, shift=3.0, constant=True):
    """Feature maps with a shifted mean, scales that differ by channel, one constant channel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    channels = shape[1]
    scale = torch.logspace(-1, 1, channels).reshape(1, -1, *[1] * (len(shape) - 2))
    x = x * scale + shift
    if constant and channels > 1 and x.numel():
        x[:, channels // 2] = 1.5
    return x.to(dtype)


def affine(channels, dtype=torch.float32, seed=1, samples=()):
    """weight and bias of both signs, away from 1 and 0; ``samples=(N,)``: (N, channels)."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(2, *samples, channels, generator=generator)
    return weight.to(dtype), bias.to(dtype)


def pytorch_group_norm(x, num_groups, weight, bias, eps):
    """torch.group_norm, and what one would write for parameters of each sample, at x's dtype."""
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    if all(p is None or p.ndim == 1 for p in (weight, bias)):
        return torch.group_norm(x, num_groups, weight, bias, eps)
    y, ones = torch.group_norm(x, num_groups, eps=eps), [1] * (x.ndim - 2)
    if weight is not None:
        y = y * weight.reshape(*weight.shape, *ones)
    return y if bias is None else y + bias.reshape(*bias.shape, *ones)
