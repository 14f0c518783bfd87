"""Timing: clocks, warm-up, rounds, memory, and the two ceilings of a device."""

import ctypes
import gc
import statistics
import time
from functools import cache, partial

import torch

WARM_UP = 3
ROUNDS = 3, 50
SETTLE = 0.01  # seconds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def keep_pages():
    """Have glibc keep freed memory, so that no contender pays for page faults. -> whether it does.

    By default the history of the heap decides whether a tensor of some MB is made of fresh pages at
    every call, and the faults can take longer than the operator.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    m_mmap_threshold, m_trim_threshold = -3, -1
    largest = 2**25  # that glibc takes from its heap
    return bool(mallopt(m_mmap_threshold, largest) and mallopt(m_trim_threshold, 2**31 - 1))


class Event:
    """A point in the current CUDA stream; the difference of two is in seconds."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start):
        self.event.synchronize()
        return start.event.elapsed_time(self.event) / 1e3


def clock(device):
    """A timer for pytest-benchmark: end - start is the time between, in seconds."""
    return Event if device == "cuda" else time.perf_counter


@cache
def _scratch():
    return torch.empty(4 * l2_bytes("cuda"), dtype=torch.uint8, device="cuda")


def l2_bytes(device):
    """Size of the GPU's last-level cache; 0 on the CPU, where settle() leaves it as it is."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0


def settle(run, device):
    """Prepare a timed run, so that no contender pays for the one before it.

    On a GPU the L2 cache is evicted, and the GPU kept busy while the host enqueues what is timed
    next. On the CPU the task runs untimed for a while: after a serial contender the threads sleep,
    and a second call on a small map still takes twice its time.
    """
    if device == "cuda":
        _scratch().zero_()
        return
    start = time.perf_counter()
    while time.perf_counter() - start < SETTLE:
        run()


def free(device):
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _timed(run, device):
    tick = clock(device)
    settle(run, device)
    start = tick()
    run()
    return tick() - start


def _median(run, device):
    """The median of ten runs, or of as many as begin in a second: bf16 can be that slow."""
    samples = []
    while len(samples) < 10 and sum(samples) < 1:
        samples.append(_timed(run, device))
    return statistics.median(samples)


@cache
def copy_bandwidth(device):
    """Bytes per second, read and written counted, of a copy far larger than the caches."""
    source = torch.randn(2**29 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median(lambda: target.copy_(source), device)


@cache
def matrix_rate(device, dtype):
    """FLOP per second of a large square matrix product on random data."""
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(DTYPES[dtype])
    return 2 * n**3 / _median(lambda: a @ b, device)


class Timings:
    """``seconds`` per call, ``peak_mb`` of GPU memory, or ``failures``, of each contender."""

    def __init__(self):
        self.seconds, self.peak_mb, self.failures = {}, {}, {}


class Race:
    """Contenders on one task. A contender is a function that prepares and returns the task to run.

    "ours" is timed by pytest-benchmark, the others with the same clock, all by the median. A peer
    that fails, or whose turn comes after ``deadline``, is recorded with the reason.
    ``progress(timings)`` is called with the results so far.
    """

    def __init__(self, benchmark, contenders, device, *, seconds, calls=1, deadline=float("inf")):
        """``seconds`` to spend on the rounds; ``calls`` that one run of a task consists of."""
        torch.compiler.reset()  # otherwise the eighth shape silently runs uncompiled
        self.benchmark, self.contenders, self.device = benchmark, contenders, device
        self.seconds, self.calls, self.deadline = seconds, calls, deadline
        self.peers = [name for name in contenders if name != "ours"]
        self.timings = Timings()

    def together(self, progress):
        """Prepare all, then take turns, so that a change of the machine affects all contenders."""
        ours, spent = self._prepared("ours")
        runs = {}
        for name in self.peers:
            if task := self._peer(name):
                runs[name] = task[0]
                spent += task[1]
        samples = {name: [] for name in runs}

        def turns():
            for name, run in runs.items():
                samples[name].append(_timed(run, self.device))
            settle(ours, self.device)

        self._pedantic(ours, spent, turns)
        for name in runs:
            self.timings.seconds[name] = statistics.median(samples[name]) / self.calls
        progress(self.timings)

    def alone(self, progress):
        """Run one after the other, each with the memory to itself; ``progress`` after each."""
        ours, spent = self._prepared("ours")
        self._pedantic(ours, spent, partial(settle, ours, self.device))
        del ours
        progress(self.timings)
        for name in self.peers:
            torch.compiler.reset()
            free(self.device)
            if task := self._peer(name):
                run, spent = task
                samples = [_timed(run, self.device) for _ in range(self._rounds(spent))]
                self.timings.seconds[name] = statistics.median(samples) / self.calls
                del run, task
            progress(self.timings)

    def _pedantic(self, ours, spent, setup):
        def per_call():
            # pytest-benchmark divides the times it saves and compares by this; with a setup it
            # takes no argument for it.
            self.benchmark.stats.iterations = self.calls
            setup()

        self.benchmark.pedantic(ours, setup=per_call, rounds=self._rounds(spent))
        self.timings.seconds["ours"] = self.benchmark.stats.stats.median

    def _rounds(self, spent):
        least, most = ROUNDS
        return round(min(max(self.seconds / spent, least), most))

    def _peer(self, name):
        if time.monotonic() > self.deadline:
            self.timings.failures[name] = "not run: the time budget was used up"
            return None
        try:
            return self._prepared(name)
        except RuntimeError as error:  # out of memory, no such kernel, whatever a compiler raises
            self.timings.failures[name] = f"{type(error).__name__}: {str(error).strip()}"[:300]
        free(self.device)
        return None

    def _prepared(self, name):
        """(task, seconds that one run takes), warmed up."""
        gpu = self.device == "cuda"
        before = torch.cuda.memory_allocated() if gpu else 0
        run = self.contenders[name]()
        for _ in range(WARM_UP):
            run()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        spent = _timed(run, self.device)
        if gpu:
            self.timings.peak_mb[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
        return run, spent
