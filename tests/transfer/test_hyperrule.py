"""The BiT-HyperRule against a table (arXiv 1912.11370, section 3.3)."""

import dataclasses
import math

import pytest

from bitkern.transfer import HyperRule, hyperrule

SHORT = (500, (200, 300, 400), 100, 0.0)
MIDDLE = (10_000, (3000, 6000, 9000), 500, 0.1)
LONG = (20_000, (6000, 12_000, 18_000), 500, 0.1)


@pytest.mark.parametrize(
    ("num_examples", "expected"),
    [
        (1, SHORT),
        (19_999, SHORT),
        (20_000, MIDDLE),
        (499_999, MIDDLE),
        (500_000, LONG),
        (1_281_167, LONG),
    ],
)
def test_schedule(num_examples, expected):
    rule = hyperrule(num_examples, (224, 224))
    assert (rule.steps, rule.decay_steps, rule.warmup_steps, rule.mixup_alpha) == expected
    assert (rule.base_lr, rule.batch_size) == (0.003, 512)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((8, 8), (160, 128)),
        ((32, 32), (160, 128)),
        ((95, 97), (160, 128)),  # 9215 pixels
        ((97, 95), (160, 128)),
        ((96, 96), (512, 480)),  # 9216
        ((1, 9216), (512, 480)),
        ((480, 640), (512, 480)),
    ],
)
def test_resolution(size, expected):
    rule = hyperrule(1000, size)
    assert (rule.resize, rule.crop) == expected


@pytest.mark.parametrize(
    ("num_examples", "step", "expected"),
    [
        (10, 0, 0.0),
        (10, 1, 0.003 / 100),
        (10, 50, 0.0015),
        (10, 99, 0.003 * 0.99),
        (10, 100, 0.003),
        (10, 200, 0.003),
        (10, 201, 0.0003),
        (10, 300, 0.0003),
        (10, 301, 0.00003),
        (10, 400, 0.00003),
        (10, 401, 0.000003),
        (10, 499, 0.000003),
        (20_000, 499, 0.003 * 499 / 500),
        (20_000, 500, 0.003),
        (20_000, 3000, 0.003),
        (20_000, 3001, 0.0003),
        (20_000, 9001, 0.000003),
        (500_000, 250, 0.0015),
        (500_000, 6000, 0.003),
        (500_000, 6001, 0.0003),
        (500_000, 19_999, 0.000003),
    ],
)
def test_lr(num_examples, step, expected):
    lr = hyperrule(num_examples, (32, 32)).lr(step)
    assert math.isclose(lr, expected, rel_tol=1e-15)


def test_lr_scales_with_base_lr_and_may_start_without_warm_up():
    rule = dataclasses.replace(hyperrule(10, (32, 32)), base_lr=0.02, warmup_steps=0)
    assert [rule.lr(step) for step in (0, 200)] == [0.02, 0.02]
    assert math.isclose(rule.lr(201), 0.002)


def test_with_steps_keeps_the_proportions():
    rule = hyperrule(10, (32, 32)).with_steps(50)
    assert (rule.steps, rule.decay_steps, rule.warmup_steps) == (50, (20, 30, 40), 10)
    assert rule.with_steps(500) == hyperrule(10, (32, 32))
    tiny = rule.with_steps(1)
    assert tiny.lr(0) > 0, "a run of one step must move"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"resize": 127}, "resize"),
        ({"crop": 0}, "crop"),
        ({"steps": 0}, "steps"),
        ({"decay_steps": (300, 200)}, "decay_steps"),
        ({"decay_steps": (-1,)}, "decay_steps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"mixup_alpha": -0.1}, "mixup_alpha"),
        ({"mixup_alpha": math.nan}, "mixup_alpha"),
        ({"base_lr": 0.0}, "base_lr"),
        ({"base_lr": math.inf}, "base_lr"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_rejects_a_rule_that_makes_no_schedule(change, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        dataclasses.replace(hyperrule(10, (32, 32)), **change)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, (32, 32)), "num_examples"),
        ((10, (0, 32)), "image_size"),
        ((10, (32, 32, 3)), "image_size"),
    ],
)
def test_rejects_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        hyperrule(*arguments)
    with pytest.raises(ValueError, match="^step: expected"):
        hyperrule(10, (32, 32)).lr(-1)
    with pytest.raises(ValueError, match="^steps: expected"):
        hyperrule(10, (32, 32)).with_steps(0)


def test_is_immutable_and_comparable():
    rule = hyperrule(10, (32, 32))
    assert isinstance(rule, HyperRule) and rule == hyperrule(19_999, (8, 8))
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.steps = 1


def test_quick_is_smaller_in_all_and_no_larger_in_anything():
    rule = hyperrule(1000, (480, 480)).quick()
    assert (rule.resize, rule.crop, rule.steps, rule.batch_size) == (160, 128, 100, 64)
    assert (rule.warmup_steps, rule.decay_steps, rule.base_lr) == (20, (40, 60, 80), 0.003)
    small = dataclasses.replace(rule.with_steps(10), resize=40, crop=32, batch_size=7)
    assert small.quick() == small
