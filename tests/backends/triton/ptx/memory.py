"""Global and shared memory, with the last access to each part: by which thread and when.

Two threads that touch the same place, one of them to write, must have a barrier between: one of
their program, or of their warp if they share it. Nothing orders threads of different programs.
"""

import ctypes
from typing import NamedTuple

import numpy as np

from tests.backends.triton.ptx.arithmetic import UNSIGNED
from tests.backends.triton.ptx.parser import padded

GRAIN = 2  # bytes for which one mark is kept: the smallest elements
WARP = 32
# A mark: time, how many have read, the thread; or the warp or the program, if it was several of it.
ONE, OF_A_WARP, OF_A_PROGRAM, OF_ALL = (np.int64(n) for n in range(4))
_TIME, _KIND = np.int64(32), np.int64(30)
_LOWER = np.int64((1 << 30) - 1)
FILL = 0xFF  # of memory that nobody wrote: NaN


class Fault(Exception):
    """An access that no kernel may make, and the index of the lane that made it."""

    def __init__(self, lane, what):
        super().__init__(what)
        self.lane, self.what = int(lane), what


class Clock(NamedTuple):
    """Time, counted in barriers."""

    now: int = 1
    program: int = 1  # at its last barrier
    warp: int = 1  # at its last barrier, or its program's


