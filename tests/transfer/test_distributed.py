"""Several processes: gradients, training and the command line against a single process."""

import json
import os
import signal
import socket
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bitkern.transfer import HyperRule, ranks, train
from bitkern.transfer.gradient_reducer import GradientReducer
from bitkern.transfer.schedule import Schedule
from tests.cli.commands import SMALL, digest, summary_of
from tests.process import python
from tests.transfer.distributed import compiled, gradients, reduction, torchrun, training
from tests.transfer.images import image_set, write_folder

PROCESSES = 4


def run_checks(folder, *modules):
    process = torchrun(PROCESSES, "tests.transfer.distributed", folder, *modules)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that a run of the checks in four processes left behind."""
    folder = tmp_path_factory.mktemp("distributed")
    run_checks(folder, "gradients", "training", "reduction")
    return folder


def assert_passed(folder, check):
    for rank in range(PROCESSES):
        outcome = json.loads((folder / f"{rank}.json").read_text())[check.__name__]
        assert outcome == "passed", f"process {rank}\n{outcome}"


CHECKS = (*gradients.CHECKS, *training.CHECKS, *reduction.CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_in_four_processes(folder, check):
    assert_passed(folder, check)


@pytest.mark.sweep
@pytest.mark.parametrize("check", compiled.CHECKS, ids=lambda check: check.__name__)
def test_compiled_in_four_processes(tmp_path, check):
    run_checks(tmp_path, "compiled")
    assert_passed(tmp_path, check)


@pytest.mark.parametrize("name, rule", reduction.RUNS)
def test_training_equals_one_process(folder, name, rule):
    out = folder / "training_equals_one_process" / f"{name} {rule.mixup_alpha}"
    model = reduction.MODELS[name]()
    expected = train(model, image_set(), rule, **training.OPTIONS)
    results = [torch.load(out / f"{rank}.pt") for rank in range(PROCESSES)]
    state, history, metrics = results[0]
    for other in results[1:]:
        assert other[1:] == (history, metrics)
        assert all(torch.equal(tensor, state[key]) for key, tensor in other[0].items())
    exact = state["head.weight"].dtype == torch.float64
    for key, tensor in model.state_dict().items():
        tolerance = {"rtol": 1e-11, "atol": 1e-13} if exact else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(state[key], tensor, **tolerance)
    for record, wanted in zip(history, expected.history, strict=True):
        assert record == pytest.approx(wanted, rel=1e-6 if exact else 1e-4, abs=0)
    written = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == history


def test_one_process_has_no_buckets_and_no_hooks():
    sums = GradientReducer(reduction.Every())
    with sums.reduce():
        sums.begin_last_micro_batch()
        assert not (sums.buckets or sums.slots or sums.hooks)


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
    python("-c", THREADS, **launched)


@pytest.mark.sweep
def test_torchrun_finetune_interrupted_and_resumed(tmp_path):
    out = tmp_path / "out"
    arguments = ["bitkern", "finetune", "--data", write_folder(tmp_path / "data"), *SMALL]
    arguments += ["--batch-split", 2, "--steps", 15, "--device", "cpu", "--out", out]
    process, metrics = torchrun(2, *arguments), out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert errors.count("bitkern: interrupted; to continue: bitkern finetune --resume") == 1, errors
    assert sorted(path.name for path in out.iterdir()) == ["last.pt", "metrics.jsonl"]
    assert 0 < torch.load(out / "last.pt")["progress"]["step"] < 15

    process = torchrun(2, *arguments, "--resume")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert summary_of(out)["processes"] == 2


@pytest.mark.sweep
def test_two_nodes_make_the_files_of_one(tmp_path):
    arguments = ["bitkern", "finetune", "--data", "digits", "--shots", 3, "--holdout", 0.1, *SMALL]
    arguments += ["--batch-split", 2, "--eval-every", 2, "--base-lr", 0.01, "--mixup-alpha", 0.1]
    arguments += ["--device", "cpu", "--out"]
    with socket.create_server(("localhost", 0)) as server:
        endpoint = f"localhost:{server.getsockname()[1]}"
    nodes = [torchrun(1, *arguments, tmp_path / "two", nodes=2, endpoint=endpoint) for _ in "12"]
    for process in [*nodes, torchrun(2, *arguments, tmp_path / "one")]:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    one, two = digest(tmp_path / "one"), digest(tmp_path / "two")
    for name in ("metrics.jsonl", "model.safetensors", "predictions.csv"):
        assert one[name] == two[name], name
