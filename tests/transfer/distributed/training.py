"""Training and the command line in several processes. The tests compare the files they leave."""

import contextlib
import dataclasses
import io
import json

import pytest
import torch
import torch.distributed as dist

from bitkern.cli import main
from bitkern.transfer import HyperRule, TrainingError, image_folder, inference, ranks, training
from bitkern.transfer.data import decoders
from tests.cli.commands import SMALL, summary_of
from tests.transfer.images import image_set, write_folder
from tests.transfer.net import Net

# 4 processes share micro-batches of 6 and 5, and an evaluation of 21 images.
RULE = HyperRule(12, 8, 12, (4, 8), 2, mixup_alpha=0.2, base_lr=0.1, batch_size=11)
PLAIN = dataclasses.replace(RULE, mixup_alpha=0.0)
OPTIONS = {"eval_set": image_set(7), "batch_split": 2, "eval_every": 5, "progress": False}
SMALL = [*SMALL, "--batch-size", "9", "--device", "cpu"]


def another_start(model):
    """Give each process another model, which the first one's replaces."""
    if ranks.rank():
        torch.nn.init.normal_(model.head.weight)
    return model


def net():
    return another_start(Net(torch.float64))


def images_are_decoded_once_on_a_machine(folder):
    """By the first process; the others map what it keeps, in memory and on disk."""
    if not ranks.rank():
        write_folder(folder / "data")
    data = ranks.run_on_rank0(image_folder, folder / "data", "train")
    decoded, pillow, results = [], decoders.pillow, []
    options = {**OPTIONS, "eval_set": data, "workers": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(decoders.DECODERS, "pillow", lambda *a: decoded.append(a) or pillow(*a))
        patch.setenv("BITKERN_CACHE", str(folder / "cache"))
        for cache, count in (("off", None), ("ram", 24), ("disk", 24), ("auto", 0)):
            decoded.clear()
            results.append(training.train(net(), data, RULE, cache=cache, **options).history)
            if count is not None:
                assert len(decoded) == (0 if ranks.rank() else count), cache
            assert results[-1] == results[0], cache


def gradients_are_summed_in_few_all_reduces(folder):
    """Tensors of several dtypes and layouts, by buckets; one beyond a bucket is by itself."""
    reduce, sizes = dist.all_reduce, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dist, "all_reduce", lambda t, *a, **k: sizes.append(t.nbytes) or reduce(t, *a, **k)
        )
        for bucket_bytes, most in ((1 << 20, 2), (4096, 8)):
            patch.setattr(ranks, "BUCKET_BYTES", bucket_bytes)
            torch.manual_seed(dist.get_rank())
            tensors = [torch.randn(8, 4, 3, 3, dtype=torch.float64) for _ in range(5)]
            tensors += [torch.randn(16, 8, 2, 2).to(memory_format=torch.channels_last)]
            tensors += [torch.randn(7).expand(3, 7).clone().t(), torch.randn(()), torch.randn(5000)]
            expected = [t.clone() for t in tensors]
            for tensor in expected:
                reduce(dense := tensor.contiguous())
                tensor.copy_(dense)
            layouts = [t.stride() for t in tensors]
            sizes.clear()
            ranks.all_reduce_tensors(tensors)
            large = [size for size in sizes if size > 8]  # the others tell of failures
            assert len(large) <= most and sum(large) == sum(t.nbytes for t in tensors)
            assert [t.stride() for t in tensors] == layouts
            torch.testing.assert_close(tensors, expected)


