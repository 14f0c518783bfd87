"""The progress of a training on the terminal, and Ctrl-C."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from bitkern.text import format_duration, format_metrics
from bitkern.transfer.curves import Record

STOPPING = b"\nbitkern: stopping, and saving what is done; Ctrl-C again stops at once\n"
LOG_SECONDS = 30  # between the lines of a log file


class Display:
    """A progress bar on a terminal, lines of text in a log file."""

    def __init__(
        self, start: int, steps: int, split: str, shown: bool, seconds: float = 0.0
    ) -> None:
        """``split`` names the images of evaluations: "test", …

        ``seconds`` had passed before the run was resumed at step ``start``.
        """
        from tqdm import tqdm

        self.steps, self.split, self.shown = steps, split, shown
        self.last_line = time.perf_counter()
        self.began = self.last_line - seconds
        self.loss = ""
        form = "{desc} {percentage:3.0f}%|{bar}| {n:.2f}/{total} [{elapsed}<{remaining}{postfix}]"
        options: dict[str, Any] = {"disable": not shown or None, "bar_format": form}
        self.bar = tqdm(desc="training", total=steps, initial=start, **options)

    def update(self, steps: float) -> None:
        """Move the bar to the number of steps done, with micro-batches as fractions."""
        self.bar.update(steps - self.bar.n)

    def show(self, record: Record) -> None:
        """Show a record of the training: on the bar, and an evaluation also in a line."""
        now = time.perf_counter()
        if "loss" in record:
            self.loss = f"train loss {record['loss']:.3g}"
            self.bar.set_postfix_str(f"{self.loss}, lr {record['lr']:.2g}", refresh=False)
        is_eval = "eval_loss" in record
        is_due = self.bar.disable and now - self.last_line >= LOG_SECONDS
        if not self.shown or not is_eval and not is_due:
            return
        self.last_line = now
        parts = [self.loss] if self.loss else []
        if is_eval:
            parts += [f"{self.split} loss {record['eval_loss']:.3g}", format_metrics(record)]
        line = f"step {record['step']}/{self.steps}, {format_duration(now - self.began)}"
        self.print(f"{line}: {', '.join(parts)}")

    def print(self, line: str) -> None:
        self.bar.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()


class StopRequested(Exception):  # noqa: N818 - not an error
    """Ctrl-C interrupts the work in progress."""


@contextlib.contextmanager
def deferred_interrupt(shown: bool) -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets instead of raising; the second raises as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return

    def handle(number: int, frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)
        if shown:
            os.write(2, STOPPING)  # print is not reentrant

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
