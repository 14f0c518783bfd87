"""A run killed with SIGKILL, wherever, is resumed to the files of one that never was."""

import json
import multiprocessing
import os
import random
import signal
import traceback

import safetensors.torch
import torch

from bitkern import files
from bitkern.transfer import run
from tests.transfer.images import image_set
from tests.transfer.net import FILES, Net, train

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
    """Write half of the file before it is saved, so that a kill leaves it."""

    def save(state, path, *rest):
        path.write_bytes(b"half")
        save_file(state, path, *rest)

    return save


def content(folder):
    """The files of a run, but for its duration."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    summary = json.loads(found.pop("summary.json"))
    del summary["seconds"]
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
    process = multiprocessing.get_context("spawn").Process(target=kill_and_resume, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
