"""PTX, as Triton and NVRTC write it: a kernel's parameters and instructions."""

import itertools
import re
from typing import NamedTuple

SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1}
SIZES |= {f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (16, 32, 64)}
SIZES |= {"bf16": 2, "bf16x2": 4, "f16x2": 4, "f32x2": 8}

_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+\.\w+\s+\.align\s+\d+\s+)?"
    r"(\w+)(?:\[(\d+)\])?"
)
_SHARED = re.compile(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d*)\]")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%[a-z]+)<")
_LINE = re.compile(r"\s*\.loc\s+\d+\s+(\d+)[^/]*(?://\s*(\w+\.py:\d+))?")
_GUARDED = re.compile(r"@(!?)(%\w+)\s+(.*)")


class Instruction(NamedTuple):
    opcode: str  # with its modifiers
    operands: tuple[str, ...]
    guard: str | None  # the predicate without which it does nothing
    negated: bool
    text: str
    source: str  # file and line of what it was compiled from, or the line alone

    def __str__(self) -> str:
        return f"`{self.text}` ({self.source})"


class Kernel(NamedTuple):
    name: str
    parameters: list[tuple[str, int]]  # name, bytes
    threads: int
    shared: int  # bytes that the module declares
    code: list[Instruction]
    labels: dict[str, int]  # of the instruction that follows
    tables: dict[str, list[str]]  # labels that a branch by an index may go to
    widths: dict[str, int]  # bytes of registers, by what their names begin with


def padded(size: int) -> int:
    """Return the bytes that variables take side by side."""
    return -(-size // 16) * 16


def _places(variables: list[tuple[str, int]]) -> dict[str, int]:
    ends = list(itertools.accumulate((padded(size) for _, size in variables), initial=0))
    return {name: start for (name, _), start in zip(variables, ends, strict=False)}


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
    shared = [(variable, int(size or 0)) for variable, size in _SHARED.findall(text)]
    kernel = Kernel(
        name,
        [(p, SIZES[kind] * int(n or 1)) for kind, p, n in _PARAMETER.findall(parameters)],
        int(threads[1]),
        sum(padded(size) for _, size in shared),
        [],
        {},
        {},
        {name: SIZES[kind] for kind, name in _REGISTERS.findall(body)},
    )
    symbols = _places(kernel.parameters) | _places(shared)
    body = re.sub(r"\{((?:[^{}]|\{[^{}]*\})*;)\s*\}", r"\1", body)  # braces around statements
    source, pending = "?", ""
    for line in body.splitlines():
        location = _LINE.match(line)
        if location:
            source = location[2] or f"line {location[1]}"
            continue
        line = line.partition("//")[0].strip()
        label = re.fullmatch(r"([$\w]+):", line)
        if label:
            kernel.labels[label[1]] = len(kernel.code)
        elif line and not (line.startswith((".reg", ".pragma", ".shared")) and not pending):
            pending = f"{pending} {line}".strip()
            *done, pending = (part.strip() for part in pending.split(";"))
            for statement in done:
                table = re.fullmatch(r"([$\w]+):\s*\.branchtargets(.*)", statement)
                if table:
                    kernel.tables[table[1]] = list(split_operands(table[2]))
                else:
                    kernel.code.append(_instruction(" ".join(statement.split()), source, symbols))
    if pending:
        raise ValueError(f"PTX: expected instructions that end with a semicolon, got {pending!r}")
    return kernel


def _instruction(text: str, source: str, symbols: dict[str, int]) -> Instruction:
    """Parse an instruction, with addresses in the place of symbols."""
    guarded = _GUARDED.fullmatch(text)
    negated, guard, rest = guarded.groups() if guarded else ("", None, text)
    opcode, _, operands = rest.partition(" ")
    operands = re.sub(r"(?<![%$.\w])\w+", lambda word: str(symbols.get(word[0], word[0])), operands)
    return Instruction(opcode, split_operands(operands), guard, bool(negated), text, source)
