"""A training in its stages: restore, open images, find the micro-batch, train, write results."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitkern.transfer import balance, ranks
from bitkern.transfer.curves import Record
from bitkern.transfer.data.decoders import notes
from bitkern.transfer.data.images import ImageSet
from bitkern.transfer.data.loader import TrainBatches, copy_to_gpu, open_for_recipe
from bitkern.transfer.data.open_images import open_resized
from bitkern.transfer.data.resized import ResizedImages, check_classes
from bitkern.transfer.gradient_reducer import GradientReducer
from bitkern.transfer.inference import RankPredictions
from bitkern.transfer.loop import TrainingError, TrainLoop, gather_corrupt
from bitkern.transfer.micro_batch import (
    CPU_IMAGES,
    Trial,
    images_that_fit,
    smallest_split,
    try_step,
)
from bitkern.transfer.progress import Display, StopRequested, deferred_interrupt
from bitkern.transfer.report import write_report
from bitkern.transfer.run import REPORT, Progress, Run, load_checkpoint, read_checkpoint
from bitkern.transfer.selection import BestModel
from bitkern.transfer.step import TrainStep
from bitkern.transfer.train_setup import TrainSetup


class TrainResult(NamedTuple):
    """The result of ``train``.

    ``metrics`` is the last evaluation (see ``evaluate``; None without ``eval_set``);
    ``history`` the lines of metrics.jsonl: ``{"step", "loss", "lr"}`` for each optimizer step and
    ``{"step", "top1", "top5", "eval_loss", …}`` for each evaluation, where step counts finished
    steps; ``seconds`` the wall time, including evaluations and earlier parts of a resumed run;
    ``skipped`` the number of images that could not be read, among those that were used.
    """

    metrics: dict[str, float] | None
    history: list[Record]
    seconds: float
    skipped: int


class Trainer:
    """The stages of a training, called in the order of the methods."""

    def __init__(self, setup: TrainSetup) -> None:
        self.setup, self.model = setup, setup.model
        self.optimizer = setup.optimizer()
        self.best_model = BestModel(self.model)
        self.done = Progress()

    def restore(self, resume: bool, auto_precision: bool, auto_split: bool) -> bool:
        """Move the model to its device and load a checkpoint; returns True if there is one."""
        folder, setup = self.setup.folder, self.setup
        with ranks.propagate_errors():
            checkpoint = read_checkpoint(folder) if folder and resume else None
            if checkpoint:
                began, config = checkpoint["settings"], setup.config
                if auto_precision:
                    config = config._replace(precision=began["precision"])
                split = began["batch_split"] if auto_split else setup.batch_split
                about = checkpoint["about"]
                setup = dataclasses.replace(setup, config=config, batch_split=split, about=about)
            setup.config.place(self.model)
            self.reducer = GradientReducer(self.model)
            self.setup, self.scaler = setup, setup.config.scaler()
            if folder and checkpoint:
                self.done = load_checkpoint(folder, checkpoint, self._state, setup.settings)
        return checkpoint is not None

    @property
    def _state(self) -> dict[str, Any]:
        """The objects that a checkpoint holds."""
        parts = {"model": self.model, "optimizer": self.optimizer}
        return {**parts, "scaler": self.scaler, "kept": self.best_model}

    def open_images(self) -> None:
        """Open the sets; ``evaluation`` is used while training, ``test`` at the end."""
        setup, rule, train_set = self.setup, self.setup.rule, self.setup.train_set
        options = setup.read_options
        if self.done.corrupt and not options.skip_corrupt:
            raise ValueError(
                "the run has skipped images that it could not read: resume it with "
                "skip_corrupt=True"
            )
        images = open_for_recipe(rule, train_set.images, options)
        self.train_images = self._checked(images, train_set, "training")
        for i in self.done.corrupt:  # they stay replaced, even if they can be read now
            reason = f"{train_set.images[i]}: could not be read before"
            self.train_images.corrupt.setdefault(i, reason)

        def open_set(data: ImageSet, name: str) -> tuple[ResizedImages, ImageSet]:
            return self._checked(open_resized(data.images, rule.crop, options), data, name), data

        self.test = None if setup.eval_set is None else open_set(setup.eval_set, "evaluation")
        self.evaluation = self.test
        if setup.selection and setup.selection.val_set is not setup.eval_set:
            self.evaluation = open_set(setup.selection.val_set, "validation")
        with ranks.propagate_errors():
            self.on_device = copy_to_gpu(setup.config.device, self.train_images)
        # Before the micro-batch is tried, because NCCL allocates buffers with its first message.
        ranks.broadcast_from_rank0(self.model.state_dict().values())

    def _checked(self, images: ResizedImages, data: ImageSet, name: str) -> ResizedImages:
        with ranks.propagate_errors():
            check_classes(data, images)
        if self.setup.shown:
            print(f"image cache, {name}: {images.cache}")
        return images

    def fit_memory(self, auto: bool) -> Trial:
        """Try a micro-batch; if ``auto``, set ``batch_split`` to the smallest that fits.

        On a CPU micro-batches of more than ``CPU_IMAGES`` are not tried. Raises ``TrainingError``
        if the memory does not suffice.
        """
        setup, trials = self.setup, dict[int, Trial | None]()

        def try_split(batch_split: int) -> Trial | None:
            if batch_split not in trials:
                split = dataclasses.replace(setup, batch_split=batch_split)
                trials[batch_split] = try_step(self._train_step(split, split.blank_batches()))
            return trials[batch_split]

        device, most, few = setup.config.device, setup.most_splits, 1
        fit = limit = setup.rule.batch_size
        if device.type == "cpu":
            # Batch normalization cannot be trained on one image with maps of one pixel.
            few += any(hasattr(module, "running_mean") for module in self.model.modules())
            fit = images_that_fit(lambda images: try_split(math.ceil(most / images)), few)
            limit = min(fit, CPU_IMAGES)
        batch_split: int | None = setup.batch_split
        if auto:
            least = math.ceil(most / limit) if limit else most
            batch_split = smallest_split(lambda split: try_split(split) is not None, most, least)
        too_many = setup.micro_batch > fit if not auto else not fit and few == 1
        trial = None if too_many or batch_split is None else try_split(batch_split)
        if batch_split is None or trial is None:
            images, advice = "one image", "lower the crop or take a smaller model"
            if not auto and setup.micro_batch > 1:
                images, advice = f"{setup.micro_batch} images", "raise batch_split"
            raise TrainingError(f"not enough memory on {device} for {images} at a time: {advice}")
        self.setup = dataclasses.replace(setup, batch_split=batch_split)
        return trial

    def _train_step(
        self,
        setup: TrainSetup,
        batches: Iterator[Sequence[Tensor]],
        *on_micro_batch: Callable[[int], object],
    ) -> TrainStep:
        class_weight = None
        if setup.balance == "loss":
            weights = balance.class_weights(setup.train_set.labels, len(setup.train_set.classes))
            class_weight = torch.from_numpy(weights).float()
        parts = self.model, self.optimizer, setup.schedule, setup.config, batches
        return TrainStep(*parts, self.scaler, self.reducer, class_weight, *on_micro_batch)

    def run(
        self, resume: bool, trial: Trial | None, on_record: Callable[[Record], object] | None
    ) -> TrainResult:
        """Take the remaining steps, and write the results."""
        setup, rule = self.setup, self.setup.rule
        split = "validation" if setup.selection else setup.about.get("evaluated_on", "test")
        out = setup.folder if ranks.rank() == 0 else None
        run = Run(out, self._state, setup.settings, setup.about, self.done)
        with contextlib.ExitStack() as stack:
            with ranks.propagate_errors():
                journal = stack.enter_context(run.recording(resume, on_record))
            journal.records = ranks.run_on_rank0(lambda: journal.records)
            display = Display(self.done.step, rule.steps, split, setup.shown, self.done.seconds)
            stack.enter_context(contextlib.closing(display))
            interrupted = stack.enter_context(deferred_interrupt(setup.shown))
            images = self.train_images, self.evaluation
            loop = TrainLoop(setup, run, display, interrupted, *images, self.best_model)
            if setup.shown and trial:
                display.print(loop.estimate(trial))
            parts = setup.train_set, self.train_images, setup.schedule, setup.config, setup.flip
            skip_corrupt = setup.read_options.skip_corrupt
            batches = TrainBatches(*parts, skip_corrupt, self.done.step, self.on_device)
            loading = stack.enter_context(contextlib.closing(iter(batches)))
            predictions = loop.fit(self._train_step(setup, loading, loop.on_micro_batch))
            return self._finish(run, loop, predictions)

    def _finish(
        self, run: Run, loop: TrainLoop, predictions: RankPredictions | None
    ) -> TrainResult:
        """Evaluate the selected model, and write the results."""
        setup, journal = self.setup, run.journal
        skipped = len(gather_corrupt(self.train_images))
        evaluated = metrics = None
        self.best_model.restore()
        if self.test:
            # There are no predictions if the run was stopped after its last step.
            if predictions is None or setup.selection:
                try:
                    predictions = loop.predict(*self.test)
                except StopRequested:
                    raise KeyboardInterrupt from None
            skipped += len(self.test[1].images) - predictions.readable
            metrics = predictions.metrics()
            evaluated = predictions.gather() if setup.folder else None
        result = TrainResult(metrics, journal.records, loop.seconds, skipped)
        with ranks.propagate_errors():
            images = predictions.readable if predictions else 0
            summary = self._summary(result, loop.step, images)
            metadata = {"classes": list(setup.train_set.classes), "crop": setup.rule.crop}
            metadata |= {"multi_label": setup.train_set.multi_label, "decoder": setup.decoder}
            run.save_results(**metadata)
            if run.out and evaluated:
                known = {"seconds", *(result.metrics or {})}  # the report has its own metrics
                about = {name: value for name, value in summary.items() if name not in known}
                write_report(run.out / REPORT, *evaluated, history=journal.records, about=about)
            run.finish(summary)
        return result

    def _summary(self, result: TrainResult, step: int, evaluation_images: int) -> dict[str, Any]:
        setup, train_set = self.setup, self.setup.train_set
        selection = setup.selection.about(result.history) if setup.selection else {}
        return {
            **setup.about,
            **(result.metrics or {}),
            "steps": step,
            **selection,
            "seconds": round(result.seconds, 1),
            "classes": len(train_set.classes),
            "training_images": len(train_set.images),
            "multi_label": train_set.multi_label,
            "evaluation_images": evaluation_images,
            "skipped_images": result.skipped,
            **({"images": [*notes]} if notes else {}),
            "rule": dataclasses.asdict(setup.rule),
            **setup.options,
            "cuda_graph": setup.config.cuda_graph,
            "device": str(setup.config.device),
            "processes": ranks.world_size(),
            "torch": torch.__version__,
        }
