"""Written files are complete or do not exist."""

import os

import pytest

from bitkern import files
from tests.transfer.net import Crash


def test_atomic_leaves_old_or_new_but_nothing_between(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(Crash), files.atomic_write(path) as part:
        part.write_text("half")
        raise Crash
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with files.atomic_write(path) as part:
        part.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_content_and_name_outlive_a_power_cut(tmp_path, monkeypatch):
    """The file is synced before it is renamed, the folder after."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def spy_sync(descriptor):
        calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def spy_replace(part, path):
        calls.append(("replace", str(part), str(path)))
        replace(part, path)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(os, "replace", spy_replace)
    path = tmp_path / "file"
    with files.atomic_write(path) as part:
        part.write_text("new")
    assert calls == [
        ("sync", str(part)),
        ("replace", str(part), str(path)),
        ("sync", str(tmp_path)),
    ]


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = tmp_path / ".part-1-last.pt"
    left.touch()
    (tmp_path / "last.pt").touch()
    files.remove_temporary_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
