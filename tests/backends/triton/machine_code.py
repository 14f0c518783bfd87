"""Registers, spills and the memory traffic of loops, read from a cubin's machine code."""

import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

from tests.process import run

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Of a multiprocessor: threads, KB of shared memory. All have 65536 registers.
MULTIPROCESSORS = {75: (1024, 64), 80: (2048, 164), 86: (1536, 100), 89: (1536, 100)}
MULTIPROCESSORS |= {90: (2048, 228), 100: (2048, 228), 120: (1536, 100)}


class Loop(NamedTuple):
    """An innermost loop that loads from global memory, or all of a kernel that has none."""

    repeats: bool
    loads: int  # of 16 bytes, of which
    outstanding: int  # so many are at most under way in a thread
    copies: int  # of 16 bytes into shared memory, asynchronous
    narrow: int  # loads and copies of less
    shuffles: int
    divisions: int  # instructions that only divisions of integers have
    instructions: int

    @property
    def waits(self) -> bool:
        """A load is used before all of them were issued."""
        return self.outstanding < self.loads


def _dump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return run(CUOBJDUMP, what, file.name).stdout


def registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """Return registers of a thread and bytes of spills: in our kernels, all of a stack frame."""
    text = _dump(cubin, "--dump-resource-usage")
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups()
    registers, stack, local = map(int, numbers)
    return registers, stack + local


def programs_per_multiprocessor(capability: int, registers: int, warps: int, shared: int) -> int:
    threads, shared_kb = MULTIPROCESSORS[capability]
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = shared_kb * 1024 // (shared + 1024)
    return min(by_registers, threads // (32 * warps), by_shared, 32)


def instructions(cubin: bytes) -> list[tuple[int, str]]:
    """Return instructions as (address, text without predicate)."""
    lines = _dump(cubin, "--dump-sass").splitlines()
    found = (re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", line) for line in lines)
    return [(int(m[1], 16), re.sub(r"^@!?U?P\d+\s+", "", m[2])) for m in found if m]


def _bodies(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """Return the (first, last) addresses of the innermost loops with loads."""
    bodies = []
    for address, text in code:
        target = re.match(r"BRA(?:\.\S+)?\s+.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            bodies.append((int(target[1], 16), address))
    loads = [address for address, text in code if text.startswith("LDG")]
    bodies = [b for b in bodies if any(b[0] <= load <= b[1] for load in loads)]
    inner = [b for b in bodies if not any(b != c and b[0] <= c[0] and c[1] <= b[1] for c in bodies)]
    return inner


def _loop(code: list[str], repeats: bool) -> Loop:
    under_way: list[range] = []
    loads = outstanding = copies = narrow = 0
    for text in code:
        # All but the first operand are read, of a store that one too.
        stores = text.startswith(("ST", "RED"))
        read = text if stores else text.partition(",")[2]
        used = {int(number) for number in re.findall(r"\bR(\d+)\b", read)}
        under_way = [registers for registers in under_way if not used & set(registers)]
        load = re.match(r"LDG\.E\.(?:\S*\.)?(128|256)(?:\.\S+)?\s+R(\d+)", text)
        if load:
            loads += 1
            first = int(load[2])
            under_way.append(range(first, first + int(load[1]) // 32))
            outstanding = max(outstanding, len(under_way))
        copy = re.match(r"LDGSTS\.E\.(?:\S*\.)?128", text)
        copies += bool(copy)
        narrow += text.startswith(("LDG.", "LDGSTS")) and not load and not copy
    return Loop(
        repeats,
        loads,
        outstanding,
        copies,
        narrow,
        sum(text.startswith("SHFL") for text in code),
        sum(text.startswith("IMAD.HI") for text in code),
        len(code),
    )


def loops(code: list[tuple[int, str]]) -> list[Loop]:
    bodies = _bodies(code)
    everything = 0, code[-1][0]
    return [
        _loop([text for address, text in code if first <= address <= last], bool(bodies))
        for first, last in bodies or [everything]
    ]


def wide_accesses(code: list[tuple[int, str]]) -> int:
    """Count loads and asynchronous copies of 16 bytes, anywhere."""
    return sum(bool(re.match(r"LDG(STS)?\.E\.(\S*\.)?128", text)) for _, text in code)
