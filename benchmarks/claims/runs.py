"""The runs of claims, in processes of one thread; a JSON line each, and none is done twice."""

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

import torch

from benchmarks import record
from benchmarks.claims import CLAIMS
from bitkern.text import one_line
from bitkern.transfer import TrainingError

# Seeds below were run with weight decay on all parameters, to see how many a claim needs.
FIRST_SEED = 10


class Key(NamedTuple):
    """The identity of a run."""

    claim: str
    condition: str
    seed: int


def keys(names, seeds=None):
    """The runs of these claims, of so many seeds each, or as many as each claim says."""
    return [
        Key(name, condition, seed)
        for name in names
        for seed in range(FIRST_SEED, FIRST_SEED + (seeds or CLAIMS[name].seeds))
        for condition in CLAIMS[name].conditions
    ]


def execute(key, quick):
    """Do a run; its line. A training that fails is a result."""
    torch.set_num_threads(1)
    claim = CLAIMS[key.claim]
    began = time.perf_counter()
    amounts = claim.quick if quick else claim.amounts
    try:
        result = {"numbers": claim.run(key.seed, **amounts, **claim.conditions[key.condition])}
    except (ValueError, TrainingError) as error:
        result = {"failure": one_line(f"{type(error).__name__}: {error}")}
    return key._asdict() | result | {"seconds": round(time.perf_counter() - began, 1)}


def finished(path):
    """The lines of a file, without a last one that a kill has torn, which is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole, _, torn = content.rpartition(b"\n")
    os.truncate(path, len(content) - len(torn))
    return [json.loads(line) for line in whole.splitlines()]


def run(wanted, path, processes, quick=False):
    """Do those of the wanted runs that are not in the file, and append them; all its lines."""
    lines = finished(path)
    done = {Key(*(line[field] for field in Key._fields)) for line in lines}
    about = {"torch": torch.__version__, "commit": record.header("cpu")["commit"]}
    spawn = multiprocessing.get_context("spawn")
    with open(path, "a") as file, ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        running = [pool.submit(execute, key, quick) for key in wanted if key not in done]
        for number, future in enumerate(as_completed(running), 1):
            line = future.result() | about
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            lines.append(line)
            said = line.get("failure") or line["numbers"]
            what = f"{line['claim']}, {line['condition']}, seed {line['seed']}"
            print(f"{number}/{len(running)} {what}: {said} ({line['seconds']:.0f} s)", flush=True)
    return lines
