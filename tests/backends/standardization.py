"""Compare weight standardization by a backend's launchers with float64."""

import torch

from bitkern import reference
from bitkern.testing import assert_accurate
from bitkern.variant import SgdOptions, Variant

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = {"oihw": torch.contiguous_format, "channels_last": torch.channels_last}
VARIANTS = {
    "bit": dict(eps=1e-10),
    "original": dict(eps=1e-5, eps_outside=True, unbiased=True),
    "jax": dict(eps=1e-5, eps_outside=True),
    "nfnet": dict(eps=1e-5, gain=True, scale=0.37),
}
# A long filter, an unaligned one, 1x1, one that a tile just holds, a single element.
SHAPES = [(3, 1024, 3, 3), (5, 3, 7, 7), (40, 64, 1, 1), (2, 256, 2, 2), (4, 1, 1, 1)]


class Problem:
    def __init__(
        self, launchers, device, shapes, dtype=torch.float32, out_dtype=None, format="oihw",
        out_format="oihw", dout_format=None, dout_dtype=None, gain=False, scale=1.0, eps=1e-10,
        eps_outside=False, unbiased=False,
    ):  # fmt: skip
        def tensor(shape, format, dtype, make):
            t = make(shape).to(device, dtype)
            return t.contiguous(memory_format=FORMATS[format]) if len(shape) == 4 else t

        def weight(shape):  # means far from zero, scales that differ by filter
            filters = shape[0]
            column = (filters, *[1] * (len(shape) - 1))
            spread = torch.tensor([1.0, 0.001, 0.03])[torch.arange(filters) % 3].view(column)
            return torch.randn(shape) * spread + torch.randn(column)

        self.launchers = launchers
        self.weights = [tensor(s, format, dtype, weight) for s in shapes]
        self.gains = [tensor((s[0], 1, 1, 1), format, dtype, torch.randn) for s in shapes]
        self.gains = self.gains if gain else None
        self.out_dtype, self.out_format = out_dtype or dtype, out_format
        self.douts = [
            tensor(s, dout_format or out_format, dout_dtype or self.out_dtype, torch.randn)
            for s in shapes
        ]
        self.scales = [scale * (1 + i) for i in range(len(shapes))]
        self.variant = Variant(eps, eps_outside, unbiased)

    def ours(self):
        """Return (out, dweight, dgain or None) for each layer."""
        outs, stats = self.launchers.weight_standardize_forward(
            self.weights, self.gains, self.scales, self.variant, self.out_dtype,
            self.out_format == "channels_last",
        )  # fmt: skip
        assert stats.dtype == torch.float32
        assert stats.shape == (2, sum(w.shape[0] for w in self.weights))
        dweights, dgains = self.launchers.weight_standardize_backward(
            self.douts, self.weights, self.gains, self.scales, stats, self.variant
        )
        for out, dweight, weight in zip(outs, dweights, self.weights, strict=True):
            if weight.ndim == 4:
                assert out.is_contiguous(memory_format=FORMATS[self.out_format])
            assert dweight.stride() == weight.stride() and dweight.dtype == weight.dtype
        return list(zip(outs, dweights, dgains or [None] * len(outs), strict=True))

    def of(self, layer, dtype):
        """Compute the same with PyTorch's operations in ``dtype``."""
        inputs = [self.weights[layer]] + ([self.gains[layer]] if self.gains else [])
        inputs = [t.to(dtype).detach().requires_grad_() for t in inputs]
        gain = inputs[1] if self.gains else None
        options = {"gain": gain, "scale": self.scales[layer], **self.variant._asdict()}
        out = reference.weight_standardize(inputs[0], **options)
        return out, *torch.autograd.grad(out, inputs, self.douts[layer].to(dtype))

    def check(self):
        ours = self.ours()
        for layer, results in enumerate(ours):
            # Weights and arithmetic of 32 bits, whatever the outputs are rounded to.
            exact, near = self.of(layer, torch.float64), self.of(layer, torch.float32)
            for name, mine, theirs, true in zip(
                ("out", "dweight", "dgain"), results, near, exact, strict=False
            ):
                what = f"{name} of {tuple(self.weights[layer].shape)}"
                assert_accurate(mine, theirs.to(mine.dtype), true, what)
        return ours

    def stepped(self, layer, dtype, buffer, options):
        """Return (weight, buffer) after PyTorch's step from the gradient in ``dtype``."""
        weight = self.weights[layer].to(dtype, copy=True)
        weight.grad, buffer = self.of(layer, dtype)[1], buffer.to(dtype, copy=True)
        optimizer = torch.optim.SGD([weight], **options._asdict())
        optimizer.state[weight]["momentum_buffer"] = buffer
        optimizer.step()
        return weight, buffer

    def check_sgd(self, options):
        """Check a step taken in one pass with backward."""
        buffers = [torch.randn_like(w) for w in self.weights]
        exact, near = (
            [self.stepped(i, dtype, b, options) for i, b in enumerate(buffers)]
            for dtype in (torch.float64, torch.float32)
        )
        _, stats = self.launchers.weight_standardize_forward(
            self.weights, None, self.scales, self.variant, torch.bfloat16, False
        )
        self.launchers.weight_standardize_sgd(
            self.douts, self.weights, buffers, self.scales, stats, self.variant, options
        )
        for *mine, true, theirs in zip(self.weights, buffers, exact, near, strict=True):
            for i, name in enumerate(("weight", "buffer")):
                assert_accurate(mine[i], theirs[i], true[i], f"{name} of {tuple(mine[i].shape)}")
        return self.weights, buffers


# All that a step has; nesterov, and the learning rate in a tensor.
SGD = {
    "plain": SgdOptions(0.3, 0.9, 0.0, 0.0, False),
    "dampening": SgdOptions(0.3, 0.8, 0.4, 0.02, False),
    "nesterov": SgdOptions(torch.tensor(0.3, dtype=torch.float64), 0.9, 0.0, 0.02, True),
}


def check_no_variance(case, value):
    """Check that constant filters (1 and 2 here) give zero and have a finite gradient."""
    for weight in case.weights:
        weight[1] = value
        weight[2] = 0.0
    for layer, (out, dweight, dgain) in enumerate(case.ours()):
        exact = case.of(layer, torch.float64)
        for constant in (1, 2):
            assert torch.equal(out[constant], torch.zeros_like(out[constant]))
            torch.testing.assert_close(
                dweight[constant], exact[1][constant].float(), rtol=1e-5, atol=0.0
            )
            assert dgain is None or dgain[constant] == 0


def check_not_finite_stays_in_its_filter(case, filters):
    """Spoil one filter of each of two layers: no other filter may change."""
    clean = case.ours()
    case.weights[0][filters[0], 3] = float("nan")
    case.weights[1][filters[1], 3, 1, 1] = float("inf")
    for spoilt, before, filter in zip(case.ours(), clean, filters, strict=True):
        for after, was in zip(spoilt[:2], before[:2], strict=True):
            assert after[filter].isnan().all()
            others = torch.arange(len(was)) != filter
            assert torch.equal(after[others], was[others])
