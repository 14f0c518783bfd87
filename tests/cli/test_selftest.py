"""``python -m bitkern.selftest``, and that it finds what is wrong."""

import itertools
from unittest.mock import Mock

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


def right(x):
    return reference.group_norm_act(x, 4, act="silu")


def case(ours):
    return selftest.Case("group_norm_act", "x", ours, right, [torch.randn(2, 8, 5, 5)])


@pytest.mark.parametrize(
    ("ours", "fault"),
    [
        (lambda x: right(x) + 1e-4, "0: max-abs"),
        (lambda x: right(x) + (x - x.detach()) * 1e-3, "1: max-abs"),
        (lambda x: right(x).index_fill(0, torch.tensor(1), float("nan")), "0: NaN in other"),
    ],
)
def test_wrong(ours, fault):
    assert selftest.check(case(ours), "cpu").startswith(f"result {fault}")


def test_not_repeatable():
    calls = itertools.count()
    other = case(lambda x: right(x) * (1 + 2**-22 * (next(calls) % 2)))
    assert selftest.check(other, "cpu") == "other bits the second time"


def test_says_what_to_report(monkeypatch, capsys):
    cases = [case(Mock(side_effect=RuntimeError("no such kernel"))), case(lambda x: right(x) + 1)]
    monkeypatch.setattr(selftest, "cases", lambda: iter(cases))
    assert selftest.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "group_norm_act of x: RuntimeError: no such kernel"
    assert lines[-1].startswith("wrong: 2 of 2 cases on ") and selftest.REPORT in lines[-1]
