"""PTX, as Triton writes it: a kernel's parameters and instructions."""

import re
from typing import NamedTuple

SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1}
SIZES |= {f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (16, 32, 64)}
SIZES |= {"bf16": 2, "bf16x2": 4, "f16x2": 4, "f32x2": 8}

_PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+(?:\.ptr\s+\.\w+\s+\.align\s+\d+\s+)?(\w+)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%[a-z]+)<")
_LINE = re.compile(r"\s*\.loc\b[^/]*(?://\s*(\w+\.py:\d+))?")
_GUARDED = re.compile(r"@(!?)(%\w+)\s+(.*)")


class Instruction(NamedTuple):
    opcode: str  # with its modifiers
    operands: tuple[str, ...]
    guard: str | None  # the predicate without which it does nothing
    negated: bool
    text: str
    source: str  # file and line of what it was compiled from

    def __str__(self) -> str:
        return f"`{self.text}` ({self.source})"


class Kernel(NamedTuple):
    name: str
    parameters: list[tuple[str, int]]  # name, bytes
    threads: int
    code: list[Instruction]
    labels: dict[str, int]  # of the instruction that follows
    tables: dict[str, list[str]]  # labels that a branch by an index may go to
    widths: dict[str, int]  # bytes of registers, by what their names begin with


def width(register: str, kernel: Kernel) -> int:
    """Return the bytes of a register."""
    return kernel.widths[register.rstrip("0123456789")]


def split_operands(text: str) -> tuple[str, ...]:
    """Split at the commas that are not within brackets."""
    return tuple(part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip())


def members(operand: str) -> list[str]:
    """List the members of ``{a, b}``, or of ``a`` alone."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def parse(text: str) -> Kernel:
    """Parse the only kernel of a module."""
    (entry,) = re.finditer(r"\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{(.*?)^\}", text, re.S | re.M)
    name, parameters, directives, body = entry.groups()
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", directives)
    kernel = Kernel(
        name,
        [(name, SIZES[kind]) for kind, name in _PARAMETER.findall(parameters)],
        int(threads[1]),
        [],
        {},
        {},
        {name: SIZES[kind] for kind, name in _REGISTERS.findall(body)},
    )
    source, pending = "?", ""
    for line in body.splitlines():
        location = _LINE.match(line)
        if location:
            source = location[1] or source
            continue
        line = line.partition("//")[0].strip()
        label = re.fullmatch(r"([$\w]+):", line)
        if label:
            kernel.labels[label[1]] = len(kernel.code)
        elif line and not (line.startswith((".reg", ".pragma")) and not pending):
            pending = f"{pending} {line}".strip()
            *done, pending = (part.strip() for part in pending.split(";"))
            for statement in done:
                table = re.fullmatch(r"([$\w]+):\s*\.branchtargets(.*)", statement)
                if table:
                    kernel.tables[table[1]] = list(split_operands(table[2]))
                else:
                    kernel.code.append(_instruction(" ".join(statement.split()), source))
    if pending:
        raise ValueError(f"PTX: expected instructions that end with a semicolon, got {pending!r}")
    return kernel


def _instruction(text: str, source: str) -> Instruction:
    guarded = _GUARDED.fullmatch(text)
    negated, guard, rest = guarded.groups() if guarded else ("", None, text)
    opcode, _, operands = rest.partition(" ")
    return Instruction(opcode, split_operands(operands), guard, bool(negated), text, source)
