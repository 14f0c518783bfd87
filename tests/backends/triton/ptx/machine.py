"""A machine for PTX: the threads of all programs of a launch at once, a NumPy array per register.

Programs that part ways at a branch go on apart. Threads of one program that do take turns: those
that are furthest behind run until the others are met. A register that holds the same value in all
threads may have one element.

It does not know of time, streams and caches, and what ptxas makes of a program.
"""

from collections.abc import Callable
from typing import NamedTuple, NoReturn

import numpy as np

from tests.backends.triton.ptx import access
from tests.backends.triton.ptx.arithmetic import UNSIGNED, arithmetic
from tests.backends.triton.ptx.memory import WARP, Clock, Fault, Global, Shared
from tests.backends.triton.ptx.operands import UNWRITTEN, expect, source
from tests.backends.triton.ptx.parser import SIZES, Instruction, Kernel, members, padded


class LaunchFault(AssertionError):
    """A fault of a launch, with kernel, program, thread, instruction and source line."""


class Group:
    """Programs at the same instruction, and their threads' registers."""

    def __init__(self, launch: "Launch", programs: np.ndarray):
        self.launch, self.programs = launch, programs
        self.registers: dict[str, np.ndarray] = {}
        self.at = 0
        self.clock = Clock()
        self.copies: list[list[access.Copy]] = [[]]  # the last group is not yet committed
        self.active: np.ndarray | None = None  # threads, where not all
        self.waiting: dict[int, np.ndarray] = {}  # others, by instruction
        self.blocked: set[int] = set()  # those of them where threads wait for each other
        self._number()

    def _number(self):
        threads = self.launch.kernel.threads
        self.tid = np.tile(np.arange(threads, dtype=np.uint32), len(self.programs))
        self.ctaid = np.repeat(self.programs.astype(np.uint32), threads)
        self.threads = self.ctaid.astype(np.int64) * threads + self.tid

    def part(self, keep: np.ndarray, at: int) -> "Group":
        """Split off some of the programs, to continue at an instruction."""
        new = Group(self.launch, self.programs[keep])
        lanes = np.repeat(keep, self.launch.kernel.threads)
        new.registers = {
            name: value if len(value) == 1 else value[lanes]
            for name, value in self.registers.items()
        }
        new.at, new.clock = at, self.clock
        new.copies = [[_part(copy, new.threads) for copy in group] for group in self.copies]
        return new

    def whole(self, value: np.ndarray) -> np.ndarray:
        return np.broadcast_to(value, (len(self.tid),))

    def lanes(self, mask: np.ndarray | None) -> np.ndarray:
        return np.arange(len(self.tid)) if mask is None else np.flatnonzero(mask)

    def write(self, register: str, value: np.ndarray, mask: np.ndarray | None) -> None:
        if register == "_":
            return
        if mask is not None:
            unwritten = value.dtype.type(UNWRITTEN[value.dtype.itemsize])
            value = np.where(mask, value, self.registers.get(register, unwritten))
        self.registers[register] = value

    def meet(self) -> None:
        """Run the threads that are furthest behind."""
        if self.at in self.waiting:
            self.active = self.active | self.waiting.pop(self.at)
            self.blocked.discard(self.at)
            if not self.waiting and self.active.all():
                self.active = None
        elif self.ready() and min(self.ready()) < self.at:
            self.waiting[self.at] = self.active
            self.resume()

    def ready(self) -> set[int]:
        return self.waiting.keys() - self.blocked

    def resume(self) -> None:
        """Resume other threads, first those that wait for nobody."""
        self.at = min(self.ready() or self.waiting)
        self.active = self.waiting.pop(self.at)
        self.blocked.discard(self.at)


def _part(copy: access.Copy, threads: np.ndarray) -> access.Copy:
    keep = np.isin(copy.threads, threads)
    fields = (copy.threads[keep], copy.to[keep], copy.source[keep], copy.nbytes, copy.reads[keep])
    return access.Copy(*fields)


Step = Callable[[Group, np.ndarray | None], "list[Group] | None"]


def decode(instruction: Instruction, kernel: Kernel) -> Step:
    """Return the step of an instruction; raises UnknownOpcode."""
    name = instruction.opcode.partition(".")[0]
    if name in SPECIAL:
        return SPECIAL[name](instruction, kernel)
    kinds, function = arithmetic(instruction.opcode)
    to, *operands = instruction.operands
    pairs = zip(operands, kinds, strict=True)
    sources = [source(operand, kind, relaxed=name == "cvt") for operand, kind in pairs]

    def compute(group, mask):
        group.write(to, function(*[read(group) for read in sources]), mask)

    def compute_two(group, mask):
        values = function(*[read(group) for read in sources])
        for register, value in zip(to.split("|"), values, strict=True):
            group.write(register, value, mask)

    return compute_two if "|" in to else compute


