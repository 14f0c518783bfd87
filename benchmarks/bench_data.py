"""Batches of images, uint8 and ready for the device: ours against what others load them with.

Each loader runs in a process of its own, on all cores. ``pytest benchmarks/bench_data.py``.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import loaders, measure, record
from bitkern import transfer


class Case(NamedTuple):
    """JPEGs of width x height, resized to a square and cropped; inception crops without resize."""

    width: int
    height: int
    resize: int
    crop: int
    images: int
    batch: int = 128
    kind: str = "data"
    modes: tuple = ()  # that compile

    def __str__(self):
        return f"{self.width}x{self.height}/{'' if self.resize else 'inception/'}{self.crop}"


CASES = [Case(500, 375, 512, 480, 256), Case(500, 375, 0, 224, 256)]
FULL = [
    Case(500, 375, 256, 224, 256),
    Case(2000, 1500, 512, 480, 128),
    Case(2000, 1500, 256, 224, 128),
    Case(1000, 750, 0, 224, 256),
    Case(2000, 1500, 0, 224, 128),
]
TINY = [Case(60, 40, 20, 16, 12, batch=4), Case(60, 40, 0, 16, 12, batch=4)]
ROOT = Path(__file__).parents[1]


def gate(folder, case):
    """Check that the cache and threads give the crops of a fresh decode."""
    data = transfer.image_folder(folder, "train")
    rule = loaders.rule(case.resize, case.crop, case.batch, steps=3)
    ways = {"cache": "ram", "workers": 2}, {"cache": "off"}
    batches = [transfer.train_batches(data, rule, seed=0, **way) for way in ways]
    for (x, y), (expected, labels) in zip(*batches, strict=True):
        assert torch.equal(x, expected) and torch.equal(y, labels)


def test_loading(case, request, results, in_time, tmp_path):
    in_time(case)
    loaders.write_images(tmp_path, case.width, case.height, case.images)
    gate(tmp_path, case)
    seconds = 0.5 if request.config.option.tiny else 6
    numbers = case.resize, case.crop, case.batch, seconds
    rows = {}
    for name in loaders.of(case.resize):
        command = [sys.executable, "-m", "benchmarks.loaders", name, tmp_path, *numbers]
        done = subprocess.run(map(str, command), cwd=ROOT, capture_output=True, text=True)
        assert name != "ours" or done.returncode == 0, done.stderr
        for epoch in ("first/wall", "first/core", "later/wall", "later/core"):
            row = rows.setdefault(epoch, measure.Timings())
            if done.returncode:
                row.failures[name] = done.stderr.strip().rpartition("\n")[2]
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            row.seconds[name] = found["ms"][epoch] / 1e3
            row.peak_mb[name] = found["peak_mb"]
    # A crop is read and written.
    floor = 2 * 3 * case.crop**2 / measure.copy_bandwidth("cpu")
    for epoch, row in rows.items():
        results.add(record.row(case.kind, f"{case}/{epoch}", row, floor))
