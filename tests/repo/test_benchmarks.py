"""The benchmarks run, record what they must, and do not time what is wrong."""

import itertools
import json
import os
import re
import statistics
import time
from types import SimpleNamespace

import pytest
import torch

import bitkern
from benchmarks import kernels, measure, networks, operators, record
from tests.process import python

ROW = (
    "kind case ours_ms peers_ms ratio_to_best_peer fraction_of_floor peak_mb peers_peak_mb failures"
)


def pytest_benchmarks(*arguments, code=0):
    # pytest-benchmark measures nothing where it believes itself in a process of pytest-xdist.
    alone = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"}
    return python("-m", "pytest", "-q", *arguments, code=code, env=alone, OMP_NUM_THREADS="1")


@pytest.mark.sweep
def test_dry_run(tmp_path):
    out = tmp_path / "rows.json"
    done = pytest_benchmarks("benchmarks/", "--tiny", "--out", str(out))
    assert "skipped" not in done.stdout
    written = json.loads(out.read_text())
    assert {"device", "commit", "torch", "copy_gb_s", "matrix_bf16_tflop_s"} <= written.keys()
    assert written["stopped"] is None
    rows = {(row["kind"], row["case"]): row for row in written["rows"]}
    assert {kind for kind, _ in rows} == {"op", "train_step", "infer", "data"}
    for row in rows.values():
        assert row.keys() == {*ROW.split()}
        assert row["ours_ms"] > 0 and row["fraction_of_floor"] > 0
        assert min(row["peers_ms"].values()) > 0
        best = min(ms for name, ms in row["peers_ms"].items() if name not in record.CEILINGS)
        assert row["ratio_to_best_peer"] == pytest.approx(best / row["ours_ms"])
        assert row["case"] in done.stdout
    compiled = rows["op", "group_norm_act/2x32x5x5/bf16/channels_last/fwd"]
    assert {"eager", "amp", "compile"} == (compiled["peers_ms"] | compiled["failures"]).keys()
    step = rows["train_step", "R26x0.5/32/bs2/bf16"]
    assert step["peers_ms"].keys() == {"eager", "amp", "bf16", "batchnorm"}


def test_budget_ends_a_session(tmp_path):
    out = tmp_path / "rows.json"
    pytest_benchmarks("benchmarks/", "--tiny", "--budget", "0", "--out", out)
    written = json.loads(out.read_text())
    assert written["rows"] == []
    assert "budget was used up before op group_norm_act" in written["stopped"]


LATE = """import time
import types

from benchmarks import measure

clock = {"monotonic": lambda: float("inf"), "perf_counter": time.perf_counter}
measure.time = types.SimpleNamespace(**clock)
"""


