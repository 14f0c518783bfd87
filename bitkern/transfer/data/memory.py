"""How much memory is free."""

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # that of a container; its second version, then its first
LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory() -> int:
    """Bytes of RAM that can be had, within the limit of the container if there is one."""
    fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    free = [int(fields["MemAvailable"].split()[0]) * 1024]
    for limit, usage, reclaimable in LIMITS:
        try:
            most = int((CGROUP / limit).read_text())
            used = int((CGROUP / usage).read_text())
            statistics = (CGROUP / limit).with_name("memory.stat").read_text()
            counts = dict(line.split() for line in statistics.splitlines())
            free.append(most - used + int(counts.get(reclaimable, 0)))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return max(0, min(free))
