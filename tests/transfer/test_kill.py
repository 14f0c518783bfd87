"""A run killed with SIGKILL, wherever, is resumed to the files of one that never was."""

import html
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback

import pytest
import safetensors.torch
import torch

from bitkern import files
from bitkern.cli import main
from bitkern.transfer import run
from tests.transfer.images import image_set
from tests.transfer.net import FILES, Net, train

FORK = multiprocessing.get_context("fork")
SPAWN = multiprocessing.get_context("spawn")
OPERATIONS = ("replace", "fsync", "open", "unlink", "mkdir")  # of os and pathlib


def kill_at(moment):
    """Have this process killed right before or after that file operation, counted from 0."""
    count = 0

    def counted(operation):
        def run(*arguments, **options):
            nonlocal count
            if count == moment and moment % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            try:
                return operation(*arguments, **options)
            finally:
                if count == moment and not moment % 2:
                    os.kill(os.getpid(), signal.SIGKILL)

        return run

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    torch.save = counted(torch.save)
    safetensors.torch.save_file = counted(torn(safetensors.torch.save_file))
    run.Journal.add = counted(run.Journal.add)


def torn(save_file):
    """Of every other call, half of the file is written first, so that a kill leaves it."""

    def save(state, path, *rest):
        path.write_bytes(b"half")
        save_file(state, path, *rest)

    return save


def content(folder):
    """What equal runs have in common: all but durations."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    summary = json.loads(found.pop("summary.json"))
    del summary["seconds"]
    command = summary.pop("command", "")  # which names the folder
    for name in ("report.json", "report.html"):
        if name in found and command:
            for written in (json.dumps(command), html.escape(command)):
                found[name] = found[name].replace(written.encode(), b"")
    return found, summary


def kill_and_resume(folder):
    """Kill runs at random operations until they are done; compare them with one never killed."""
    torch.set_num_threads(1)  # no more can be had in a forked process
    options = dict(eval_set=image_set(2), checkpoint_every=2, eval_every=5)
    train(Net(), out=folder / "straight", **options)
    moments = random.Random(0)
    kills = killed_early = 0
    for attempt in range(12):
        out = folder / f"{attempt}"
        for life in range(40):
            moment = moments.randrange(60 if life else 8) if life < 5 else -1
            child = os.fork()
            if child == 0:
                try:
                    kill_at(moment)
                    train(Net(), out=out, resume=(out / "last.pt").exists(), **options)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if status == 0:
                break
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            kills += 1
            killed_early += not (out / "last.pt").exists()
            if (out / "summary.json").exists() and not (out / "last.pt").exists():
                break  # killed after all was done
        files.remove_temporary_files(out)
        assert sorted(path.name for path in out.iterdir()) == FILES
        assert content(out) == content(folder / "straight")
    assert kills > 30 and killed_early > 0


def test_killed_at_any_file_operation(tmp_path):
    # In a process of its own: a fork of one that has run other tests has their threads' locks.
    process = SPAWN.Process(target=kill_and_resume, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # no more can be had in a forked process
    yield
    torch.set_num_threads(threads)


def lines(out):
    """Of metrics.jsonl, so far."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def finetune(*arguments):
    sys.exit(main([str(argument) for argument in ("finetune", *arguments)]))


@pytest.mark.sweep
@pytest.mark.usefixtures("one_thread")
def test_finetune_killed_twenty_times_at_random(tmp_path):
    arguments = ["--data", "digits", "--shots", 3, "--holdout", 0.1, "--steps", 100]
    arguments += ["--model", "R26x0.5", "--resize", 40, "--crop", 32, "--batch-size", 16]
    arguments += ["--mixup-alpha", 0.1, "--base-lr", 0.01, "--eval-every", 20, "--workers", 1]
    with pytest.raises(SystemExit, match="^0$"):  # in this process: the others need not import
        finetune(*arguments, "--out", tmp_path / "straight")
    out = tmp_path / "killed"
    arguments += ["--checkpoint-every", 2, "--out", out]
    moments, kills = random.Random(0), 0
    while True:
        resume = ["--resume"] if (out / "last.pt").exists() else []
        process = FORK.Process(target=finetune, args=[*arguments, *resume])
        process.start()
        if kills < 20:
            # At any moment of the start, or within the steps up to the second checkpoint or so.
            wanted = lines(out) + moments.randrange(5)
            early = time.monotonic() + (moments.uniform(0, 1) if moments.random() < 0.2 else 60)
            while process.is_alive() and time.monotonic() < early and lines(out) < wanted:
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.1))
            process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert kills == 20
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert content(out) == content(tmp_path / "straight")
