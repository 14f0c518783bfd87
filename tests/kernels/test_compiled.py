"""Every kernel compiles for several GPUs, none of them here, and keeps what it holds in registers.

``shipped.py`` compiles, in processes of its own. BITKERN_COMPILE_ALL=1 goes through all widths and
image sizes of BiT; else a selection. Triton's cache makes the second time fast.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.kernels import shipped

ROOT = Path(__file__).parents[2]
PROCESSES = os.cpu_count()


@pytest.fixture(scope="module")
def compiled():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.shipped"]
    processes = [
        subprocess.Popen(
            [*command, str(shard), str(PROCESSES)],
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


@pytest.mark.parametrize("target", shipped.TARGETS)
def test_no_spills(compiled, target):
    mine = [line for line in compiled if line["target"] == target]
    kernels = Counter(line["kernel"] for line in mine)
    assert set(kernels) == shipped.KERNELS
    print(target, dict(kernels), "at most", max(line["registers"] for line in mine), "registers")
    assert [line for line in mine if line["spills"]] == []


def test_accesses_are_wide(compiled):
    """In channels_last, whose channels are multiples of 8 in BiT: 16 bytes at a time."""
    maps = [
        line
        for line in compiled
        if line["target"] == "sm_90" and line["kernel"] in ("_forward", "_backward")
        if line["constants"][0] and line["constants"][1] == 8
    ]
    assert len(maps) > 50
    assert [line for line in maps if not line["vectors"]] == []
