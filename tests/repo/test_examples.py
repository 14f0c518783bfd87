"""The examples do what their first lines say."""

import json
import re

import matplotlib
import pytest

from tests import ROOT
from tests.process import python

EXAMPLES = ROOT / "examples"


def run(name, *arguments):
    return python(EXAMPLES / name, *arguments, OMP_NUM_THREADS="1").stdout


def numbers(output, before):
    return [float(number) for number in re.findall(rf"{before} ([\d.e+-]+)", output)]


@pytest.mark.sweep
def test_convert_timm():
    output = run("convert_timm.py")
    assert re.search(r"25 timm ScaledStdConv2d +converted", output), output
    assert numbers(output, "logits differ by")[0] < 1e-6
    assert len(numbers(output, "accuracy")) == 3 and numbers(output, "accuracy")[-1] > 0.85


@pytest.mark.sweep
def test_detection_features():
    first, last = numbers(run("detection_features.py"), "loss")
    assert last < 0.6 * first


@pytest.mark.sweep
def test_hf_trainer():
    output = run("hf_trainer.py")
    assert re.search(r"17 transformers WeightStandardizedConv2d +converted", output), output
    assert numbers(output, "\naccuracy")[0] > 0.8


@pytest.mark.sweep
def test_log_to_tensorboard(tmp_path):
    name = "tensorboard.backend.event_processing.event_accumulator"
    reader = pytest.importorskip(name, reason="tensorboard is not installed")
    run("log_to_tensorboard.py", tmp_path)
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    metrics = {"top1", "top5", "balanced_accuracy", "macro_f1", "eval_loss"}
    assert set(events.Tags()["scalars"]) == {"loss", "lr"} | metrics
    assert [event.step for event in events.Scalars("top1")] == [20, 40, 60]
    losses = [event.value for event in events.Scalars("loss")]
    assert len(losses) == 60 and losses[-1] < 0.5 * losses[0]


def test_no_example_is_left_out():
    tested = {name.removeprefix("test_") + ".py" for name in globals() if name.startswith("test_")}
    assert {path.name for path in EXAMPLES.glob("*.py")} <= tested


@pytest.mark.sweep
def test_the_notebook_runs_from_top_to_bottom(capsys):
    matplotlib.use("Agg")
    notebook = json.loads((EXAMPLES / "finetune.ipynb").read_text())
    namespace = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
    assert namespace["result"].metrics["top1"] > 0.5
    assert "always naming one class" in capsys.readouterr().out
