"""The best model by images held out, and an early end; resumed to the same bits."""

import pytest
import torch

from bitkern.transfer import Selection, evaluate
from tests.cli.commands import SMALL, call, error_of, summary_of
from tests.transfer.images import image_set, write_folder
from tests.transfer.net import Crash, Net, assert_same_bits, crash_always, state_of, train

RECORDS = [
    {"step": 1, "loss": 1.0, "lr": 0.1},
    {"step": 1, "top1": 0.5, "balanced_accuracy": 0.4, "macro_f1": 0.3, "eval_loss": 1.0},
    {"step": 2, "top1": 0.7, "balanced_accuracy": 0.3, "macro_f1": 0.3, "eval_loss": 2.0},
    {"step": 3, "top1": 0.7, "balanced_accuracy": 0.5, "macro_f1": 0.2, "eval_loss": 0.5},
    {"step": 4, "top1": 0.1, "balanced_accuracy": 0.5, "macro_f1": 0.4, "eval_loss": 3.0},
]


@pytest.mark.parametrize(
    ("metric", "step"), [("top1", 2), ("balanced_accuracy", 3), ("macro_f1", 4), ("loss", 3)]
)
def test_the_earliest_of_the_best(metric, step):
    assert Selection(image_set(), metric=metric).best(RECORDS)["step"] == step
    for patience in range(1, 5):
        selection = Selection(image_set(), metric=metric, patience=patience)
        assert selection.is_over(RECORDS) == (4 - step >= patience)
    assert not selection.is_over(RECORDS[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "first"}, "keep: expected last or best, got 'first'"),
        ({"metric": "top5"}, "metric: expected top1, balanced_accuracy, macro_f1, loss, got"),
        ({"patience": 0}, "patience: expected a positive number, got 0"),
        ({"val_set": image_set().subset([])}, "val_set: expected images, got none"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Selection(**{"val_set": image_set(), **options})


def worst_at_the_end(model):
    """From the 12th step on its head is worse and worse."""

    def spoil(call):
        if call > 12:
            model.head.weight.data.neg_()
            model.head.bias.data[call % 3] += 3

    model.on_call = spoil
    return model


def test_keeps_the_best_and_ends_early(tmp_path):
    val_set, test_set = image_set(3), image_set(2)
    selection = Selection(val_set, metric="loss", patience=2)
    options = dict(eval_set=test_set, eval_every=2, checkpoint_every=3, selection=selection)
    model = worst_at_the_end(Net())
    result = train(model, out=tmp_path / "straight", **options)
    evaluations = {r["step"]: r["eval_loss"] for r in result.history if "eval_loss" in r}
    best = min(evaluations, key=evaluations.get)
    assert best == 12 and max(evaluations) == best + 4, "two evaluations later"
    assert evaluate(model, val_set, 8)["eval_loss"] == pytest.approx(evaluations[best], rel=1e-5)
    assert result.metrics == evaluate(model, test_set, 8), "of the test set, in the end"
    summary = summary_of(tmp_path / "straight")
    assert (summary["kept_step"], summary["steps"]) == (best, best + 4)
    assert (summary["keep"], summary["metric"], summary["patience"]) == ("best", "loss", 2)
    assert summary["validation_images"] == 9 and summary["evaluation_images"] == 6

    for crash in (5, 14, 16):  # before the best, after it, and where it would end
        out = tmp_path / str(crash)
        stopped, resumed = worst_at_the_end(Net()), worst_at_the_end(Net())
        spoil = stopped.on_call
        stopped.on_call = lambda call, spoil=spoil, at=crash: (
            crash_always() if call == at else spoil(call)
        )
        with pytest.raises(Crash):
            train(stopped, out=out, **options)
        with pytest.raises(ValueError, match="started with keep 'best', now 'last'"):
            train(Net(), out=out, resume=True, **options | {"selection": None})
        resumed.calls = torch.load(out / "last.pt", weights_only=True)["progress"]["step"]
        again = train(resumed, out=out, resume=True, **options)
        assert again.history == result.history and again.metrics == result.metrics
        assert_same_bits(resumed, state_of(model))


def test_from_the_command_line(tmp_path, capsys):
    folder = write_folder(tmp_path / "data")
    arguments = ["finetune", "--data", folder, *SMALL, "--eval-every", 1, "--keep", "best"]
    assert "no such folder" in error_of(capsys, *arguments, "--out", tmp_path / "none")
    write_folder(tmp_path / "more", test=3)
    (tmp_path / "more" / "test").rename(folder / "val")
    for file in (folder / "val").rglob("*.jpg"):
        file.write_bytes((folder / "val" / "cat" / "0.jpg").read_bytes())
    assert call(*arguments, "--out", tmp_path / "one", "--metric", "balanced_accuracy") == 0
    said = capsys.readouterr().out
    assert "best model by balanced_accuracy on 9 images\n" in said and "validation loss" in said
    assert "on 6 test images" in said
    (folder / "test").rename(tmp_path / "elsewhere")
    assert call(*arguments, "--out", tmp_path / "two", "--patience", 1, "--holdout", 0.5) == 0
    summary = summary_of(tmp_path / "two")
    assert (summary["training_images"], summary["validation_images"]) == (6, 6)
