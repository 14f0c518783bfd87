"""Every kernel compiles for several GPUs, none of them here, and keeps what it holds in registers.

``shipped.py`` compiles, in processes of its own: a few launches for one GPU, in the sweep many for
all, with BITKERN_COMPILE_ALL=1 those of every width and image size of BiT. Triton's cache makes the
second time fast.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import shipped

ROOT = Path(__file__).parents[2]
PROCESSES = os.cpu_count()
FORWARD_AND_BACKWARD = "group_norm_act_forward", "group_norm_act_backward"


def compiled(extent):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.shipped"]
    processes = [
        subprocess.Popen(
            [*command, extent, str(shard), str(PROCESSES)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for shard in range(PROCESSES)
    ]  # fmt: skip
    lines = []
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        lines += map(json.loads, out.splitlines())
    return lines


@pytest.fixture(scope="module")
def few():
    return compiled("few")


@pytest.fixture(scope="module")
def many():
    return compiled("all" if os.environ.get("BITKERN_COMPILE_ALL") == "1" else "many")


def assert_no_spills(lines):
    assert {line["kernel"] for line in lines} == shipped.KERNELS
    assert [line for line in lines if line["spills"]] == []


def test_no_spills_in_a_few(few):
    assert_no_spills(few)


@pytest.mark.sweep
@pytest.mark.parametrize("target", shipped.TARGETS)
def test_no_spills(many, target):
    assert_no_spills([line for line in many if line["target"] == target])


def test_accesses_are_wide(few):
    """In channels_last, whose channels are multiples of 8 in BiT: 16 bytes at a time."""
    maps = [
        line
        for line in few
        if line["target"] == "sm_90" and line["kernel"] in FORWARD_AND_BACKWARD
        if line["constants"][0] and line["constants"][1] == 8
    ]
    assert len(maps) > 10
    assert [line for line in maps if not line["vectors"]] == []
