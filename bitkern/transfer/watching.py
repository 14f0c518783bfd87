"""What a user sees of a training while it runs, and the Ctrl-C that stops it."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from bitkern.transfer.run import Record

STOPPING = b"\nbitkern: stopping, and saving what is done; Ctrl-C again stops at once\n"
QUIET = 30  # seconds after which a log is told of a step, evaluated or not


def duration(seconds: float) -> str:
    """Say how long that is: "4 s", "3 min", "16 h 5 min"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def in_words(metrics: Mapping[str, Any]) -> str:
    """Say an evaluation's accuracies: "top-1 66.5 %, balanced 50.0 %"."""
    names = {"top1": "top-1", "balanced_accuracy": "balanced"}
    names |= {"mean_average_precision": "mean average precision"}
    said = [f"{name} {100 * metrics[key]:.1f} %" for key, name in names.items() if key in metrics]
    return ", ".join(said)


class Display:
    """A bar on a terminal, which micro-batches move; elsewhere, as in a log file, lines."""

    def __init__(
        self, start: int, steps: int, split: str, shown: bool, seconds: float = 0.0
    ) -> None:
        """``split`` is what the images of evaluations are called: "test", …

        ``seconds`` went by before the run was resumed at step ``start``.
        """
        from tqdm import tqdm

        self.steps, self.split, self.shown = steps, split, shown
        self.said = time.perf_counter()
        self.began = self.said - seconds
        self.loss = ""
        form = "{desc} {percentage:3.0f}%|{bar}| {n:.2f}/{total} [{elapsed}<{remaining}{postfix}]"
        options: dict[str, Any] = {"disable": not shown or None, "bar_format": form}
        self.bar = tqdm(desc="training", total=steps, initial=start, **options)

    def move(self, steps: float) -> None:
        """Show that so many steps are done, the parts of one that are micro-batches included."""
        self.bar.update(steps - self.bar.n)

    def tell(self, record: Record) -> None:
        """Show a record of the training: on the bar, and if it is an evaluation in a line."""
        now = time.perf_counter()
        if "loss" in record:
            self.loss = f"train loss {record['loss']:.3g}"
            self.bar.set_postfix_str(f"{self.loss}, lr {record['lr']:.2g}", refresh=False)
        evaluated = "eval_loss" in record
        if not self.shown or not evaluated and (not self.bar.disable or now - self.said < QUIET):
            return
        self.said = now
        said = [self.loss] if self.loss else []
        if evaluated:
            said += [f"{self.split} loss {record['eval_loss']:.3g}", in_words(record)]
        line = f"step {record['step']}/{self.steps}, {duration(now - self.began)}"
        self.say(f"{line}: {', '.join(said)}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.bar.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


class Stopped(Exception):  # noqa: N818 - no error
    """Ctrl-C breaks off what is not finished."""


@contextlib.contextmanager
def deferred_interrupt(shown: bool) -> Iterator[threading.Event]:
    """Give an event that the first Ctrl-C sets instead of raising; the second raises as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return

    def handle(number: int, frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)
        if shown:
            os.write(2, STOPPING)  # print may be under way, and is not reentrant

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