def _move(instruction, kernel):
    kind = instruction.opcode.removeprefix("mov.")
    to, value = instruction.operands
    if to.startswith("{"):
        parts = members(to)
        read, part = source(value, kind), UNSIGNED[SIZES[kind] // len(parts)]

        def unpack(group, mask):
            pieces = np.ascontiguousarray(read(group)).view(part).reshape(-1, len(parts))
            for register, piece in zip(parts, pieces.T, strict=True):
                group.write(register, np.ascontiguousarray(piece), mask)

        return unpack
    if value.startswith("{"):
        parts = members(value)
        reads = [source(p, f"b{8 * SIZES[kind] // len(parts)}") for p in parts]

        def pack(group, mask):
            pieces = np.stack(np.broadcast_arrays(*(f(group) for f in reads)), 1)
            group.write(to, np.ascontiguousarray(pieces).view(UNSIGNED[SIZES[kind]])[:, 0], mask)

        return pack
    read = source(value, kind)
    return lambda group, mask: group.write(to, read(group), mask)


def _branch(instruction, kernel):
    expect(instruction.opcode in ("bra", "bra.uni"), instruction)
    target = kernel.labels[instruction.operands[0]]

    def branch(group, mask):
        if mask is None or group.active is not None and (mask == group.active).all():
            group.at = target
            return None
        if group.active is None:
            of_programs = mask.reshape(len(group.programs), -1)
            all_go, none_go = of_programs.all(1), ~of_programs.any(1)
            if (all_go | none_go).all():
                return [group.part(all_go, target), group.part(none_go, group.at)]
        stay = ~mask if group.active is None else group.active & ~mask
        _send(group, target, mask)
        group.active = stay
        return None

    return branch


def _send(group, target, mask):
    group.waiting[target] = group.waiting.get(target, False) | mask
    group.blocked.discard(target)


def _branch_by_index(instruction, kernel):
    expect(instruction.opcode == "brx.idx", instruction)
    index, table = instruction.operands
    index, targets = source(index, "u32"), [kernel.labels[t] for t in kernel.tables[table]]

    def branch(group, mask):
        expect(mask is None, instruction)
        chosen = group.whole(index(group)).reshape(len(group.programs), -1)
        expect((chosen == chosen[:, :1]).all(), instruction)
        return [group.part(chosen[:, 0] == i, targets[i]) for i in np.unique(chosen[:, 0])]

    return branch


def _return(instruction, kernel):
    expect(instruction.opcode == "ret", instruction)

    def leave(group, mask):
        if mask is not group.active:
            raise Fault(group.lanes(mask)[0], "some threads leave")
        if not group.waiting:
            return []
        group.resume()
        return None

    return leave


def _barrier(instruction, kernel):
    """Make threads wait for those of their program, or of their warp."""
    expect(instruction.opcode in ("bar.sync", "bar.warp.sync"), instruction)
    of_warp = instruction.opcode == "bar.warp.sync"
    expect(instruction.operands == (("-1",) if of_warp else ("0",)), instruction)
    size = WARP if of_warp else kernel.threads

    def barrier(group, mask):
        access.check_together(mask, size, "barrier")
        now = group.clock.now + 1
        group.clock = Clock(now, group.clock.program if of_warp else now, now)

    return barrier


SPECIAL = access.STEPS | {
    "bra": _branch, "brx": _branch_by_index, "ret": _return, "bar": _barrier, "mov": _move,
}  # fmt: skip


class Program(NamedTuple):
    kernel: Kernel
    steps: list[Step]

    @classmethod
    def of(cls, kernel: Kernel) -> "Program":
        return cls(kernel, [decode(instruction, kernel) for instruction in kernel.code])


class Launch:
    """``programs`` of a kernel, with the bytes of each argument and the tensors, (address, bytes),
    that they may touch."""

    def __init__(self, program, programs, shared, arguments, tensors):
        self.program, self.kernel = program, program.kernel
        assert [len(a) for a in arguments] == [size for _, size in self.kernel.parameters]
        arguments = b"".join(a.ljust(padded(len(a)), b"\xff") for a in arguments)
        self.arguments = np.frombuffer(arguments, np.uint8)
        self.memory = Global(tensors, self.kernel.threads)
        self.shared = Shared(self.kernel.shared + shared, programs, self.kernel.threads)
        self.instructions = 0
        groups = [Group(self, np.arange(programs))]
        with np.errstate(all="ignore"):
            while groups:
                groups += self._run(groups.pop())
        self.memory.write_back()

    def _run(self, group: Group) -> list[Group]:
        """Run programs until they leave, or diverge into several groups."""
        steps, code = self.program.steps, self.kernel.code
        while True:
            if group.waiting:
                group.meet()
            instruction, mask = code[group.at], group.active
            step = steps[group.at]
            group.at += 1
            self.instructions += 1
            if instruction.guard is not None:
                holds = group.registers[instruction.guard]
                holds = ~holds if instruction.negated else holds
                if len(holds) > 1 or mask is not None:
                    holds = group.whole(holds)
                    mask = holds if mask is None else mask & holds
                    if not mask.any():
                        continue
                    if group.active is None and mask.all():
                        mask = None
                elif not holds[0]:
                    continue
            try:
                found = step(group, mask)
            except access.Apart as fault:  # threads wait for those that are elsewhere
                group.at -= 1
                if group.ready():
                    group.waiting[group.at] = group.active
                    group.blocked.add(group.at)
                    group.resume()
                    continue
                self._report(group, fault, instruction)
            except Fault as fault:
                self._report(group, fault, instruction)
            if found is not None:
                return found

    def _report(self, group: Group, fault: Fault, instruction: Instruction) -> NoReturn:
        program, thread = divmod(int(group.threads[fault.lane]), self.kernel.threads)
        where = f"{self.kernel.name}, program {program}, thread {thread}"
        raise LaunchFault(f"{where}: {fault.what}: {instruction}")
