"""Options and fixtures of ``pytest benchmarks/…``; the table is printed at the end."""

import time
from pathlib import Path

import pytest
import torch

from benchmarks import measure, record

RECORD, DEADLINE = pytest.StashKey(), pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("bitkern benchmarks")
    group.addoption("--out", type=Path, help="JSON file to write the rows to")
    group.addoption(
        "--budget", type=float, default=float("inf"), help="seconds, after which no row is begun"
    )
    group.addoption("--tiny", action="store_true", help="tiny shapes on any device: a dry run")


def pytest_configure(config):
    config.stash[DEADLINE] = time.monotonic() + config.option.budget


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        module = metafunc.module
        cases = module.TINY if metafunc.config.option.tiny else module.CASES
        ids = [f"{getattr(case, 'kind', 'op')}/{case}" for case in cases]
        metafunc.parametrize("case", cases, ids=ids)


@pytest.fixture(scope="session")
def results(request):
    devices = {item.module.DEVICE for item in request.session.items}
    device = "cuda" if "cuda" in devices else "cpu"
    torch.backends.cudnn.benchmark = True
    header = record.header(device)
    if device == "cpu":
        header["keeps_pages"] = measure.keep_pages()
    header["copy_gb_s"] = round(measure.copy_bandwidth(device) / 1e9, 1)
    for dtype in measure.DTYPES:
        header[f"matrix_{dtype}_tflop_s"] = round(measure.matrix_rate(device, dtype) / 1e12, 3)
    request.config.stash[RECORD] = record.Record(request.config.option.out, header)
    return request.config.stash[RECORD]


@pytest.fixture
def bench(request, benchmark, results):
    """bench(kind, case, device, …): the gate, then the race, then the row, which is written."""
    deadline, tiny = request.config.stash[DEADLINE], request.config.option.tiny

    def bench(kind, case, device, *, gate, contenders, floor, together, seconds, calls=1):
        """``gate()`` asserts that ours is right; ``floor(timings)`` is the least time, seconds."""
        if time.monotonic() > deadline:
            results.stop(f"the time budget was used up before {kind} {case}")
            pytest.skip("the time budget was used up")

        def add(timings):
            results.add(record.row(kind, str(case), timings, floor(timings)))

        seconds = 0 if tiny else seconds
        options = {"seconds": seconds, "calls": calls, "deadline": deadline}
        try:
            gate()
            race = measure.Race(benchmark, contenders, device, **options)
            (race.together if together else race.alone)(add)
        except (AssertionError, RuntimeError) as error:
            results.add(record.failure(kind, str(case), error))
            raise

    return bench


def pytest_terminal_summary(terminalreporter, config):
    results = config.stash.get(RECORD, None)
    if results and results.rows:
        terminalreporter.section("bitkern benchmarks")
        terminalreporter.write_line(record.table(results.content()))