def divergence_of_one_process_stops_all(folder):
    """At the same step, with the checkpoint before it, though its loss is read a step late."""
    for every, last, calls in ((7, 0, 2 * 7), (6, 6, 2 * 8)):
        model, out = net(), folder / str(every)

        def diverge(call, model=model):
            if call == 2 * 7:
                model.head.bias.data.fill_(torch.nan)  # as an update that went wrong would

        if dist.get_rank() == 1:
            model.on_call = diverge
        with pytest.raises(TrainingError, match="^the loss is nan at step 7: "):
            training.train(model, image_set(), RULE, out=out, checkpoint_every=every, **OPTIONS)
        assert model.calls == calls
        dist.barrier()
        assert out.exists() == bool(last)
        if last:
            assert torch.load(out / "last.pt")["progress"]["step"] == last
            assert len((out / "metrics.jsonl").read_text().splitlines()) == 6 + 1


def evaluation_of_fewer_images_than_processes(folder):
    model, data = Net(torch.float64), image_set(1)
    metrics = inference.evaluate(model, data, 8)
    with torch.no_grad():
        logits = inference.predict(model, data, 8)
    labels = torch.from_numpy(data.labels)
    assert metrics["top1"] == (logits.argmax(1) == labels).double().mean().item()
    loss = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert abs(metrics["eval_loss"] - loss) < 1e-12


def bad_arguments_are_told_by_all(folder):
    for batch_split, batch_size, message in (
        (3, 11, "batch_split: expected 1 to 2, the batch size of each process, got 3"),
        (1, 3, "batch_size: expected 4 or more, an image for each process, got 3"),
    ):
        rule = dataclasses.replace(RULE, batch_size=batch_size)
        with pytest.raises(ValueError, match=f"^{message}$"):
            training.train(net(), image_set(), rule, batch_split=batch_split)


def call(*arguments):
    """Exit code, stdout and stderr of the command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def command_line_ends_with_one_line(folder):
    """Whichever process meets the error, all end with code 2 and the first one says why."""
    rank = dist.get_rank()
    data = folder / "data"
    if rank == 0:
        write_folder(data, test=1)
    dist.barrier()
    finetune = ["finetune", "--data", data, "--out", folder / "out", *SMALL]
    missing = ["--weights", folder / "none.npz"] if rank == 2 else []
    cases = [
        ([*finetune, *missing], f"process 2: {folder}/none.npz: no such file"),
        ([*finetune, "--data", folder], f"{folder}/train: no such folder"),
        ([*finetune, "--batch-split", 3], "batch_split: expected 1 to 2"),
        ([*finetune, "--base-lr", 1e38, "--warmup-steps", 0], "loss is nan at step"),
        ([*finetune, "--device", "cuda:1"], "--device: expected cpu or cuda in several processes"),
        ([*finetune, "--colour"], "unrecognized arguments: --colour"),
        (["predict", folder, data], "torchrun: expected finetune, pretrain or evaluate"),
    ]
    for arguments, message in cases:
        code, out, err = call(*arguments)
        assert code == 2, (code, err)
        if rank:
            assert out == err == "", (out, err)
        else:
            assert err.startswith("bitkern: error: ") and err.count("\n") == 1, err
            assert message in err, err
        dist.barrier()
        assert not (folder / "out").exists()


def command_line_evaluates_together(folder):
    data, out = folder / "data", folder / "out"
    if dist.get_rank() == 0:
        write_folder(data, test=3)
    dist.barrier()
    code, shown, err = call("finetune", "--data", data, "--out", out, *SMALL)
    assert (code, err) == (0, "") and bool(shown) == (dist.get_rank() == 0)
    code, shown, err = call("evaluate", out, "--data", data, "--workers", 0, "--json")
    assert (code, err) == (0, "")
    if dist.get_rank() == 0:
        metrics, summary = json.loads(shown), summary_of(out)
        assert metrics["images"] == 9 and summary["processes"] == 4
        assert metrics["top1"] == summary["top1"]


CHECKS = (
    images_are_decoded_once_on_a_machine,
    gradients_are_summed_in_few_all_reduces,
    divergence_of_one_process_stops_all,
    evaluation_of_fewer_images_than_processes,
    bad_arguments_are_told_by_all,
    command_line_ends_with_one_line,
    command_line_evaluates_together,
)