@pytest.mark.sweep
def test_budget_that_ends_within_a_row_leaves_its_peers_out(tmp_path, monkeypatch):
    (tmp_path / "late.py").write_text(LATE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    out = tmp_path / "rows.json"
    norm = "benchmarks/bench_ops.py", "--tiny", "-k", "nchw", "--out", str(out)
    pytest_benchmarks("-p", "late", *norm, "--budget", "1000")
    (row,) = json.loads(out.read_text())["rows"]
    assert row["peers_ms"] == {} and row["fraction_of_floor"] > 0
    assert row["failures"]["eager"] == "not run: the time budget was used up"


def collected(*options):
    done = pytest_benchmarks("benchmarks/", "--collect-only", *options)
    return re.findall(r"^benchmarks/\S+$", done.stdout, re.M)


@pytest.mark.sweep
def test_what_is_run_without_full_is_a_part_of_it_under_the_same_names():
    usual, full = collected(), collected("--full")
    assert len(set(full)) == len(full)
    assert set(usual) < set(full)
    for word in (
        *("group_norm_act", "add_group_norm_act", "weight_standardize", "train_step", "infer"),
        *("fp32", "bf16", "channels_last", "nchw", "/fwd", "/fwd+bwd", "/compile"),
    ):
        assert any(word in name for name in usual), word


@pytest.mark.sweep
def test_save_and_compare_show_a_slower_operator(tmp_path):
    storage, out = tmp_path / "storage", tmp_path / "rows.json"
    norm = "benchmarks/bench_ops.py", "--tiny", "-k", "nchw"
    norm += f"--benchmark-storage={storage}", "--out", str(out)
    pytest_benchmarks(*norm, "--benchmark-save=before")
    (saved,) = storage.rglob("0001_before.json")
    content = json.loads(saved.read_text())
    (benchmark,) = content["benchmarks"]
    (row,) = json.loads(out.read_text())["rows"]
    assert benchmark["fullname"] == f"benchmarks/bench_ops.py::test_operator[op/{row['case']}]"
    assert 1e3 * benchmark["stats"]["median"] == pytest.approx(row["ours_ms"])

    benchmark["stats"]["median"] /= 1000
    saved.write_text(json.dumps(content))
    compared = "--benchmark-compare=*_before", "--benchmark-compare-fail=median:900%"
    done = pytest_benchmarks(*norm, *compared, code=1)
    assert "Performance has regressed" in done.stdout + done.stderr
    # Our table is still printed, below.
    assert done.stdout.rindex("x best peer") > done.stdout.index("Median")


# The gate.

NORM = operators.Case("group_norm_act", (3, 64, 5, 7), "fp32")
SUM = operators.Case("add_group_norm_act", (2, 96, 5, 3), "bf16", "nchw")
ADD = operators.Case("group_norm_add_relu", (2, 96, 5, 3), "bf16")
WEIGHTS = operators.Case("weight_standardize", "R26x0.5", "bf16")


@pytest.mark.parametrize(
    "case", [NORM, SUM, ADD, WEIGHTS, WEIGHTS._replace(backward=False)], ids=str
)
def test_gate_passes(case):
    operators.Problem(case, "cpu").gate()


def wrong_bias(x, groups, weight, bias):
    return bitkern.reference.group_norm_act(x, groups, weight, 1.001 * bias)


def biased_gradient(x, groups, weight, bias):
    y = bitkern.reference.group_norm_act(x, groups, weight, bias)
    return y + 1e-3 * (x - x.detach())


@pytest.mark.parametrize("wrong", [wrong_bias, biased_gradient])
def test_gate_stops_a_wrong_norm(monkeypatch, wrong):
    monkeypatch.setattr(bitkern.ops, "group_norm_act", wrong)
    with pytest.raises(AssertionError, match="group_norm_act/3x64x5x7.*result"):
        operators.Problem(NORM, "cpu").gate()


def test_gate_stops_one_wrong_layer(monkeypatch):
    right = bitkern.ops.weight_standardize_all

    def wrong(weights, **options):
        *rest, last = right(weights, **options)
        return [*rest, last * 1.02]

    monkeypatch.setattr(bitkern.ops, "weight_standardize_all", wrong)
    with pytest.raises(AssertionError, match="relative L2|max-abs"):
        operators.Problem(WEIGHTS, "cpu").gate()


@pytest.fixture
def fresh_gate():
    networks.gate.cache_clear()
    yield
    networks.gate.cache_clear()


@pytest.mark.parametrize("kind, dtype", [("train_step", "bf16"), ("infer", "fp32")])
def test_gate_stops_a_wrong_model(monkeypatch, fresh_gate, kind, dtype):
    right = networks.ours

    def wrong(model, device):
        net = right(model, device)
        net.stages[2].blocks[0].norm3.act = "silu"
        return net

    networks.gate("R26x0.5", kind, dtype, "cpu")
    networks.gate.cache_clear()
    monkeypatch.setattr(networks, "ours", wrong)
    with pytest.raises(AssertionError, match=f"R26x0.5 {kind} {dtype}: "):
        networks.gate("R26x0.5", kind, dtype, "cpu")


@pytest.mark.sweep
def test_frozen_weights_are_frozen():
    """Also where the same network was compiled before with weights that may change."""
    case = networks.Case("infer", "R26x0.5", 64, 2, "fp32", ("default", "freezing"))
    networks.gate("R26x0.5", "infer", "fp32", "cpu", freezing=True)
    for name, prepare in networks.prepared(case, "cpu").items():
        if name not in ("compile", "freezing", "folded freezing"):
            continue
        run = prepare()
        run()
        with torch.profiler.profile() as profile:
            run()
        called = {event.key for event in profile.key_averages()}
        assert ("mkldnn::_convolution_pointwise" in called) == ("freezing" in name)


# The race.


class Benchmark:
    """The part of pytest-benchmark's fixture that a race needs."""

    def pedantic(self, target, setup, rounds):
        self.stats = SimpleNamespace(iterations=1)
        samples = []
        for _ in range(rounds):
            setup()
            start = time.perf_counter()
            target()
            samples.append((time.perf_counter() - start) / self.stats.iterations)
        self.stats.stats = SimpleNamespace(median=statistics.median(samples))


def sleeper(seconds):
    return lambda: lambda: time.sleep(seconds)


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")


def raced(contenders, together=True, **options):
    """Return the timings, and the contenders timed whenever there was progress."""
    race = measure.Race(Benchmark(), contenders, "cpu", seconds=0, **options)
    seen = []
    start = race.together if together else race.alone
    start(lambda timings: seen.append(sorted(timings.seconds)))
    return race.timings, seen


@pytest.mark.parametrize("together", [True, False])
def test_race(together):
    contenders = {"ours": sleeper(0.002), "slow": sleeper(0.02), "broken": out_of_memory}
    timings, seen = raced(contenders, together, calls=2)
    assert seen[0] == (["ours", "slow"] if together else ["ours"])
    assert seen[-1] == ["ours", "slow"]
    # Half of the sleep: a run is two calls.
    assert 0.001 <= timings.seconds["ours"] < timings.seconds["slow"]
    assert timings.seconds["slow"] >= 0.01
    assert list(timings.failures) == ["broken"]
    assert timings.failures["broken"].startswith("OutOfMemoryError: CUDA out of memory")
    row = record.row("op", "case", timings, floor=0.0005)
    assert row["ratio_to_best_peer"] > 1 and 0 < row["fraction_of_floor"] <= 0.5
    assert row["failures"] == timings.failures


def test_race_after_the_deadline_records_the_peers_left_out():
    timings, _ = raced({"ours": sleeper(0), "peer": sleeper(0)}, deadline=0)
    assert timings.seconds.keys() == {"ours"}
    assert timings.failures == {"peer": "not run: the time budget was used up"}
    assert record.row("op", "case", timings, floor=1.0)["ratio_to_best_peer"] is None


def test_race_does_not_hide_our_own_failure():
    with pytest.raises(torch.OutOfMemoryError):
        raced({"ours": out_of_memory})


def test_event_is_a_timer_for_pytest_benchmark(monkeypatch):
    milliseconds = itertools.count(0, 3)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(milliseconds)

        def synchronize(self):
            self.synchronized = True

        def elapsed_time(self, end):
            assert end.synchronized
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = measure.clock("cuda")
    start = timer()
    assert timer() - start == pytest.approx(0.003)


# The record.


def a_row(ours, **peers):
    timings = measure.Timings()
    timings.seconds = {"ours": ours, **peers}
    return record.row("infer", "R50x1/224/bs1/bf16", timings, floor=0.1)


def test_record_is_whole_after_every_row(tmp_path):
    path = tmp_path / "rows.json"
    results = record.Record(path, {"device": "x86_64 CPU, 1 threads", "stopped": None})
    results.add(a_row(1.0, eager=2.0, batchnorm=0.5))
    assert json.loads(path.read_text())["rows"][0]["ratio_to_best_peer"] == 2
    # The same case with more peers takes the place of the first.
    results.add(a_row(1.0, eager=2.0, compile=1.5))
    (row,) = json.loads(path.read_text())["rows"]
    assert row["ratio_to_best_peer"] == 1.5
    results.add(record.failure("op", "wrong", AssertionError("result 0: far off")))
    results.stop("no time")
    results.stop("later")
    assert os.listdir(tmp_path) == ["rows.json"]
    written = json.loads(path.read_text())
    assert written["stopped"] == "no time"
    shown = record.table(written)
    assert "1.50 compile" in shown and "FAILED" in shown and "result 0: far off" in shown


def test_the_gate_of_kernels_lets_signs_near_zero_pass():
    """Near zero, ReLU sees another sign in other implementations for some of many elements."""
    z = torch.linspace(-1, 1, 2001)
    exact = (z > 0) * 5.0
    ours = exact.clone()
    ours[1000] = 5.0
    kernels.check(ours, exact, z)
    ours[1010] = 0.0
    with pytest.raises(AssertionError, match="wrong by 5"):
        kernels.check(ours, exact, z)
