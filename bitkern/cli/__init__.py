"""The command line: a file for each command, and a line here."""

import argparse
import contextlib
import difflib
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence

import bitkern
from bitkern.cli import cache, demo, evaluate, export, finetune, info, predict, pretrain, weights
from bitkern.cli.options import Parser
from bitkern.cli.training import restore_arguments, resume_hint
from bitkern.export import ExportError
from bitkern.transfer import TrainingError, ranks
from bitkern.transfer.data import is_out_of_memory

# Modules with add(commands), run(args), and DISTRIBUTED: True if torchrun may start it.
COMMANDS = (finetune, pretrain, evaluate, predict, export, weights, cache, demo, info)


EXAMPLES = f"{finetune.EXAMPLES}  bitkern predict runs/mine photo.jpg\n"
# Other programs' names of options that are too different for a spelling suggestion.
ALIASES = {"--epochs": "--steps", "--lr": "--base-lr", "--learning-rate": "--base-lr"}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="bitkern",
        description="Fine-tune, evaluate and export Big Transfer (BiT) models.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"bitkern {bitkern.__version__}")
    commands = parser.add_subparsers(metavar="command", dest="command")
    for command in COMMANDS:
        command.add(commands)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        option = unknown[0].partition("=")[0]
        words = commands.choices[args.command].format_help().replace(",", " ").split()
        known = [word for word in words if word.startswith("--")]
        near = [ALIASES[option]] if ALIASES.get(option) in known else []
        near += difflib.get_close_matches(option, known, n=1) if not near else []
        hint = f"; did you mean {near[0]}?" if near else f"; see bitkern {args.command} --help"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint * option.startswith('-')}")
    if args.command is None:
        parser.print_help()
        parser.exit()
    return args


def _run(argv: Sequence[str]) -> int:
    commands = {command.__name__.rpartition(".")[2]: command for command in COMMANDS}
    try:
        argv = restore_arguments(argv)
        args = _parse(argv)
        args.command_line = shlex.join(["bitkern", *argv])
        command = commands[args.command]
        if ranks.world_size() > 1 and not command.DISTRIBUTED:
            *most, last = (name for name, command in commands.items() if command.DISTRIBUTED)
            several = f"{', '.join(most)} or {last}"
            raise ValueError(f"torchrun: expected {several}; other commands run in one process")
        command.run(args)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
        if command in (finetune, pretrain):
            message += resume_hint(args)
    except BrokenPipeError:  # the reader of the output has closed it, as head does
        # Output that is still buffered goes to the null device.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, TrainingError, ExportError, ranks.RankError) as error:
        code, message = 2, f"error: {_with_options(' '.join(str(error).split()))}"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        code, message = 2, "error: out of memory: raise --batch-split or lower --batch-size"
    else:
        return 0
    if ranks.rank() == 0:
        print(f"bitkern: {message}", file=sys.stderr)
    return code


def _with_options(message: str) -> str:
    """Replace arguments in a message by options: skip_corrupt=True by --skip-corrupt."""

    def option(found: re.Match[str]) -> str:
        before, name, value = found[1] or "", found[2], found[3]
        return f"{before}--{name.replace('_', '-')}" + f" {value}" * (value not in ("", "True"))

    number = r"True\b|[\d.e+-]*\d"
    message = re.sub(rf"()\b([a-z_]+)=({number})", option, message)
    return re.sub(
        r"\b(raise |lower |another )(base_lr|batch_split|batch_size|out)\b()", option, message
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's error, 130 for Ctrl-C.

    Under torchrun only rank 0 prints.
    """
    with ranks.process_group():
        silent = ranks.rank() > 0
        with contextlib.redirect_stdout(None) if silent else contextlib.nullcontext():
            return _run(sys.argv[1:] if argv is None else argv)