def _where(kind, number, threads):
    """Return the warp and the program of a mark; -1 for several."""
    warps = threads // WARP
    warp = np.where(kind == ONE, number // WARP, np.where(kind == OF_A_WARP, number, -1))
    program = np.where(kind == OF_A_PROGRAM, number, np.where(kind == OF_ALL, -1, warp // warps))
    return warp, program


class Space:
    def __init__(self, size: int, threads: int):
        self.bytes = np.full(padded(size) + 16, FILL, np.uint8)
        self.threads = threads  # of a program
        self.writers = np.zeros(len(self.bytes) // GRAIN, np.int64)
        self.readers = np.zeros_like(self.writers)
        self.copying = np.zeros(len(self.writers), bool)  # into it, and not yet waited for

    def _cells(self, at, size):
        return at[:, None] // GRAIN + np.arange(size // GRAIN)

    def _ordered(self, marks, threads, clock):
        """Return True where the marked accesses come before what ``threads`` do now."""
        time, kind, number = marks >> _TIME, (marks >> _KIND) & 3, marks & _LOWER
        warp, program = _where(kind, number, self.threads)
        itself = (kind == ONE) & (number == threads)
        same_warp = (warp == threads // WARP) & (time < clock.warp)
        return itself | (program == threads // self.threads) & ((time < clock.program) | same_warp)

    def _check(self, marks, threads, clock, what):
        if not marks.any():
            return
        bad = (marks != 0) & ~self._ordered(marks, threads, clock)
        if bad.any():
            lane = np.flatnonzero(bad.any(1))[0]
            mark = marks[lane][bad[lane]][0]
            kind, number = int(mark >> _KIND) & 3, int(mark & _LOWER)
            program, thread = divmod(number, self.threads)
            who = f"thread {thread} of program {program}" if kind == ONE else "other threads"
            raise Fault(lane, f"race: {who} {what} the same place, with no barrier between")

    def load(self, at, size, count, threads, clock):
        """Load [lanes, count] values of ``size`` bytes."""
        cells, threads = self._cells(at, size * count), threads[:, None]
        if self.copying.any() and self.copying[cells].any():
            lane = np.flatnonzero(self.copying[cells].any(1))[0]
            raise Fault(lane, "reads what an asynchronous copy brings, which nobody waited for")
        self._check(self.writers[cells], threads, clock, "wrote")
        self._note_readers(cells, threads, clock)
        return self.peek(at, size, count)

    def peek(self, at, size, count):
        return self.bytes.view(UNSIGNED[size])[at[:, None] // size + np.arange(count)]

    def _note_readers(self, cells, threads, clock):
        mine = np.broadcast_to(np.int64(clock.now) << _TIME | threads, cells.shape)
        before = self.readers[cells]
        self.readers[cells] = mine
        for marks in (before, self.readers[cells]):  # of other instructions, and of this one
            other = (marks != 0) & (marks != mine) & ~self._ordered(marks, threads, clock)
            if other.any():
                lane, column = np.nonzero(other)
                thread = threads[lane, 0]
                kind, number = (marks[other] >> _KIND) & 3, marks[other] & _LOWER
                warp, program = _where(kind, number, self.threads)
                merged = np.where(
                    program != thread // self.threads, OF_ALL << _KIND,
                    np.where(
                        warp != thread // WARP, OF_A_PROGRAM << _KIND | thread // self.threads,
                        OF_A_WARP << _KIND | thread // WARP,
                    ),
                )  # fmt: skip
                marked = np.int64(clock.now) << _TIME | merged
                np.maximum.at(self.readers, cells[lane, column], marked)

    def store(self, at, values, size, threads, clock, copying=False):
        """Store [lanes, count] values of ``size`` bytes."""
        count = values.shape[1]
        cells, threads = self._cells(at, size * count), threads[:, None]
        self._check(self.writers[cells], threads, clock, "wrote")
        self._check(self.readers[cells], threads, clock, "read")
        self.writers[cells] = np.int64(clock.now) << _TIME | threads
        self.readers[cells] = 0
        if copying or self.copying.any():
            self.copying[cells] = copying
        self.bytes.view(UNSIGNED[size])[at[:, None] // size + np.arange(count)] = values
        # Others that stored there meanwhile. Of lanes of a warp one is heard, by PTX; threads of a
        # program may store the same value, those of several may not.
        last = self.writers[cells] & _LOWER
        differs = (self.peek(at, size, count) != values).any(1)
        lost = ((last // WARP != threads // WARP).any(1) & differs) | (
            last // self.threads != threads // self.threads
        ).any(1)
        if lost.any():
            lane = np.flatnonzero(lost)[0]
            program, thread = divmod(int(last[lane][0]), self.threads)
            raise Fault(
                lane, f"race: thread {thread} of program {program} stores to the same place"
            )


class Shared(Space):
    """Shared memory of all programs."""

    def __init__(self, size: int, programs: int, threads: int):
        self.size, self.stride = size, padded(size)
        super().__init__(self.stride * programs, threads)

    def locate(self, addresses, nbytes, threads):
        """Return indices; raises Fault unless they are aligned and the program's own."""
        check_inside(addresses, nbytes, self.size, "shared memory")
        return threads // self.threads * self.stride + addresses


def check_inside(addresses, nbytes, size, space):
    """Raise Fault unless all accesses are within ``size`` bytes, and aligned."""
    _check_alignment(addresses, nbytes, space)
    outside = (addresses < 0) | (addresses + nbytes > size)
    if outside.any():
        lane = np.flatnonzero(outside)[0]
        raise Fault(lane, f"out of bounds: byte {int(addresses[lane])} of {size} of {space}")


def _check_alignment(addresses, nbytes, space):
    odd = addresses % nbytes != 0
    if odd.any():
        lane = np.flatnonzero(odd)[0]
        at = int(addresses[lane])
        raise Fault(lane, f"misaligned: {nbytes} bytes at {at:#x} of {space}")


class Global(Space):
    """Copies of the tensors that a launch may touch, (address, bytes) each, side by side."""

    def __init__(self, tensors: list[tuple[int, int]], threads: int):
        self.starts, self.ends = _merged(tensors)
        # As far from a multiple of 16 as in reality, and never next to each other.
        at, self.places = 0, []
        for start, end in zip(self.starts, self.ends, strict=True):
            self.places.append(at + int(start) % 16)
            at += (int(end - start) + 47) // 16 * 16
        self.places = np.array(self.places, np.int64)
        super().__init__(at, threads)
        self.bytes_read = np.zeros(len(self.starts), np.int64)
        self.bytes_written = np.zeros(len(self.starts), np.int64)
        for start, end, place in zip(self.starts, self.ends, self.places, strict=True):
            self.bytes[place : place + int(end - start)] = _view(start, end)

    def locate(self, addresses, nbytes, threads):
        """Return indices, and the tensors that they are in."""
        _check_alignment(addresses, nbytes, "global memory")
        tensor = np.searchsorted(self.starts, addresses, "right") - 1
        outside = (tensor < 0) | (addresses + nbytes > self.ends[tensor])
        if outside.any():
            lane = np.flatnonzero(outside)[0]
            at, nearest = int(addresses[lane]), max(int(tensor[lane]), 0)
            past = at - int(self.starts[nearest])
            length = int(self.ends[nearest] - self.starts[nearest])
            raise Fault(lane, f"out of bounds: byte {past} of a tensor of {length}")
        return addresses - self.starts[tensor] + self.places[tensor], tensor

    def count(self, read, tensor, nbytes):
        counts = self.bytes_read if read else self.bytes_written
        counts += nbytes * np.bincount(tensor, minlength=len(counts))

    def write_back(self):
        for i in np.flatnonzero(self.bytes_written):
            start, end, place = self.starts[i], self.ends[i], self.places[i]
            _view(start, end)[:] = self.bytes[place : place + int(end - start)]


def _merged(tensors):
    """Merge tensors that overlap into ranges; return their starts and ends."""
    starts, ends = [], []
    for start, nbytes in sorted((start, nbytes) for start, nbytes in tensors if nbytes):
        if starts and start < ends[-1]:
            ends[-1] = max(ends[-1], start + nbytes)
        else:
            starts.append(start)
            ends.append(start + nbytes)
    return np.array(starts, np.int64), np.array(ends, np.int64)


def _view(start, end):
    return np.frombuffer((ctypes.c_uint8 * int(end - start)).from_address(int(start)), np.uint8)
