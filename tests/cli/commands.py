"""Calling the command line in this process."""

from pathlib import Path

from bitkern.cli import main

SMALL = ["--model", "R26x0.5", "--resize", "40", "--crop", "32", "--batch-size", "7"]
SMALL += ["--workers", "0", "--steps", "3"]
RESULTS = ["curves.png", "metrics.jsonl", "model.safetensors"]
RESULTS += ["predictions.csv", "report.html", "report.json", "summary.json"]


def call(*arguments):
    return main([str(argument) for argument in arguments])


def digest(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


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
    """As :func:`error_of`, of ``finetune``, which must leave no file behind."""
    before = sorted(out.parent.iterdir())
    message = error_of(capsys, "finetune", "--data", folder, "--out", out, *SMALL, *options)
    assert sorted(out.parent.iterdir()) == before
    return message


def remove(path):
    path.rename(path.with_name("elsewhere"))


def empty(path):
    for file in path.iterdir():
        file.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])
