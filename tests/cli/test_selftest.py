"""``python -m bitkern.selftest``, and that it finds what is wrong."""

import pytest
import torch

from bitkern import backends, ops, reference, selftest


def test_every_operator_is_there():
    """Behind torch.compile lie the same kernels."""
    assert {case.operator for case in selftest.cases()} == {n for n in ops.__all__ if n != "Conv"}
    assert backends.OPERATORS.keys() <= {case.operator for case in selftest.cases()}


def test_right(capsys):
    assert selftest.main() == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("right: 43 cases on ")


def case(ours):
    x = torch.randn(2, 8, 5, 5)

    def plain(x):
        return reference.group_norm_act(x, 4, act="silu")

    return selftest.Case("group_norm_act", "x", ours, plain, [x])


def off_by_little(x):
    return reference.group_norm_act(x, 4, act="silu") + 1e-4


def wrong_gradient(x):
    y = reference.group_norm_act(x, 4, act="silu")
    return y + (x - x.detach()) * 1e-3


def a_nan(x):
    return reference.group_norm_act(x, 4, act="silu").index_fill(0, torch.tensor(1), float("nan"))


def refused(x):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    "ours, fault",
    [(off_by_little, "0: max-abs"), (wrong_gradient, "1: max-abs"), (a_nan, "0: NaN in other")],
)
def test_wrong(ours, fault):
    assert selftest.check(case(ours), "cpu").startswith(f"result {fault}")


def test_not_repeatable():
    calls = []

    def ours(x):
        calls.append(x)
        return reference.group_norm_act(x, 4, act="silu") * (1 + 2**-22 * (len(calls) % 2))

    assert selftest.check(case(ours), "cpu") == "other bits the second time"


def test_says_what_to_report(monkeypatch, capsys):
    monkeypatch.setattr(selftest, "cases", lambda: iter([case(refused), case(off_by_little)]))
    assert selftest.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "group_norm_act of x: RuntimeError: no such kernel"
    assert lines[-1].startswith("wrong: 2 of 2 cases on ") and selftest.REPORT in lines[-1]
