"""Rows of measurements as JSON, and tables of them.

``python -m benchmarks.record FILE…`` prints a short table of each file; of a folder it writes
README.md, a table of its files.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

# Shown beside ours, but not peers: another model, ours folded, ours without a cache, ours decoding
# all pixels.
CEILINGS = "batchnorm", "compile batchnorm", "folded", "folded freezing", "uncached", "whole"


def _output(*command):
    """The output of a command; "unknown" if it is not installed or fails (git: no repository)."""
    if not shutil.which(command[0]):
        return "unknown"
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _triton_version():
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def header(device):
    """Device, commit, driver and versions."""
    instructions = torch.backends.cpu.get_cpu_capability()
    name = f"{platform.machine()} CPU, {instructions}, {torch.get_num_threads()} threads"
    about = {"device": name, "commit": _output("git", "describe", "--always", "--dirty")}
    if device == "cuda":
        about["device"] = torch.cuda.get_device_name()
        query = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        about["driver"] = _output(*query).partition("\n")[0]
    return about | {"torch": torch.__version__, "triton": _triton_version(), "stopped": None}


def row(kind, case, timings, floor):
    """One row; ``floor`` is the least time in seconds, from the bytes moved or the arithmetic."""
    ms = {name: 1e3 * seconds for name, seconds in timings.seconds.items()}
    ours = ms.pop("ours")
    peak = dict(timings.peak_mb)
    peers = [ms[name] for name in ms if name not in CEILINGS]
    return {
        "kind": kind,
        "case": case,
        "ours_ms": ours,
        "peers_ms": ms,
        "ratio_to_best_peer": min(peers) / ours if peers else None,
        "fraction_of_floor": 1e3 * floor / ours,
        "peak_mb": peak.pop("ours", None),
        "peers_peak_mb": peak,
        "failures": timings.failures,
    }


def failure(kind, case, error):
    """The row of a case that ours failed."""
    values = dict.fromkeys(("ours_ms", "ratio_to_best_peer", "fraction_of_floor", "peak_mb"))
    empty = {"peers_ms": {}, "peers_peak_mb": {}}
    reason = f"{type(error).__name__}: {str(error).strip()}"[:300]
    return {"kind": kind, "case": case, **values, **empty, "failures": {"ours": reason}}


class Record:
    """The rows so far, written to ``path`` (if there is one) after every change."""

    def __init__(self, path, header):
        self.path, self.header, self.rows = path, header, {}

    def content(self):
        return {**self.header, "rows": list(self.rows.values())}

    def add(self, row):
        """A row replaces the earlier one of the same kind and case: it has more peers."""
        self.rows[row["kind"], row["case"]] = row
        self._write()

    def stop(self, reason):
        """Say why the rest is missing."""
        if self.header["stopped"] is None:
            self.header["stopped"] = reason
            self._write()

    def _write(self):
        if self.path is None:
            return
        part = self.path.with_name(f".part-{self.path.name}")
        part.write_text(json.dumps(self.content(), indent=1))
        os.replace(part, self.path)


def _cells(row, gpu):
    ours, peers = row["ours_ms"], row["peers_ms"]
    if ours is None:
        return [row["kind"], row["case"], "FAILED", row["failures"]["ours"].partition("\n")[0]]
    ranked = sorted((ms, name) for name, ms in peers.items() if name not in CEILINGS)
    best = f"{ranked[0][0] / ours:.2f} {ranked[0][1]}" if ranked else "-"
    cells = [row["kind"], row["case"], best]
    for kind in (("eager",), ("compile", "max-autotune", "freezing")):
        least = min((ms for ms, name in ranked if name.startswith(kind)), default=None)
        cells.append(f"{least / ours:.2f}" if least else "-")
    cells.append(f"{row['fraction_of_floor']:.2f}")
    if gpu:
        peaks = row["peak_mb"], min(row["peers_peak_mb"].values(), default=None)
        cells += [f"{ours:.3f}", "/".join("-" if mb is None else f"{mb:.0f}" for mb in peaks)]
    return cells


def table(results):
    """A short table of one file's content. Ratios are a peer's time over ours: above 1 we lead."""
    gpu = not results["device"].endswith("threads")
    head = ["kind", "case", "x best peer", "x eager", "x compile", "of floor"]
    head += ["ours ms", "peak MB/least peer"] * gpu
    rows = [head, *(_cells(row, gpu) for row in results["rows"])]
    # The last cell of a failed row is a sentence: it does not widen its column.
    shown = [row for row in rows if "FAILED" not in row]
    widths = [max(len(row[i]) for row in shown) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=False)).rstrip() for r in rows]
    about = [f"{key}: {value}" for key, value in results.items() if key != "rows"]
    lines = ["; ".join(about), *lines]
    for row in results["rows"]:
        for name, reason in row["failures"].items():
            if name != "ours":
                lines.append(f"{row['kind']} {row['case']}: {name}: {reason.partition(chr(10))[0]}")
    return "\n".join(lines)


def index(folder):
    """A Markdown table of the results in a folder, the newest first."""
    lines = []
    for path in folder.glob("*.json"):
        about = json.loads(path.read_text())
        if "rows" not in about:  # the claims have a page of their own
            continue
        commit = about["commit"].removesuffix("-dirty")
        cells = [_output("git", "show", "-s", "--format=%cs", commit), about["commit"]]
        cells += [about["device"], about["torch"], str(about["triton"])]
        cells += [f"[{path.name}]({path.name})", str(len(about["rows"]))]
        lines.append(f"| {' | '.join(cells)} |")
    head = (
        "| date | commit | device | PyTorch | Triton | file | rows |",
        "|---|---|---|---|---|---|---|",
    )
    return "\n".join([*head, *sorted(lines, reverse=True), ""])


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        if path.is_dir():
            (path / "README.md").write_text("# Results\n\n" + index(path))
        else:
            found = path.exists()
            print(table(json.loads(path.read_text())) if found else f"{path}: nothing measured")
