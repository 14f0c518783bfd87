"""Every kernel compiles for GPUs that are not here, by both Tritons, to machine code that can keep
memory busy: the installed one, and that of PyTorch 2.11, which lays tiles out differently.

``shipped.py`` compiles, in processes of its own: a few launches for one GPU, in the sweep many for
all, with BITKERN_COMPILE_ALL=1 those of every width and image size of BiT. Triton's cache makes the
second time fast.
"""

import json
import os
import subprocess
import sys

import pytest

from tests import ROOT
from tests.backends.triton import shipped, tritons

PROCESSES = os.cpu_count()
# For each copy of 16 bytes. benchmarks/cost.py reckons with 75; an exponential leaves memory the
# slower still, GELU's erf takes an H100 about as long as its memory does, by the same reckoning.
INSTRUCTIONS = {
    "relu": 75,
    "leaky_relu": 80,
    "hardswish": 110,
    "silu": 200,
    "mish": 250,
    "gelu": 320,
}


def compiled(extent, other_triton):
    environment = tritons.environment(other_triton) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.backends.triton.shipped"]
    processes = [
        subprocess.Popen(
            [*command, extent, str(shard), str(PROCESSES)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for shard in range(PROCESSES)
    ]  # fmt: skip
    lines = []
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        lines += map(json.loads, out.splitlines())
    assert {line["kernel"] for line in lines} == shipped.KERNELS
    assert not other_triton or {line["triton"] for line in lines} == {"3.6.0"}
    return lines


@pytest.fixture(scope="module")
def few(other_triton):
    return compiled("few", other_triton)


@pytest.fixture(scope="module")
def many(other_triton):
    everything = os.environ.get("BITKERN_COMPILE_ALL") == "1"
    return compiled("all" if everything else "many", other_triton)


def faults(line):
    """Describe what would keep a kernel from using the memory's bandwidth."""
    if line["spills"]:
        yield f"spills {line['spills']} bytes"
    if line["target"] not in shipped.PROVEN or line["kernel"].endswith("_pointers"):
        return
    if line["warps_there"] < 16 and line["bytes_under_way"] < 32 << 10:
        yield f"{line['warps_there']} warps on a multiprocessor, {line['bytes_under_way']} bytes"
    act = next((act for act in INSTRUCTIONS if act in line["constants"]), "relu")
    instructions = INSTRUCTIONS[act]
    for loop in line["loops"]:
        if loop["repeats"] and loop["shuffles"]:
            yield f"{loop['shuffles']} shuffles in a loop"
        if loop["repeats"] and loop["divisions"]:
            yield f"{loop['divisions']} instructions of integer divisions in a loop"
        if loop["instructions"] > instructions * loop["copies"] > 0:
            yield f"{loop['instructions']} instructions for {loop['copies']} copies in a loop"
        if loop["repeats"] and loop["outstanding"] < loop["loads"]:
            yield f"waits for load {loop['outstanding']} of {loop['loads']} in a loop"


def assert_sound(lines):
    found = {}
    for line in lines:
        for fault in faults(line):
            launch = (
                line["target"],
                line["kernel"],
                *line["types"][:2],
                *map(str, line["constants"]),
            )
            found[launch] = fault
    assert not found


def test_machine_code_of_a_few(few):
    assert_sound(few)


@pytest.mark.sweep
def test_machine_code(many):
    assert_sound(many)


def test_accesses_are_wide(few):
    """Accesses take 16 bytes in channels_last, where BiT's channels are multiples of 8."""
    maps = [
        line
        for line in few
        if line["kernel"] in shipped.GROUP_NORM_ACT and line["constants"][:2] == [True, 8]
    ]
    assert len(maps) > 8
    for line in maps:
        for loop in line["loops"]:
            assert loop["loads"] or loop["copies"]
            assert not (loop["repeats"] and loop["narrow"])


def test_alignment_is_claimed_of_what_is_aligned(few):
    """The tile says whether addresses from a table are claimed to be aligned."""
    tables = [line for line in few if line["kernel"].endswith("ward_all")]
    aligned = {bool(line["claims"]) for line in tables if len(line["constants"][-1]) > 1}
    unaligned = {bool(line["claims"]) for line in tables if len(line["constants"][-1]) == 1}
    assert (aligned, unaligned) == ({True}, {False})
    assert all(line["wide"] >= 16 for line in tables if line["claims"])


def test_faults_are_found():
    """The criteria reject what 559d16e compiled to under Triton 3.6."""
    loop = {"repeats": True, "loads": 4, "outstanding": 1, "copies": 0, "narrow": 0}
    loop |= {"shuffles": 128, "divisions": 2, "instructions": 493}
    line = {"target": "sm_90", "kernel": "group_norm_act_forward_whole", "spills": 4}
    line |= {"constants": [], "warps_there": 8, "bytes_under_way": 4 << 10, "loops": [loop]}
    assert len(list(faults(line))) == 5
