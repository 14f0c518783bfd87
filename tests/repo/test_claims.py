"""The claims in miniature: their statistics, their runs, their page."""

import json
import math

import pytest
import torch

from benchmarks.claims import CLAIMS, networks, report, runs, statistics
from benchmarks.claims.statistics import NOT_SEEN, OPPOSITE, SEEN, UNCERTAIN
from tests.process import python


def test_estimate():
    # Standard deviation 1, and 4.302653 standard errors for two degrees of freedom.
    estimate = statistics.estimate([3.0, 1.0, 2.0])
    half = 4.302653 / math.sqrt(3)
    assert estimate == pytest.approx((3, 2, 1 / math.sqrt(3), 2 - half, 2 + half))
    assert estimate.least == pytest.approx(half)
    assert statistics.estimate([0.5]) == (1, 0.5, None, None, None)
    assert statistics.estimate([]) is None


def around(mean, half):
    return statistics.Estimate(3, mean, half / 4.302653, mean - half, mean + half)


@pytest.mark.parametrize(
    "mean, half, gain, no_loss",
    [
        (0.10, 0.04, SEEN, SEEN),
        (0.06, 0.08, UNCERTAIN, SEEN),  # both none and a gain of interest
        (0.04, 0.03, UNCERTAIN, SEEN),  # a gain, of interest or not
        (0.01, 0.005, NOT_SEEN, SEEN),  # a gain, but too small
        (0.00, 0.04, NOT_SEEN, SEEN),
        (0.00, 0.06, UNCERTAIN, UNCERTAIN),
        (-0.04, 0.03, NOT_SEEN, UNCERTAIN),
        (-0.06, 0.03, OPPOSITE, UNCERTAIN),
        (-0.10, 0.04, OPPOSITE, OPPOSITE),
    ],
)
def test_verdict(mean, half, gain, no_loss):
    estimate = around(mean, half)
    assert statistics.verdict(estimate, 0.05) == gain
    assert statistics.verdict(estimate, 0.05, no_loss=True) == no_loss


def test_no_verdict_of_a_single_seed():
    assert statistics.verdict(None, 0.05) == UNCERTAIN
    assert statistics.verdict(statistics.estimate([1.0]), 0.05) == UNCERTAIN


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_claim_is_stated_whole(claim):
    assert claim.seeds >= 3
    assert claim.amounts.keys() == claim.quick.keys()
    assert {condition for condition, _ in claim.cells.values()} == claim.conditions.keys()
    for comparison in claim.comparisons:
        assert comparison.smallest > 0
        assert {cell for _, cell in comparison.terms} <= claim.cells.keys()
        assert sum(factor for factor, _ in comparison.terms) == 0


