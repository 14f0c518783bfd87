"""How much memory is free, and how much the process has."""

import resource
from collections.abc import Iterator
from pathlib import Path

MEMINFO, OWN = Path("/proc/meminfo"), Path("/proc/self/cgroup")
STATM = Path("/proc/self/statm")  # pages: all that is mapped, resident, …, data as the sixth
# Where the limits of containers and jobs are, by their version and controller.
CGROUPS = {"": Path("/sys/fs/cgroup"), "memory": Path("/sys/fs/cgroup/memory")}
NAMES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory() -> int:
    """Bytes of RAM that can be had, within the limits of control groups and of ``ulimit``."""
    fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return max(0, min([free, *_within_groups(), *_within_ulimit()]))


def resident_memory() -> int:
    """Bytes of RAM that the process has."""
    return _pages()[1]


def _pages() -> list[int]:
    return [int(count) * resource.getpagesize() for count in STATM.read_text().split()]


def _within_ulimit() -> Iterator[int]:
    """Yield what ``ulimit -v`` and ``ulimit -d`` leave, where they are set."""
    pages = _pages()
    for limit, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            yield most - used


def _within_groups() -> Iterator[int]:
    """Yield what is free in each of the process's control groups that has a limit."""
    for line in OWN.read_text().splitlines() if OWN.exists() else ():
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
            except (OSError, ValueError):  # there is none, or it is "max"
                continue
            statistics = dict(line.split() for line in lines)
            yield most - used + int(statistics.get(reclaimable, 0))
