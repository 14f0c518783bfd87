"""Gradients summed over processes while the backward pass goes on."""

import json
import math

import pytest
import torch

from bitkern.transfer import training
from bitkern.transfer.gradient_reducer import GradientReducer
from tests.transfer.distributed import reduction, torchrun
from tests.transfer.distributed.reduction import PLAIN, RULE
from tests.transfer.distributed.training import OPTIONS
from tests.transfer.images import image_set


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.sweep), 3])
def processes(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processes):
    """The folder that a run of the checks in several processes left behind."""
    folder = tmp_path_factory.mktemp("reduction")
    process = torchrun(processes, "tests.transfer.distributed", folder, "reduction")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize("check", [check.__name__ for check in reduction.CHECKS])
def test_in_several_processes(folder, processes, check):
    for rank in range(processes):
        outcome = json.loads((folder / f"{rank}.json").read_text())[check]
        assert outcome == "passed", f"process {rank}\n{outcome}"


@pytest.mark.parametrize("rule", [RULE, PLAIN], ids=["mixup", "plain"])
@pytest.mark.parametrize("name", reduction.MODELS)
def test_training_equals_one_process(folder, processes, name, rule):
    path = folder / "training_equals_one_process" / f"{name} {rule.mixup_alpha}"
    model = reduction.MODELS[name]()
    expected = training.train(model, image_set(), rule, **OPTIONS)
    (state, history, metrics), *others = [
        torch.load(f"{path}-{rank}.pt") for rank in range(processes)
    ]
    for other in others:
        assert other[1:] == (history, metrics)
        assert all(torch.equal(tensor, state[key]) for key, tensor in other[0].items())
    exact = state["head.weight"].dtype == torch.float64
    for key, tensor in model.state_dict().items():
        tolerance = {"rtol": 1e-11, "atol": 1e-13} if exact else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(state[key], tensor, **tolerance)
    for record, wanted in zip(history, expected.history, strict=True):
        assert all(math.isclose(record[k], wanted[k], rel_tol=1e-4) for k in wanted)


def test_one_process_has_no_buckets_and_no_hooks():
    model = reduction.Every()
    sums = GradientReducer(model)
    with sums.reduce():
        sums.begin_last_micro_batch()
        assert not (sums.buckets or sums.slots or sums.hooks)
