"""Text for error messages, tables and results."""

from collections.abc import Mapping
from typing import Any


def one_line(text: object, limit: int = 160) -> str:
    """Shorten a text to one printable line."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def format_duration(seconds: float) -> str:
    """Format seconds as "4 s", "3 min", "16 h 5 min"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Format the accuracies of an evaluation: "top-1 66.5 %, balanced 50.0 %"."""
    names = {"top1": "top-1", "balanced_accuracy": "balanced"}
    names |= {"mean_average_precision": "mean average precision"}
    return ", ".join(f"{names[key]} {100 * metrics[key]:.1f} %" for key in names if key in metrics)
