"""Options and fixtures of ``pytest benchmarks/``; the table is printed at the end."""

import time
from pathlib import Path

import pytest
import torch

from benchmarks import measure, record
from benchmarks.measure import DEVICE

HERE = Path(__file__).parent
RECORD, DEADLINE = pytest.StashKey(), pytest.StashKey()
BUDGET = 480.0  # seconds, after which no row begins; the last may still take minutes
# Options with which pytest-benchmark prints beside our table.
PLUGIN = "save", "autosave", "compare", "json", "histogram"


def pytest_addoption(parser):
    group = parser.getgroup("bitkern benchmarks")
    group.addoption("--out", type=Path, help="JSON file to write the rows to")
    group.addoption(
        "--budget",
        type=float,
        help=f"seconds, after which no row is begun (default: {BUDGET:.0f}, with --full no limit)",
    )
    group.addoption("--full", action="store_true", help="every case, which may take an hour")
    group.addoption("--tiny", action="store_true", help="tiny shapes on any device: a dry run")


def pytest_configure(config):
    budget = config.getoption("budget", None)
    if budget is None:
        budget = float("inf") if config.getoption("full", False) else BUDGET
    config.stash[DEADLINE] = time.monotonic() + budget
    option = config.option
    if not any(getattr(option, f"benchmark_{name}") for name in PLUGIN):
        option.benchmark_quiet = True
    option.benchmark_columns = option.benchmark_columns or ["median", "iqr", "rounds"]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        module, option = metafunc.module, metafunc.config.getoption
        cases = module.CASES + module.FULL * option("full", False)
        if option("tiny", False):
            cases = module.TINY
        # pytest-benchmark compares by id, so a case has one id in every selection.
        ids = [f"{case.kind}/{case}" + "/compile" * bool(case.modes) for case in cases]
        metafunc.parametrize("case", cases, ids=ids)


def pytest_collection_modifyitems(items):
    """Run operators before models and compiled peers last, in case the budget ends first."""

    def late(item):
        if item.path.parent != HERE:
            return False, False
        case = item.callspec.params["case"]
        return case.kind != "op", bool(case.modes)

    items.sort(key=late)


@pytest.fixture(scope="session")
def results(request):
    torch.backends.cudnn.benchmark = True
    header = record.header(DEVICE)
    if DEVICE == "cpu":
        header["keeps_pages"] = measure.keep_pages()
    header["copy_gb_s"] = round(measure.copy_bandwidth(DEVICE) / 1e9, 1)
    for dtype in measure.DTYPES:
        header[f"matrix_{dtype}_tflop_s"] = round(measure.matrix_rate(DEVICE, dtype) / 1e12, 3)
    request.config.stash[RECORD] = record.Record(request.config.option.out, header)
    return request.config.stash[RECORD]


@pytest.fixture
def in_time(request, results):
    """in_time(case): skip it if the time budget is used up."""

    def in_time(case):
        if time.monotonic() > request.config.stash[DEADLINE]:
            results.stop(f"the time budget was used up before {case.kind} {case}")
            pytest.skip("the time budget was used up")

    return in_time


@pytest.fixture
def bench(request, benchmark, results, in_time):
    """bench(case, …): the gate, then the race, then the row, which is written."""
    deadline = request.config.stash[DEADLINE]

    def bench(case, *, gate, contenders, floor, together, seconds, calls=1):
        """``gate()`` asserts that ours is right; ``floor(timings)`` is the least time, seconds."""
        in_time(case)

        def add(timings):
            results.add(record.row(case.kind, str(case), timings, floor(timings)))

        seconds = 0 if request.config.option.tiny else seconds
        options = {"seconds": seconds, "calls": calls, "deadline": deadline}
        try:
            gate()
            if not benchmark.enabled:
                pytest.skip("right, and not timed with --benchmark-disable")
            race = measure.Race(benchmark, contenders, DEVICE, **options)
            (race.together if together else race.alone)(add)
        except (AssertionError, RuntimeError) as error:
            results.add(record.failure(case.kind, str(case), error))
            raise

    return bench


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter, config):
    """Print the table last, also where pytest-benchmark raises because something became slower."""
    try:
        return (yield)
    finally:
        results = config.stash.get(RECORD, None)
        if results and results.rows:
            terminalreporter.section("bitkern benchmarks")
            terminalreporter.write_line(record.table(results.content()))
