"""Steps and evaluations as CUDA graphs. Without a GPU a recording is the function, run anew."""

import contextlib
import json

import pytest
import torch

import bitkern
from bitkern.transfer import cuda_graphs, device_config, inference
from tests.transfer.images import image_set
from tests.transfer.net import PLAIN, RULE, Net, assert_same_bits, stopped, train


class GraphRecorder:
    """As a graph does, a recording reads the tensors it was made of and writes one of its own."""

    made = []

    def __init__(self, device):
        self.asides = self.replays = 0
        self.recorded = False
        self.made.append(self)

    @contextlib.contextmanager
    def aside(self):
        self.asides += 1
        yield

    def record(self, function):
        assert not self.recorded
        self.recorded, result = True, []

        def replay():
            self.replays += 1
            new = function()
            result[:] = result or [torch.empty_like(new)]
            return result[0].copy_(new)

        return replay


@pytest.fixture
def recorders(monkeypatch):
    """The fakes that have been made, of a CPU on which graphs can be had."""
    monkeypatch.setattr(device_config, "use_graph", lambda cuda_graph, device: cuda_graph == "on")
    monkeypatch.setattr(cuda_graphs, "GraphRecorder", GraphRecorder)
    monkeypatch.setattr(GraphRecorder, "made", [])
    return GraphRecorder.made


@pytest.mark.parametrize("rule", [RULE, PLAIN])
@pytest.mark.parametrize("batch_split", [1, 3])
def test_replayed_steps_have_the_same_bits(recorders, tmp_path, rule, batch_split):
    options = dict(eval_set=image_set(9), batch_split=batch_split, eval_every=5)
    eager, graphed = Net(), Net()
    expected = train(eager, rule, **options)
    assert not recorders
    result = train(graphed, rule, cuda_graph="on", out=tmp_path, **options)
    assert result.history == expected.history
    assert_same_bits(graphed, eager.state_dict())
    steps = recorders[0]
    assert (steps.asides, steps.replays) == (3, rule.steps - 3)
    assert json.loads((tmp_path / "summary.json").read_text())["cuda_graph"] is True


@pytest.mark.parametrize("first, then", [("on", "off"), ("off", "on")])
def test_resumes_with_graphs_and_without(recorders, tmp_path, first, then):
    straight, resumed = Net(), Net()
    train(straight)
    stopped(tmp_path, cuda_graph=first)
    train(resumed, out=tmp_path, checkpoint_every=5, cuda_graph=then, resume=True)
    assert_same_bits(resumed, straight.state_dict())


def test_replayed_predictions_have_the_same_bits(recorders):
    """Whole batches are replayed; the last one, which is not, runs as ever."""
    model, images = Net(), image_set(9)
    expected = inference.predict(model, images, 8, batch_size=4)
    logits = inference.predict(model, images, 8, batch_size=4, cuda_graph="on")
    assert torch.equal(logits, expected)
    metrics = inference.evaluate(model, images, 8, batch_size=4)
    assert inference.evaluate(model, images, 8, batch_size=4, cuda_graph="on") == metrics
    assert [(r.asides, r.replays) for r in recorders] == [(3, 3), (3, 3)]
    inference.predict(model, images.subset(range(7)), 8, batch_size=4, cuda_graph="on")
    assert (recorders[2].asides, recorders[2].recorded) == (1, False)


@pytest.mark.parametrize(
    "cuda_graph, message",
    [
        ("on", "expected auto or off on cpu, got 'on'"),
        ("yes", "expected auto, on, off, got 'yes'"),
        (True, "expected auto, on, off, got True"),
    ],
)
def test_rejects_what_cannot_be(tmp_path, cuda_graph, message):
    for run in (
        lambda: train(Net(), cuda_graph=cuda_graph, out=tmp_path / "run"),
        lambda: inference.evaluate(Net(), image_set(), 8, cuda_graph=cuda_graph),
        lambda: inference.predict(Net(), image_set(), 8, cuda_graph=cuda_graph),
    ):
        with pytest.raises(ValueError, match=f"^cuda_graph: {message}$"):
            run()
    assert list(tmp_path.iterdir()) == []


def test_several_processes_cannot(monkeypatch):
    monkeypatch.setattr(device_config.ranks, "world_size", lambda: 2)
    cuda = torch.device("cuda")
    assert not device_config.use_graph("auto", cuda) and not device_config.use_graph("off", cuda)
    with pytest.raises(ValueError, match="^cuda_graph: expected auto or off in several processes"):
        device_config.use_graph("on", cuda)
    monkeypatch.undo()
    assert device_config.use_graph("on", cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch_split", [1, 3])
def test_graphs_of_a_gpu(precision, batch_split, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    options = dict(device="cuda", precision=precision, batch_split=batch_split, eval_every=5)
    eager, graphed = Net(), Net()
    expected = train(eager, eval_set=image_set(9), **options)
    result = train(graphed, eval_set=image_set(9), cuda_graph="on", **options)
    assert result.history == expected.history
    assert_same_bits(graphed, eager.state_dict())


@pytest.mark.gpu
def test_graphs_of_a_folded_model_on_a_gpu():
    model = bitkern.create_model("R26x0.5", num_classes=3, zero_head=False).cuda()
    model = bitkern.fold(model)
    options = dict(batch_size=4, device="cuda", precision="bf16")
    expected = inference.predict(model, image_set(9), 32, **options)
    logits = inference.predict(model, image_set(9), 32, cuda_graph="on", **options)
    assert torch.equal(logits, expected)
