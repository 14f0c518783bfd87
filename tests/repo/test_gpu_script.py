"""Run all of benchmarks/gpu.sh without a GPU; it continues whatever fails."""

import json
import re
import sys

import pytest

from tests import ROOT
from tests.process import python, run

SCRIPT = ROOT / "benchmarks/gpu.sh"

STUB = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$*" in
  *xdist*) exit 1 ;;
  *setup.py*) exit 1 ;;
  *"-m gpu"*) exit 5 ;;
  *bench_ops*) echo boom; exit 3 ;;
  *benchmarks.record*) echo the table ;;
esac
"""


def test_gpu_script_goes_on_after_a_failure_and_prints_the_table_last(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    calls = tmp_path / "calls"
    environment = {"PYTHON": str(stub), "CALLS": str(calls)}
    done = run(SCRIPT, "full", tmp_path / "out", "--tiny", code=1, **environment)
    lines = done.stdout.splitlines()
    assert lines[-1] == "the table"
    assert any(line.startswith("build: failed with status 1") for line in lines)
    assert "tests: no tests" in lines and "boom" in lines
    assert any(line.startswith("models: done") for line in lines)
    called = calls.read_text().splitlines()[1:]  # the first asks for pytest-xdist
    assert [call.split()[0] for call in called] == ["setup.py", "-m", "-m", "-m", "-m", "-m"]
    for call, name in zip(called[2:4], ("ops", "models"), strict=True):
        assert f"bench_{name}.py --out {tmp_path}/out/{name}.json --full --budget" in call
        assert call.endswith("--tiny")
    assert "--tiny" not in called[1]


def test_gpu_script_stays_under_nine_minutes():
    script = SCRIPT.read_text()
    steps = re.findall(r"^  (\w+)\)\n(.*?)\n    ;;", script, re.M | re.S)
    assert [name for name, _ in steps] == ["kernels", "sweep", "full", "sanitize"]
    for name, body in steps:
        limits = [int(s) for s in re.findall(r'(?:section|gpu_tests) (?:"[^"]*"|\w+) (\d+)', body)]
        settings = body.count('"--')  # of the loop of the sweep
        assert 0 < sum(limits) + max(settings - 1, 0) * limits[0] <= 530, name


def test_gpu_script_names_its_steps():
    assert "kernels|sweep|full|sanitize" in run(SCRIPT, "all", "out", code=2, cwd="/tmp").stderr


@pytest.mark.sweep
@pytest.mark.parametrize("step", ["kernels", "sweep", "sanitize"])
def test_gpu_script_runs_without_a_gpu(step, tmp_path):
    """The test below and ``pytest benchmarks/ --tiny`` cover the step "full"."""
    stub = tmp_path / "python"  # all but the build, and numbers that the interpreter does not know
    left_out = '*setup.py*|*"--stages "[24]*|*"--maxnreg 255"*'
    rest = f'exec {sys.executable} "$@"'
    stub.write_text(f'#!/bin/sh\ncase "$*" in {left_out}) ;; *) {rest} ;; esac\n')
    stub.chmod(0o755)
    run(SCRIPT, step, tmp_path, "--tiny", PYTHON=str(stub))
    if step == "kernels":
        lines = [json.loads(line) for line in open(tmp_path / "kernels.jsonl")]
        names = {line.get("kernel") for line in lines}
        assert "group_norm_act_forward_on_chip" in names
        assert "weight_standardize_backward_all" in names


def test_profile_of_a_step(tmp_path):
    assert "as a graph" in python("-m", "benchmarks.step", tmp_path, "--tiny").stdout
    assert "aten::convolution" in (tmp_path / "profile.txt").read_text()


def test_gpu_tests_need_no_optional_packages(tmp_path):
    """A machine with a GPU may lack such packages, and one failed import stops all tests."""
    script = SCRIPT.read_text()
    named = re.search(r"^with_gpu_tests=\((.*)\)$", script, re.M)[1]
    files = run("bash", "-c", f"echo {named}").stdout
    for package in ("datasets", "diffusers", "webdataset", "timm", "transformers", "monai"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('not here')\n")
    command = ["-m", "pytest", "-q", "--collect-only", "-m", "gpu", "-n", "0", *files.split()]
    done = python(*command, PYTHONPATH=str(tmp_path))
    for path in (ROOT / "tests").rglob("test_*.py"):
        if re.search(r"mark\.gpu$", path.read_text(), re.M):
            assert str(path.relative_to(ROOT)) in done.stdout
