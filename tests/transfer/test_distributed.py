"""Several processes: gradients, training and the command line against a single process."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bitkern.cli import main
from bitkern.transfer import HyperRule, ranks, train
from bitkern.transfer.schedule import Schedule
from tests.transfer.distributed import gradients, torchrun, training
from tests.transfer.images import image_set, write_folder
from tests.transfer.net import Net

PROCESSES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a run of all checks in four processes left behind."""
    folder = tmp_path_factory.mktemp("distributed")
    process = torchrun(PROCESSES, "tests.transfer.distributed", folder, "gradients", "training")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize(
    "check", [check.__name__ for check in (*gradients.CHECKS, *training.CHECKS)]
)
def test_in_four_processes(folder, check):
    for rank in range(PROCESSES):
        outcome = json.loads((folder / f"{rank}.json").read_text())[check]
        assert outcome == "passed", f"process {rank}\n{outcome}"


@pytest.mark.parametrize("name, rule", [("mixup", training.RULE), ("plain", training.PLAIN)])
def test_training_equals_one_process(folder, name, rule):
    out = folder / "training_equals_one_process" / name
    model = Net(torch.float64)
    expected = train(model, image_set(), rule, **training.OPTIONS)
    results = [torch.load(out / f"result-{rank}.pt") for rank in range(PROCESSES)]
    for state, history, metrics in results:
        assert history == results[0][1] and metrics == results[0][2]
        for key, tensor in state.items():
            assert torch.equal(tensor, results[0][0][key]), key
    state, history, metrics = results[0]
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-11, atol=1e-13)
    for record, wanted in zip(history, expected.history, strict=True):
        assert record.keys() == wanted.keys()
        assert all(math.isclose(record[k], wanted[k], rel_tol=1e-6) for k in record)
        assert record.get("top1") == wanted.get("top1")
    written = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == history


@pytest.mark.parametrize("batch_size, batch_split, world_size", [(11, 2, 4), (64, 3, 3), (5, 1, 5)])
def test_parts_make_up_the_batch_of_one_process(batch_size, batch_split, world_size):
    rule = HyperRule(8, 8, 3, (), 0, mixup_alpha=0.2, batch_size=batch_size)
    for step in range(20):
        lam, whole = Schedule(100, rule, 7, batch_split).step(step)
        steps = [
            Schedule(100, rule, 7, batch_split, rank, world_size).step(step)
            for rank in range(world_size)
        ]
        assert all(one.lam == lam for one in steps)
        for i, expected in enumerate(whole):
            mixed = dict(zip(expected.rows, expected.rows[expected.permutation], strict=True))
            parts = [one.slices[i] for one in steps]
            own = np.concatenate([part.rows[: part.own] for part in parts])
            assert sorted(own) == sorted(mixed), "each example is computed once"
            for part in parts:
                partners = part.rows[part.permutation]
                assert sorted(partners) == sorted(part.rows)
                for row, partner in list(zip(part.rows, partners, strict=True))[: part.own]:
                    assert partner == mixed[row]
                assert len(part.rows) <= part.own + 2, "few images are loaded by two processes"
            sizes = [part.own for part in parts]
            assert min(sizes) >= max(sizes) - 1 > 0 or max(sizes) == 1


def test_processes_load_only_their_part():
    rule = HyperRule(8, 8, 3, (), 0, mixup_alpha=0.0, batch_size=11)
    batches = [list(Schedule(15, rule, 7, 2, rank, 4).micro_batches(1)) for rank in range(4)]
    expected = list(Schedule(15, rule, 7, 2).micro_batches(1))
    for whole, *parts in zip(expected, *batches, strict=True):
        assert sum(parts, []) == whole


def lose_a_peer(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    assert ranks.all_reduce_sum(1, rank) == [2, 1]
    if rank == 0:
        with pytest.raises(ranks.RankError, match="^the processes cannot communicate: "):
            ranks.all_reduce_sum(1)
    os._exit(0)  # as if killed


def test_process_that_is_gone_is_reported(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=lose_a_peer, args=(r, tmp_path / "store")) for r in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


THREADS = """
import os
import torch
from bitkern.transfer import ranks

before = os.listdir("/proc/self/task")
with ranks.process_group():
    ranks.broadcast_from_rank0([torch.ones(3)])
    assert len(os.listdir("/proc/self/task")) > len(before)
    import torch._dynamo  # as the optimizers do
assert os.listdir("/proc/self/task") == before
"""


def test_no_thread_of_the_group_outlives_it():
    launched = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "1"}
    launched |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", THREADS], env=os.environ | launched, check=True)


@pytest.mark.sweep
def test_torchrun_finetune_interrupted_and_resumed(tmp_path):
    data = write_folder(tmp_path / "data")
    arguments = ["finetune", "--data", data, "--model", "R26x0.5", "--resize", 40, "--crop", 32]
    arguments += ["--batch-size", 7, "--batch-split", 2, "--mixup-alpha", 0.2, "--steps", 15]
    arguments += ["--base-lr", 1e-6, "--eval-every", 15, "--workers", 0, "--device", "cpu", "--out"]
    arguments = [str(argument) for argument in arguments]
    # At such a rate training does not make more of roundings, which differ by the processes.
    out = tmp_path / "two"
    process = torchrun(2, "bitkern", *arguments, out)
    while process.poll() is None and not (out / "last.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert errors.count("bitkern: interrupted; to continue: bitkern finetune --resume") == 1, errors
    assert sorted(path.name for path in out.iterdir()) == ["last.pt", "metrics.jsonl"]
    done = torch.load(out / "last.pt")["progress"]["step"]
    assert 0 < done < 15

    process = torchrun(2, "bitkern", *arguments, out, "--resume")
    assert main([*arguments, str(tmp_path / "one")]) == 0
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    summaries = [json.loads((f / "summary.json").read_text()) for f in (tmp_path / "one", out)]
    assert [summary["processes"] for summary in summaries] == [1, 2]
    assert summaries[0]["rule"] == summaries[1]["rule"]
    records = [(f / "metrics.jsonl").read_text().splitlines() for f in (tmp_path / "one", out)]
    for one, two in zip(*records, strict=True):
        one, two = json.loads(one), json.loads(two)
        assert one.keys() == two.keys() and one["step"] == two["step"]
        name = "loss" if "loss" in one else "eval_loss"
        assert math.isclose(one[name], two[name], rel_tol=1e-6), (one, two)


@pytest.mark.sweep
def test_two_nodes_make_the_files_of_one(tmp_path):
    arguments = ["bitkern", "finetune", "--data", "digits", "--shots", 3, "--holdout", 0.1]
    arguments += ["--model", "R26x0.5", "--resize", 40, "--crop", 32, "--batch-size", 16]
    arguments += ["--batch-split", 2, "--steps", 6, "--eval-every", 3, "--base-lr", 0.01]
    arguments += ["--mixup-alpha", 0.1, "--workers", 0, "--device", "cpu", "--out"]
    with socket.create_server(("localhost", 0)) as server:
        endpoint = f"localhost:{server.getsockname()[1]}"
    nodes = [torchrun(1, *arguments, tmp_path / "two", nodes=2, endpoint=endpoint) for _ in "12"]
    for process in [*nodes, torchrun(2, *arguments, tmp_path / "one")]:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    for name in ("metrics.jsonl", "model.safetensors", "predictions.csv"):
        contents = [(tmp_path / out / name).read_bytes() for out in ("one", "two")]
        assert contents[0] == contents[1], name
