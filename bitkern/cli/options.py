"""Option types, and options that several commands share."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import torch

from bitkern.transfer import ranks
from bitkern.transfer.checks import CACHE, PRECISIONS
from bitkern.transfer.data import SOURCES


class Parser(argparse.ArgumentParser):
    """A parser with one-line errors, printed by rank 0 alone, and with groups of options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.groups: dict[str, Any] = {}

    def error(self, message: str) -> NoReturn:
        self.exit(2, None if ranks.rank() else f"bitkern: error: {message}\n")

    def group(self, title: str) -> Callable[..., object]:
        """Return ``add_argument`` of the group of that title."""
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title)
        add: Callable[..., object] = self.groups[title].add_argument
        return add


def batch_split(text: str) -> int | Literal["auto"]:
    """Parse 1, 2, … or auto."""
    return "auto" if text == "auto" else positive(text)


def positive(text: str) -> int:
    """Parse 1, 2, …"""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def non_negative(text: str) -> int:
    """Parse 0, 1, …"""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0 or a positive whole number, got {text!r}")
    return int(text)


def add_data(parser: Parser, help: str) -> None:
    names = "|".join(("DIR", "FILE.csv", *SOURCES))
    parser.group("data")("--data", required=True, metavar=names, help=help)


def add_device_options(parser: Parser) -> None:
    add = parser.group("speed and memory")
    add("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    add(
        "--precision",
        choices=["auto", *PRECISIONS],
        default="auto",
        help="number format (default: auto: bf16 if the hardware supports it, fp16 on other GPUs, "
        "else fp32)",
    )
    add(
        "--workers",
        type=non_negative,
        default=min(8, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
        help="threads that load images; do not change results (default: %(default)s)",
    )
    help = "skip images that cannot be read; training replaces them by others"
    parser.group("data")("--skip-corrupt", action="store_true", help=help)


def add_cache(parser: Parser, help: str) -> None:
    parser.group("speed and memory")("--cache", choices=CACHE, default="auto", help=help)


def usable_device(name: str | None) -> str:
    """Return the requested device, or a GPU if there is one; ValueError if it is unusable."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if ranks.world_size() > 1:
        if name not in ("cpu", "cuda"):
            raise ValueError(f"--device: expected cpu or cuda in several processes, got {name}")
        if name == "cuda":  # one GPU for each process
            name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the second from a torch without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name}: cannot be used here ({reason})") from None
    if name.startswith("cuda"):
        torch.cuda.set_device(name)
    return name


def report_skipped(skipped: int) -> None:
    if skipped and ranks.rank() == 0:
        print(f"skipped {skipped} corrupt image{'s' * (skipped > 1)}", file=sys.stderr)
