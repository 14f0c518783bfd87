"""The command line: a file for each command, and a line here."""

import argparse
import contextlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from bitkern.cli import cache, demo, evaluate, export, finetune, info, predict, pretrain, weights
from bitkern.export import ExportError
from bitkern.transfer import ranks
from bitkern.transfer.setup import TrainingError

# Each adds its parser, runs, and says whether it does so under torchrun as well.
COMMANDS = (finetune, pretrain, evaluate, predict, export, weights, cache, demo, info)


class Parser(argparse.ArgumentParser):
    """Errors are one line, from the first process alone."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, None if ranks.rank() else f"bitkern: error: {message}\n")


def _parser() -> Parser:
    parser = Parser(prog="bitkern", description="Big Transfer: fine-tune BiT on your own images.")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    for command in COMMANDS:
        command.add(commands)
    return parser


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    commands = {command.__name__.rpartition(".")[2]: command for command in COMMANDS}
    command = commands[args.command]
    try:
        if ranks.world_size() > 1 and not command.DISTRIBUTED:
            *most, last = (name for name, command in commands.items() if command.DISTRIBUTED)
            several = f"{', '.join(most)} or {last}"
            raise ValueError(f"torchrun: expected {several}, the rest is for one process")
        command.run(args)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
        if command in (finetune, pretrain):
            message += f"; {args.command} continues with --resume"
    except BrokenPipeError:  # whoever reads the output has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to flush
        return 128 + signal.SIGPIPE
    except torch.OutOfMemoryError:
        code, message = 2, "error: out of GPU memory: raise --batch-split or lower --batch-size"
    except (ValueError, OSError, TrainingError, ExportError, ranks.RankError) as error:
        code, message = 2, f"error: {_with_options(' '.join(str(error).split()))}"
    else:
        return 0
    if ranks.rank() == 0:
        print(f"bitkern: {message}", file=sys.stderr)
    return code


def _with_options(message: str) -> str:
    """A message in which arguments are options: skip_corrupt=True is --skip-corrupt."""
    return re.sub(r"\b([a-z_]+)=True", lambda m: "--" + m[1].replace("_", "-"), message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's error, 130 for Ctrl-C.

    Of several processes, as torchrun starts them, the first speaks for all.
    """
    with ranks.launched():
        silent = ranks.rank() > 0
        with contextlib.redirect_stdout(None) if silent else contextlib.nullcontext():
            return _run(argv)
