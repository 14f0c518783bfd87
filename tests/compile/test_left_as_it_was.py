"""Networks in which something changes between the parts that a kernel would compute together."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitkern import ops
from bitkern.compile import patterns


def ws(w, eps=1e-5):
    m, v = w.mean((1, 2, 3), keepdim=True), w.var((1, 2, 3), keepdim=True, unbiased=False)
    return (w - m) / torch.sqrt(v + eps)


@torch.library.custom_op("bitkern_tests::double_", mutates_args={"x"})
def double_(x: torch.Tensor) -> None:
    x.mul_(2)


class Network(nn.Module):
    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.run, self.gn = run, nn.GroupNorm(4, 8)
        self.w, self.w2 = (nn.Parameter(torch.randn(8, 8, 1, 1)) for _ in range(2))
        self.one, self.gain = nn.Parameter(torch.randn(1, 8, 1, 1)), nn.Parameter(torch.randn(8))
        self.b = nn.Parameter(torch.randn(8))
        with torch.no_grad():
            self.gn.weight.copy_(torch.randn(8))
            self.gn.bias.copy_(torch.randn(8))

    def forward(self, x):
        return self.run(self, x)


def weight_changed_through_data(s, x):
    y = F.conv2d(x, ws(s.w))
    s.w2.data.mul_(0.001)
    return F.conv2d(y, ws(s.w2))


def weight_changed_through_a_slice(s, x):
    with torch.no_grad():
        s.w2[0].mul_(0.5)
    return F.conv2d(F.conv2d(x, ws(s.w)), ws(s.w2))


def registered_weight_changed(s, x):
    y = F.conv2d(x, ops.weight_standardize(s.w))
    s.w2.data.mul_(0.001).add_(torch.linspace(0, 1, 64).view(8, 8, 1, 1))
    return F.conv2d(y, ops.weight_standardize(s.w2))


def conv_weight_changed_after_the_norm(s, x):
    w = s.w * 1
    a = F.relu(s.gn(x))
    with torch.no_grad():
        w.view(-1)[:9].mul_(3)
    return F.conv2d(a, w)


def conv_bias_changed_after_the_norm(s, x):
    b = s.b * 1
    a = F.relu(s.gn(x))
    with torch.no_grad():
        b.mul_(3)
    return F.conv2d(a, s.w, b)


def conv_bias_changed_with_gradients(s, x):
    b = s.b * 1
    a = F.relu(s.gn(x))
    b.mul_(3)
    return F.conv2d(a, s.w, b)


def norm_weight_changed_after_the_sum(s, x):
    g = s.gn.weight * 1
    t = x + x.flip(2)
    with torch.no_grad():
        g.mul_(3)
    return F.conv2d(F.relu(F.group_norm(t, 4, g)), s.w)


def norm_weight_changed_before_the_sum(s, x):
    g = s.gn.weight * 1
    y = F.group_norm(F.conv2d(x, s.w), 4, g)
    with torch.no_grad():
        g.mul_(3)
    return F.relu(y + x)


def a_slice_of_a_convolution(s, x):
    c = F.conv2d(x, s.w)
    h = c[:, :4]
    h += x[:, :4]
    return F.relu(F.group_norm(h, 2)), c


def changed_by_a_custom_operator(s, x):
    h = x * 1
    y = s.gn(h)
    torch.ops.bitkern_tests.double_(h)
    return F.relu(y.detach() + h)


def changed_by_a_method(s, x):
    h = (x * 1).detach()
    y = s.gn(h)
    h.__imul__(0.5)
    return F.relu(y.detach() + h)


def changed_by_batch_norm(s, x):
    h = (x * 1).detach()
    y = s.gn(h)
    row = h[0, 0, 0]
    F.batch_norm(x[:, :4], running_mean=row[:4], running_var=h[1, 0, 0, :4].abs(), training=True)
    return F.relu(y.detach() + h)


def changed_before_a_late_scale(s, x):
    h = (x * 1).detach()
    y = s.gn(h)
    h.mul_(0.5)
    return F.relu(y * h.mean((2, 3), keepdim=True) + s.b.view(1, 8, 1, 1))


def scale_changed_after_the_norm(s, x):
    scale = x.mean((2, 3), keepdim=True) * 1
    y = s.gn(x)
    scale.mul_(3)
    return F.silu(y * scale)


def scale_changed_before_a_late_shift(s, x):
    scale = x.mean((2, 3), keepdim=True) * 1
    y = s.gn(x).detach() * scale.detach()
    scale.mul_(3)
    return F.silu(y + scale.sin())


def scale_changed_before_a_sum(s, x):
    scale = (x.mean((2, 3), keepdim=True) * 1).detach()
    y = s.gn(x) * scale
    scale.mul_(3)
    return F.relu(y + x)


def a_norm_added_to_memory(s, x):
    h = x.mean((2, 3), keepdim=True) * 1
    v = h.view(len(x), 8)
    h += F.group_norm(x[:, :, :1, :1], 2)
    return F.silu(h) + v[:, :, None, None]


def an_integer_scale(s, x):
    mask = x.mean((2, 3), keepdim=True) > 0
    return F.silu(F.group_norm(x, 2) * mask) + F.silu(F.group_norm(x, 2) + mask.long())


def a_norm_times_a_scale_of_itself(s, x):
    y = F.group_norm(x[:, :, :1, :1], 2)
    return F.silu(torch.addcmul(y, y, x.mean((2, 3), keepdim=True)))


def strides_of_one_number(s, x):
    return torch.conv2d(F.relu(s.gn(x)), s.w, stride=(2,), padding=(0,), dilation=(1,))


def a_scale_for_each_pixel(s, x):
    return F.relu(s.gn(x) * x.sigmoid() + x.mean((2, 3), keepdim=True))


def a_scale_of_more_samples(s, x):
    return F.relu(s.gn(x[:1]) * (1 + x.mean((2, 3), keepdim=True)))


def a_scale_without_gradients(s, x):
    with torch.no_grad():
        scale = x.mean((2, 3), keepdim=True) * s.b.view(1, 8, 1, 1)
    return F.conv2d(F.silu(s.gn(x + x.flip(2)) * scale), s.w)


def a_scale_of_the_sum(s, x):
    t = x + x.flip(2)
    return F.conv2d(F.silu(s.gn(t) * t.mean((2, 3), keepdim=True)), s.w) + t


def clamped(s, x):
    return F.conv2d(x, ws(s.w.clamp(-0.2, 0.2)))


def absolute_gain(s, x):
    return F.conv2d(x, ws(s.w) * s.gain.abs().view(-1, 1, 1, 1))


def a_single_filter(s, x):
    w = F.batch_norm(s.one.reshape(1, 1, -1), None, None, training=True, momentum=0.0, eps=1e-3)
    return F.conv2d(x, w.reshape_as(s.one) * 1)


def filters_of_zeros(s, x):
    with torch.no_grad():
        c = s.w * torch.tensor([0.0] + [1.0] * 7).view(-1, 1, 1, 1)
    c = c + 0 * s.w
    c = c - c.mean((1, 2, 3), keepdim=True)
    return F.conv2d(x, c / c.flatten(1).std(1).clamp(min=1e-8).view(-1, 1, 1, 1))


def detached_statistics(s, x):
    v = s.w.var((1, 2, 3), keepdim=True, unbiased=False)
    return F.conv2d(x, (s.w - s.w.mean((1, 2, 3), keepdim=True)) / torch.sqrt(v + 1e-5).detach())


def standardized_without_gradients(s, x):
    with torch.no_grad():
        w = ws(s.w)
    return F.conv2d(x, w)


def a_weight_first_needed_without_gradients(s, x):
    with torch.no_grad():
        x = F.conv2d(x, ws(s.w))
    return F.conv2d(x, ws(s.w)) + F.conv2d(x, ws(s.w2))


def registered_without_gradients(s, x):
    with torch.no_grad():
        w = ops.weight_standardize(s.w)
    return F.conv2d(x, w)


def detached_weight(s, x):
    return F.conv2d(x, ws(s.w.detach())) + F.conv2d(x, ws(s.w).detach())


def norm_in_inference_mode(s, x):
    with torch.no_grad():
        y = s.gn(x)
    return F.relu(y + x)


def norm_in_real_inference_mode(s, x):
    with torch.inference_mode():
        y = s.gn(x)
    return F.relu(y + x)


def by_keywords(s, x):
    z = F.conv2d(input=x, weight=ws(s.w))
    y = F.group_norm(input=z, num_groups=4, eps=1e-3, weight=s.gn.weight)
    return F.conv2d(bias=s.b, input=F.relu(input=y), weight=s.w2)


def computed_weights_of_layers(s, x):
    y = F.conv2d(x, ops.weight_standardize(s.w * 2, gain=s.gain.abs()))
    return F.conv2d(y, ops.weight_standardize_all([s.w, s.w2])[1])


def padding_of_a_size(s, x):
    return F.conv2d(F.relu(s.gn(x)), s.w, padding=x.shape[-1] - 5)


RUNS = [f for f in list(globals().values()) if getattr(f, "__module__", "") == __name__]
RUNS = [
    f for f in RUNS if getattr(f, "__code__", None) and f.__code__.co_varnames[:2] == ("s", "x")
]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_equals_eager(run, dtype, dynamic):
    check(run, dtype, dynamic)


CARELESS = {
    "changed": (conv_bias_changed_with_gradients, lambda *_: False),
    "fresh": (a_slice_of_a_convolution, lambda *_: True),
    "same_mode": (norm_in_inference_mode, lambda _: True),
    "_sum_before": (norm_weight_changed_after_the_sum, lambda c: patterns.sum_of(c.norm.x)),
}


@pytest.mark.parametrize("rule", CARELESS)
def test_a_missing_rule_is_noticed(rule, monkeypatch):
    run, careless = CARELESS[rule]
    monkeypatch.setattr(patterns, rule, careless)
    with pytest.raises(AssertionError):
        check(run, torch.float64, None)


def check(run, dtype, dynamic):
    model = Network(run).to(dtype)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="bitkern", fullgraph=True, dynamic=dynamic)
    x, found = torch.randn(2, 8, 4, 5, dtype=dtype), []
    for network, call in ((model, model), (twin, compiled)):
        leaf = x.clone().requires_grad_()
        outs = call(leaf)
        outs = [o for o in (outs if isinstance(outs, tuple) else (outs,)) if o.requires_grad]
        weights = [torch.linspace(-1, 1, o.numel(), dtype=dtype).view_as(o) for o in outs]
        leaves = [leaf, *network.parameters()]
        try:
            grads = torch.autograd.grad(outs, leaves, weights, allow_unused=True)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            grads = ["modified"]
        found.append([*outs, *grads, *network.parameters()])
    tolerance = 1e-11 if dtype == torch.float64 else 2e-4
    for ours, theirs in zip(*reversed(found), strict=True):
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert ours == theirs