def test_networks_are_twins():
    built = {name: networks.build(name, 7, seed=0, width=1) for name in networks.BUILDERS}
    ours = built["WS + GroupNorm"]
    shapes = {name: p.shape for name, p in ours.named_parameters()}
    x = torch.randn(2, 3, 32, 32)
    for net in built.values():
        assert {name: p.shape for name, p in net.named_parameters()} == shapes
        assert net(x).eq(0).all()  # as the head is
    again = networks.build("GroupNorm", 7, seed=0, width=1)
    other = networks.build("GroupNorm", 7, seed=1, width=1)
    weights = [net.stem.conv.weight for net in (built["GroupNorm"], again, other)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_frozen_statistics_stay_and_a_body_is_carried_over():
    body = networks.build("BatchNorm", 7, seed=0).train()
    torch.nn.init.ones_(body.head.fc.weight)
    body(torch.randn(4, 3, 32, 32))
    net = networks.build("BatchNorm, frozen", 3, seed=1, body=body).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(torch.randn(4, 3, 32, 32) + 1)
    for name, value in net.state_dict().items():
        assert value.equal(before[name]), name
        assert name.startswith("head.") or value.equal(body.state_dict()[name]), name
    assert net.head.fc.weight.shape[0] == 3 and not net.head.fc.weight.any()


def test_a_training_that_fails_is_a_result():
    line = runs.execute(runs.Key("small_batch", "BatchNorm, 1", 0), quick=True)
    assert "numbers" not in line
    assert line["failure"].startswith("ValueError: Expected more than 1 value per channel")


def test_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "runs.jsonl"
    assert runs.finished(path) == []
    path.write_text('{"seed": 0}\n{"seed": 1}\n{"se')
    assert runs.finished(path) == [{"seed": 0}, {"seed": 1}]
    assert path.read_text() == '{"seed": 0}\n{"seed": 1}\n'
    path.write_text('{"se')
    assert runs.finished(path) == [] and path.read_text() == ""


def lines_of(claim, number):
    """Make up lines; ``number(cell, seed)`` is the value of a cell."""
    about = {"claim": claim.name, "seconds": 1.0, "torch": "2", "commit": "c0ffee"}
    for condition in claim.conditions:
        for seed in range(claim.seeds):
            numbers = {
                name: number(cell, seed)
                for cell, (shown_in, name) in claim.cells.items()
                if shown_in == condition
            }
            yield about | {"condition": condition, "seed": seed, "numbers": numbers}


def test_summary_pairs_seeds():
    """Variation that a seed adds to both sides does not make their difference uncertain."""
    claim = CLAIMS["transfer"]
    rows = {"WS + GroupNorm": 0.5, "BatchNorm": 0.2}
    lines = list(lines_of(claim, lambda cell, seed: rows[cell[0]] + 0.1 * seed + 0.001 * seed**2))
    (found, *_) = report.summary(lines)["claims"]["transfer"]["comparisons"]
    assert found["estimate"]["mean"] == pytest.approx(0.3)
    assert found["estimate"]["least"] < 1e-9
    assert found["verdict"] == SEEN
    lines = [line for line in lines if (line["condition"], line["seed"]) != ("BatchNorm", 2)]
    (found, *_) = report.summary(lines)["claims"]["transfer"]["comparisons"]
    assert list(found["values"]) == [0, 1, *range(3, claim.seeds)]


@pytest.mark.parametrize(
    "gain, said", [(0.3, "Seen: "), (0.0, "Not seen: "), (-0.3, "Opposite seen: ")]
)
def test_page_says_what_the_numbers_say(gain, said, tmp_path):
    claim = CLAIMS["small_batch"]
    lines = list(lines_of(claim, lambda cell, seed: 0.4 + gain * (cell[0] == "WS + GroupNorm")))
    failed = next(line for line in lines if line["condition"] == "BatchNorm, 1")
    lines = [line for line in lines if line["condition"] != "BatchNorm, 1"]
    lines.append(
        {k: v for k, v in failed.items() if k != "numbers"} | {"failure": "ValueError: one"}
    )
    report.write(report.summary(lines), tmp_path)
    page = (tmp_path / "claims.md").read_text()
    assert f"{said}{claim.comparisons[0].what} is {gain:+.3f}" in page
    assert "| fails |" in page and "ValueError: one" in page
    assert (tmp_path / "claims" / "small_batch.png").stat().st_size > 0


def test_page_is_a_function_of_claims_json(tmp_path):
    lines = list(lines_of(CLAIMS["small_batch"], lambda cell, seed: 0.4))
    report.write(report.summary(lines), tmp_path)
    page = (tmp_path / "claims.md").read_text()
    again = tmp_path / "again"
    again.mkdir()
    python("-m", "benchmarks.claims.report", tmp_path / "claims.json", again)
    assert (again / "claims.md").read_text() == page


@pytest.mark.sweep
def test_dry_run_and_its_resumption(tmp_path):
    def claims(*options):
        return python("-m", "benchmarks.claims", "--out", tmp_path, "--quick", *options).stdout

    claims()
    path = tmp_path / "quick.jsonl"
    whole = path.read_text().splitlines()
    lines = [json.loads(line) for line in whole]
    found = {(line["claim"], line["condition"], line["seed"]) for line in lines}
    assert len(lines) == len(found) and found == set(runs.keys(CLAIMS, 1))
    failed = [line["condition"] for line in lines if "failure" in line]
    assert failed == ["BatchNorm, 1"]
    for line in lines:
        assert all(map(math.isfinite, line.get("numbers", {}).values()))
        assert {"seconds", "torch", "commit"} <= line.keys()
    page = (tmp_path / "claims.md").read_text()
    for name, claim in CLAIMS.items():
        assert claim.hypothesis in page and (tmp_path / "claims" / f"{name}.png").exists()

    torn = next(i for i, line in enumerate(lines) if line["condition"] == "BatchNorm, 64")
    kept = whole[:torn] + whole[torn + 1 :]
    path.write_text("\n".join(kept) + "\n" + whole[torn][:20])
    assert f"1/1 small_batch, BatchNorm, 64, seed {runs.FIRST_SEED}" in claims()
    *before, last = path.read_text().splitlines()
    assert before == kept
    # A run is a function of its key, in whatever process.
    assert json.loads(last)["numbers"] == lines[torn]["numbers"]
