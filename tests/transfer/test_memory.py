"""How much memory is free, in containers and jobs too."""

import subprocess
import sys

import pytest

from bitkern.transfer.data import memory

V2 = ("memory.max", "memory.current", "memory.stat")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 5000 * 1024),
        ({"v2": ("max", "9", "inactive_file 1")}, 5000 * 1024),
        ({"v2": ("1000", "900", "inactive_file 50")}, 150),
        ({"v2/a/job": ("10", "20", "file 1")}, 0),
        ({"v2/a/job": ("max", "20", "file 1"), "v2/a": ("900", "200", "file 1")}, 700),
        ({"v2/other": ("10", "9", "file 1")}, 5000 * 1024),
        ({"v1/b": ("2000", "500", "cache 1\ntotal_inactive_file 100")}, 1600),
    ],
)
def test_free_memory(tmp_path, monkeypatch, files, free):
    assert 0 < memory.free_memory() < 1 << 50
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:   5000 kB\n")
    (tmp_path / "own").write_text("3:cpu:/\n2:memory:/b\n0::/a/job\n")
    for name, texts in files.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for file, text in zip(V1 if "v1" in name else V2, texts, strict=True):
            (tmp_path / name / file).write_text(f"{text}\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "own")
    monkeypatch.setattr(memory, "CGROUPS", {"": tmp_path / "v2", "memory": tmp_path / "v1"})
    assert memory.free_memory() == free


@pytest.mark.parametrize(("option", "gigabytes"), [("-v", 8), ("-d", 2)])
def test_within_ulimit(option, gigabytes):
    script = "from bitkern.transfer.data.memory import free_memory; print(free_memory())"
    command = f"ulimit {option} {gigabytes * 10**6}; exec {sys.executable} -c '{script}'"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < gigabytes * 1024e6
