"""Instructions that reach memory or other threads."""

import re
from typing import NamedTuple

import numpy as np

from tests.backends.triton.ptx.arithmetic import UNSIGNED, UnknownOpcode
from tests.backends.triton.ptx.memory import FILL, WARP, Fault, check_inside
from tests.backends.triton.ptx.operands import expect, source
from tests.backends.triton.ptx.parser import SIZES, members, width


class Copy(NamedTuple):
    """An asynchronous copy in flight, for lanes with these threads."""

    threads: np.ndarray
    to: np.ndarray  # of shared memory
    source: np.ndarray  # of global memory
    nbytes: int
    reads: np.ndarray  # zeros are copied where it does not


class Apart(Fault):
    """Some of the threads that must do something together did not."""


def check_together(mask, size, what):
    """Raise Apart unless all of ``size`` threads do it, or none."""
    if mask is None:
        return
    parts = mask.reshape(-1, size)
    apart = parts.any(1) & ~parts.all(1)
    if apart.any():
        part = np.flatnonzero(apart)[0]
        lane = part * size + np.flatnonzero(parts[part])[0]
        raise Apart(lane, f"divergent {what}: {parts[part].sum()} of {size} threads")


def _address(operand, kernel):
    """Return a function from a group to the addresses of all lanes, as int64."""
    uniform = _uniform_address(operand, kernel)
    return lambda group: group.whole(uniform(group))


def _uniform_address(operand, kernel):
    """Return a function to the addresses, or to one where it is the same for all lanes."""
    found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
    size = width(found[1], kernel) if found[1].startswith("%") else 8
    base, offset = source(found[1], f"u{8 * size}"), np.int64(found[2] or 0)
    return lambda group: base(group).astype(np.int64) + offset


def _shape(opcode, *, stores):
    """Parse the space, the number of registers and the type of each."""
    name = "st" if stores else "ld"
    found = re.fullmatch(rf"{name}\.(\w+)(?:::cta)?(?:\.v([24]))?\.([busf]\d+)", opcode)
    if not found:
        raise UnknownOpcode(opcode)
    return found[1], int(found[2] or 1), found[3]


