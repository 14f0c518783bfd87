"""Free memory, the memory of this process, and errors that say that there is too little."""

import resource
from collections.abc import Iterator
from pathlib import Path

import torch

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/proc/self/cgroup")
STATM = Path("/proc/self/statm")  # in pages: total, resident, …, data as the sixth
# Mount points of cgroup v2 and v1, and their files, by controller.
CGROUPS = {"": Path("/sys/fs/cgroup"), "memory": Path("/sys/fs/cgroup/memory")}
NAMES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
# PyTorch's CPU allocator and the libraries below it raise a RuntimeError with these texts.
_OUT_OF_MEMORY = (
    *("can't allocate memory", "not enough memory", "bad_alloc", "bad allocation"),
    *("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that there is too little memory, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error) for s in _OUT_OF_MEMORY)


def free_memory() -> int:
    """Return the free bytes of RAM, within the limits of cgroups and of ``ulimit``."""
    fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return max(0, min([free, *_free_in_cgroups(), *_free_in_ulimit()]))


def resident_memory() -> int:
    return _statm()[1]


def _statm() -> list[int]:
    return [int(count) * resource.getpagesize() for count in STATM.read_text().split()]


def _free_in_ulimit() -> Iterator[int]:
    """Yield the bytes left of ``ulimit -v`` and ``ulimit -d``, where they are set."""
    statm = _statm()
    for limit, used in ((resource.RLIMIT_AS, statm[0]), (resource.RLIMIT_DATA, statm[5])):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            yield most - used


def _free_in_cgroups() -> Iterator[int]:
    """Yield the free bytes of each of the process's cgroups that has a limit."""
    for line in CGROUP.read_text().splitlines() if CGROUP.exists() else ():
        _, controller, path = line.split(":", 2)
        if controller not in CGROUPS:
            continue
        inner = Path(path.lstrip("/"))
        for part in (inner, *inner.parents):
            folder = CGROUPS[controller] / part
            limit, usage, reclaimable = NAMES[controller]
            try:
                most, used = (int((folder / name).read_text()) for name in (limit, usage))
                lines = (folder / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):  # no such file, or "max"
                continue
            statistics = dict(line.split() for line in lines)
            yield most - used + int(statistics.get(reclaimable, 0))
