"""Calling the command line in this process."""

import json
from pathlib import Path

from bitkern.cli import main

SMALL = ["--model", "R26x0.5", "--resize", "40", "--crop", "32", "--batch-size", "7"]
SMALL += ["--workers", "0", "--steps", "3"]


def call(*arguments):
    return main([str(argument) for argument in arguments])


def json_of(capsys, *arguments):
    """The values that a call with ``--json`` prints."""
    capsys.readouterr()
    assert call(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def digest(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def error_of(capsys, *arguments):
    """The message of a call that must fail with exit code 2 and one line on stderr."""
    capsys.readouterr()
    try:
        code = call(*arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.startswith("bitkern: error: ") and message.count("\n") == 1, message
    return message.strip().removeprefix("bitkern: error: ")


def finetune_error(capsys, folder, out, *options):
    """The message of a ``finetune`` that must leave no file behind."""
    before = sorted(out.parent.iterdir())
    message = error_of(capsys, "finetune", "--data", folder, "--out", out, *SMALL, *options)
    assert sorted(out.parent.iterdir()) == before
    return message