def _load(instruction, kernel):
    space, count, kind = _shape(instruction.opcode, stores=False)
    size, registers = SIZES[kind], members(instruction.operands[0])
    expect(space in ("global", "shared", "param") and len(registers) == count, instruction)
    # A wider register is filled up with zeros, or with the sign.
    dtypes = [UNSIGNED[width(register, kernel)] for register in registers]
    part = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{size}")
    if space == "param":
        place = _uniform_address(instruction.operands[1], kernel)

        def parameter(group, mask):
            at, arguments = place(group), group.launch.arguments
            at = at if len(at) == 1 or mask is None else np.where(mask, at, 0)
            check_inside(at, size * count, len(arguments), "the parameters")
            for i, (register, dtype) in enumerate(zip(registers, dtypes, strict=True)):
                value = arguments.view(part)[at // size + i]
                group.write(register, value.astype(dtype), mask)

        return parameter
    address = _address(instruction.operands[1], kernel)

    def load(group, mask):
        lanes = group.lanes(mask)
        got = _fetch(group, space, lanes, address(group)[lanes], size, count)
        for i, (register, dtype) in enumerate(zip(registers, dtypes, strict=True)):
            value = np.zeros(len(group.tid), dtype)
            value[lanes] = np.ascontiguousarray(got[:, i]).view(part).astype(dtype)
            group.write(register, value, mask)

    return load


def _fetch(group, space, lanes, addresses, size, count):
    threads = group.threads[lanes]
    with _lanes(lanes):
        memory, at = _locate(group, space, addresses, size * count, threads, reading=True)
        return memory.load(at, size, count, threads, group.clock)


def _locate(group, space, addresses, size, threads, reading):
    """Return the memory of a space and the places of addresses in it; count global accesses."""
    if space == "shared":
        return group.launch.shared, group.launch.shared.locate(addresses, size, threads)
    memory = group.launch.memory
    at, tensor = memory.locate(addresses, size, threads)
    memory.count(reading, tensor, size)
    return memory, at


class _lanes:
    """Context manager that maps a fault in a selection of lanes to the lane itself."""

    def __init__(self, lanes):
        self.lanes = lanes

    def __enter__(self):
        return self

    def __exit__(self, kind, fault, _):
        if kind and issubclass(kind, Fault):
            fault.lane = int(self.lanes[fault.lane])


def _store(instruction, kernel):
    space, count, kind = _shape(instruction.opcode, stores=True)
    expect(space in ("global", "shared"), instruction)
    size = SIZES[kind]
    sources = [source(r, f"b{8 * size}") for r in members(instruction.operands[1])]
    expect(len(sources) == count, instruction)
    address = _address(instruction.operands[0], kernel)

    def store(group, mask):
        lanes = group.lanes(mask)
        values = np.stack([group.whole(read(group))[lanes] for read in sources], 1)
        threads, addresses = group.threads[lanes], address(group)[lanes]
        with _lanes(lanes):
            memory, at = _locate(group, space, addresses, size * count, threads, reading=False)
            memory.store(at, values, size, threads, group.clock)

    return store


def _asynchronous(instruction, kernel):
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "cp.async.commit_group":
        return _commit
    if opcode == "cp.async.wait_group":
        under_way = int(operands[0], 0)

        def wait(group, mask):
            check_together(mask, kernel.threads, "wait")
            *committed, last = group.copies
            done = committed[: len(committed) - under_way]
            for copy in (copy for copies in done for copy in copies):
                _finish(group, copy)
            group.copies = [*committed[len(done) :], last]

        return wait
    expect(re.fullmatch(r"cp\.async\.c[ag]\.shared\.global", opcode), instruction)
    to, origin = _address(operands[0], kernel), _address(operands[1], kernel)
    nbytes = int(operands[2], 0)
    reads = source(operands[3] if len(operands) > 3 else operands[2], "u32")

    def copy(group, mask):
        lanes = group.lanes(mask)
        wanted = group.whole(reads(group))[lanes]
        expect(np.isin(wanted, (0, nbytes)).all(), instruction)
        _begin(group, lanes, to(group)[lanes], origin(group)[lanes], nbytes, wanted > 0)

    return copy


def _begin(group, lanes, to, origin, nbytes, reads):
    threads, shared, memory = group.threads[lanes], group.launch.shared, group.launch.memory
    with _lanes(lanes):
        to = shared.locate(to, nbytes, threads)
        nothing = np.full((len(lanes), nbytes // 4), FILL, np.uint32)
        shared.store(to, nothing, 4, threads, group.clock, copying=True)
    with _lanes(lanes[reads]):
        at, tensor = memory.locate(origin[reads], nbytes, threads[reads])
        memory.count(True, tensor, nbytes)
        memory.load(at, 4, nbytes // 4, threads[reads], group.clock)
    index = np.zeros(len(lanes), np.int64)
    index[reads] = at
    group.copies[-1] = [*group.copies[-1], Copy(threads, to, index, nbytes, reads)]


def _commit(group, mask):
    check_together(mask, group.launch.kernel.threads, "commit")
    group.copies = [*group.copies, []]


def _finish(group, copy):
    """Perform a copy, as late as its wait allows."""
    values = np.zeros((len(copy.to), copy.nbytes // 4), np.uint32)
    memory = group.launch.memory
    values[copy.reads] = memory.peek(copy.source[copy.reads], 4, copy.nbytes // 4)
    group.launch.shared.store(copy.to, values, 4, copy.threads, group.clock)


def _shuffle(instruction, kernel):
    found = re.fullmatch(r"shfl\.sync\.(bfly|idx)\.b32", instruction.opcode)
    expect(found, instruction)
    butterfly = found[1] == "bfly"
    to, *operands = instruction.operands
    to, _, inside = to.partition("|")
    value, other, last, takes_part = (source(operand, "b32") for operand in operands)

    def shuffle(group, mask):
        check_together(mask, WARP, "shuffle")
        whole_warp = (last(group) == WARP - 1).all() and (takes_part(group) == 0xFFFFFFFF).all()
        expect(whole_warp, instruction)
        if inside:
            group.write(inside, np.full(1, True), mask)
        values = group.whole(value(group)).reshape(-1, WARP)
        chosen = group.whole(other(group)).reshape(-1, WARP).astype(np.int64)
        lane = np.arange(WARP) ^ chosen if butterfly else chosen % WARP
        group.write(to, np.take_along_axis(values, lane, 1).reshape(-1), mask)

    return shuffle


def _matrix(opcode):
    """Parse the number of 8x8 matrices of 16 bits, and whether they are transposed."""
    found = re.fullmatch(r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16",
                         opcode)  # fmt: skip
    if not found:
        raise UnknownOpcode(opcode)
    return int(found[1]), bool(found[2])


# Of matrix i the lanes from 8 i on have the addresses of its rows; lane t of a warp has two numbers
# of row t // 4 of each.
_ROW, _COLUMN = np.arange(WARP) // 4, 2 * (np.arange(WARP) % 4)


def _rows(group, address, count):
    """Return lanes, threads and addresses of the rows of all warps."""
    lanes = (np.arange(0, len(group.tid), WARP)[:, None] + np.arange(8 * count)).reshape(-1)
    threads = group.threads[lanes]
    with _lanes(lanes):
        return lanes, threads, group.launch.shared.locate(address(group)[lanes], 16, threads)


def _load_matrix(instruction, kernel):
    count, transposed = _matrix(instruction.opcode)
    registers, address = members(instruction.operands[0]), _address(instruction.operands[1], kernel)

    def load(group, mask):
        check_together(mask, len(group.tid), "ldmatrix")
        lanes, threads, at = _rows(group, address, count)
        with _lanes(lanes):
            rows = group.launch.shared.load(at, 2, 8, threads, group.clock)
        matrices = rows.reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        for i, register in enumerate(registers):
            pair = [matrices[:, i, _ROW, _COLUMN + j].reshape(-1) for j in (0, 1)]
            group.write(register, np.stack(pair, 1).view(np.uint32)[:, 0], mask)

    return load


def _store_matrix(instruction, kernel):
    count, transposed = _matrix(instruction.opcode)
    address = _address(instruction.operands[0], kernel)
    sources = [source(r, "b32") for r in members(instruction.operands[1])]

    def store(group, mask):
        check_together(mask, len(group.tid), "stmatrix")
        lanes, threads, at = _rows(group, address, count)
        matrices = np.empty((len(group.tid) // WARP, count, 8, 8), np.uint16)
        for i, read in enumerate(sources):
            pair = np.ascontiguousarray(group.whole(read(group))).view(np.uint16)
            pair = pair.reshape(-1, WARP, 2)
            for j in (0, 1):
                matrices[:, i, _ROW, _COLUMN + j] = pair[:, :, j]
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        with _lanes(lanes):
            rows = np.ascontiguousarray(matrices).reshape(-1, 8)
            group.launch.shared.store(at, rows, 2, threads, group.clock)

    return store


STEPS = {
    "ld": _load, "st": _store, "cp": _asynchronous, "shfl": _shuffle, "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix,
}  # fmt: skip
