"""MixUp: its loss is cross-entropy against soft labels, to the last gradient."""

import pytest
import torch
import torch.nn.functional as F

from bitkern.transfer import mixup, mixup_loss


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, 5, 4, generator=generator, dtype=torch.float64) * 3 + 1
    y = torch.tensor([0, 1, 2, 2, 4, 3, 0])
    return x, y, torch.randperm(7, generator=generator)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.97, 1.0])
def test_loss_and_gradient_equal_soft_labels(batch, lam):
    x, y, permutation = batch
    logits = (x.flatten(1)[:, :5] * 4).requires_grad_()
    _, y, y_perm = mixup(x, y, lam, permutation)
    loss = mixup_loss(logits, y, y_perm, lam)
    onehot = torch.eye(5, dtype=torch.float64)
    soft = F.cross_entropy(logits, lam * onehot[y] + (1 - lam) * onehot[y[permutation]])
    torch.testing.assert_close(loss, soft, rtol=1e-12, atol=0)
    ours, expected = (torch.autograd.grad(value, logits)[0] for value in (loss, soft))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_mixes_each_image_with_its_partner(batch, lam, dtype, format):
    x, y, permutation = batch
    x = x.to(dtype).contiguous(memory_format=format)
    before = x.clone()
    mixed, y_same, y_perm = mixup(x, y, lam, permutation)
    for i, j in enumerate(permutation):
        expected = (lam * x[i].double() + (1 - lam) * x[j].double()).to(dtype)
        torch.testing.assert_close(mixed[i], expected)
    assert mixed.dtype == dtype and mixed.is_contiguous(memory_format=format)
    assert torch.equal(y_same, y) and torch.equal(y_perm, y[permutation])
    assert torch.equal(x, before)


def test_half_precision_logits_are_reduced_in_fp32(batch):
    _, y, permutation = batch
    logits = torch.randn(7, 5).half()
    loss = mixup_loss(logits, y, y[permutation], 0.4)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, mixup_loss(logits.float(), y, y[permutation], 0.4))


def test_batch_of_one_and_of_none():
    for n in (0, 1):
        x, y = torch.randn(n, 3, 4, 4), torch.zeros(n, dtype=torch.int64)
        mixed, _, y_perm = mixup(x, y, 0.3, torch.arange(n))
        assert mixed.shape == x.shape and y_perm.shape == (n,)
        torch.testing.assert_close(mixed, x)


X, Y, P = torch.randn(4, 3, 2, 2), torch.arange(4), torch.tensor([3, 2, 1, 0])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((X, Y, 1.1, P), "lam"),
        ((X, Y, -0.1, P), "lam"),
        ((X, Y, float("nan"), P), "lam"),
        ((X.to(torch.uint8), Y, 0.5, P), "x"),
        ((X, Y[:3], 0.5, P), "y"),
        ((X, Y, 0.5, P[:3]), "permutation"),
        ((X, Y, 0.5, P.int()), "permutation"),
        ((X, Y, 0.5, torch.tensor([0, 0, 1, 2])), "permutation"),
        ((X, Y, 0.5, torch.tensor([1, 2, 3, 4])), "permutation"),
    ],
)
def test_mixup_rejects(arguments, named):
    with pytest.raises((ValueError, TypeError), match=f"^{named}: expected"):
        mixup(*arguments)


LOGITS = torch.randn(4, 5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((LOGITS[0], Y, Y, 0.5), "logits"),
        ((LOGITS, Y[:3], Y, 0.5), "y"),
        ((LOGITS, Y.float(), Y, 0.5), "y"),
        ((LOGITS, Y, Y[:3], 0.5), "y_perm"),
        ((LOGITS, Y, Y, 2), "lam"),
    ],
)
def test_mixup_loss_rejects(arguments, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        mixup_loss(*arguments)
