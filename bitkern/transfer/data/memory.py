"""How much memory is free."""

from collections.abc import Iterator
from pathlib import Path

MEMINFO, OWN = Path("/proc/meminfo"), Path("/proc/self/cgroup")
# Where the limits of containers and jobs are, by their version and controller.
CGROUPS = {"": Path("/sys/fs/cgroup"), "memory": Path("/sys/fs/cgroup/memory")}
NAMES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory() -> int:
    """Bytes of RAM that can be had, within the limits of the process's container or job."""
    fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return max(0, min([free, *_within_limits()]))


def _within_limits() -> Iterator[int]:
    """What is free in each of the process's control groups that has a limit."""
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
