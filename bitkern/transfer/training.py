"""A training from its checkpoint to its results."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bitkern.transfer import ranks
from bitkern.transfer.data.images import ImageSet, notes
from bitkern.transfer.data.loader import TrainBatches, kept_on, open_for
from bitkern.transfer.data.opening import Reading, open_resized
from bitkern.transfer.data.resized import Resized, check_classes
from bitkern.transfer.fit import Due, Fit, corrupt_everywhere
from bitkern.transfer.fitting import Trial
from bitkern.transfer.inference import Share, gathered, metrics_of
from bitkern.transfer.reduction import Reduction
from bitkern.transfer.report import write_report
from bitkern.transfer.run import REPORT, Progress, Record, Run, load_checkpoint, read_checkpoint
from bitkern.transfer.selection import Kept, Selection
from bitkern.transfer.setup import Setup
from bitkern.transfer.watching import Display, Stopped, deferred_interrupt


class TrainResult(NamedTuple):
    """What ``train`` returns.

    ``metrics`` is the last evaluation (see ``evaluate``; None without ``eval_set``);
    ``history`` the lines of metrics.jsonl: ``{"step", "loss", "lr"}`` for each optimizer step and
    ``{"step", "top1", "top5", "eval_loss", …}`` for each evaluation, where step counts finished
    steps; ``seconds`` the wall time, evaluations and earlier parts of a resumed run included;
    ``skipped`` the number of images that could not be read, where not all were, of those that were
    met.
    """

    metrics: dict[str, float] | None
    history: list[Record]
    seconds: float
    skipped: int


@dataclasses.dataclass
class Training:
    """A training in its stages, which share what they make."""

    setup: Setup
    reading: Reading
    eval_set: ImageSet | None
    selection: Selection | None
    folder: Path | None
    due: Due
    shown: bool
    about: dict[str, Any]

    def __post_init__(self) -> None:
        self.model = self.setup.model
        self.optimizer = self.setup.optimizer()
        self.kept = Kept(self.model)
        self.done = Progress()

    def restore(self, resume: bool, auto_precision: bool, auto_split: bool) -> bool:
        """Place the model on its device, with what a checkpoint holds; whether there is one."""
        folder, setup = self.folder, self.setup
        with ranks.together():
            checkpoint = read_checkpoint(folder) if folder and resume else None
            if checkpoint and auto_precision:
                precision = checkpoint["settings"]["precision"]
                compute = setup.compute._replace(precision=precision)
                setup = dataclasses.replace(setup, compute=compute)
            setup.compute.place(self.model)
            self.reduction = Reduction(self.model)
        self.scaler = setup.compute.scaler()
        if folder and checkpoint:
            if auto_split:
                setup = dataclasses.replace(
                    setup, batch_split=checkpoint["settings"]["batch_split"]
                )
            with ranks.together():
                settings = setup.settings | self._chosen
                self.done = load_checkpoint(folder, checkpoint, self._state, settings)
                self.about = checkpoint["about"]
        self.setup = setup
        return checkpoint is not None

    @property
    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        parts = {"model": self.model, "optimizer": self.optimizer}
        return {**parts, "scaler": self.scaler, "kept": self.kept}

    @property
    def _chosen(self) -> dict[str, Any]:
        return self.selection.settings if self.selection else {"keep": "last"}

    def open_images(self) -> None:
        """Open the sets; ``evaluation`` is used while training, ``test`` at the end."""
        rule, reading, skip_corrupt = self.setup.rule, self.reading, self.reading.skip_corrupt
        if self.done.corrupt and not skip_corrupt:
            raise ValueError(
                "the run goes on without images that it could not read: skip_corrupt=True"
            )
        train_set = self.setup.train_set
        images = open_for(rule, train_set.images, reading)
        self.train_images = self._told(images, train_set, "training")
        for i in self.done.corrupt:  # so that others go on in their place, if they can be read now
            reason = f"{train_set.images[i]}: could not be read before"
            self.train_images.corrupt.setdefault(i, reason)

        def opened(data: ImageSet, name: str) -> tuple[Resized, ImageSet]:
            return self._told(open_resized(data.images, rule.crop, reading), data, name), data

        self.test = None if self.eval_set is None else opened(self.eval_set, "evaluation")
        self.evaluation = self.test
        if self.selection and self.selection.val_set is not self.eval_set:
            self.evaluation = opened(self.selection.val_set, "validation")
        with ranks.together():
            self.on_device = kept_on(self.setup.compute.device, self.train_images)
        # Before the memory is tried: with its first message NCCL takes its buffers.
        ranks.copy_from_first(self.model.state_dict().values())

    def _told(self, images: Resized, data: ImageSet, name: str) -> Resized:
        """The images that were opened, of which a user is told how."""
        with ranks.together():
            check_classes(data, images)
        if self.shown:
            print(f"image cache, {name}: {images.cache}")
        return images

    def fit_memory(self, auto: bool) -> Trial:
        """Try a micro-batch, of the size that fits if ``auto``; what it takes."""
        parts = self.optimizer, self.scaler, self.reduction
        self.setup, trial = self.setup.fitted(*parts, auto)
        return trial

    def run(
        self, resume: bool, trial: Trial | None, on_record: Callable[[Record], object] | None
    ) -> TrainResult:
        """Take the steps that are left, and write the results."""
        setup, rule = self.setup, self.setup.rule
        split = "validation" if self.selection else self.about.get("evaluated_on", "test")
        out = self.folder if ranks.rank() == 0 else None
        run = Run(out, self._state, setup.settings | self._chosen, self.about, self.done)
        with contextlib.ExitStack() as stack:
            with ranks.together():
                journal = stack.enter_context(run.recording(resume, on_record))
            journal.records = ranks.from_first(lambda: journal.records)
            shown = split, self.shown, self.done.seconds
            display = stack.enter_context(
                contextlib.closing(Display(self.done.step, rule.steps, *shown))
            )
            fit = Fit(
                setup,
                run,
                display,
                stack.enter_context(deferred_interrupt(self.shown)),
                self.train_images,
                self.evaluation,
                self.due,
                self.reading.skip_corrupt,
                self.selection,
                self.kept,
            )
            if self.shown and trial:
                display.say(fit.estimate(trial))
            batches = TrainBatches(
                setup.train_set,
                self.train_images,
                setup.schedule,
                setup.compute,
                flip=setup.flip,
                skip_corrupt=self.reading.skip_corrupt,
                start=self.done.step,
                on_device=self.on_device,
            )
            loading = stack.enter_context(contextlib.closing(iter(batches)))
            parts = self.optimizer, self.scaler, self.reduction
            share = fit.steps(setup.stepper(*parts, loading, fit.between))
            return self._finish(run, fit, share)

    def _finish(self, run: Run, fit: Fit, share: Share | None) -> TrainResult:
        """Evaluate the model that is kept, and write the results."""
        skipped, journal = len(corrupt_everywhere(self.train_images)), run.journal
        outcome = metrics = None
        if self.selection and self.selection.keep == "best":
            self.kept.put_back()
        if self.test:
            if share is None or self.selection:  # or stopped between its last step and its end
                try:
                    share = fit.predict(*self.test)
                except Stopped:
                    raise KeyboardInterrupt from None
            skipped += len(self.test[1].images) - share.readable
            metrics = metrics_of(share, self.test[1])
            outcome = gathered(share, self.test[1]) if self.folder else None
        result = TrainResult(metrics, journal.records, fit.seconds, skipped)
        with ranks.together():
            summary = self._summary(result, fit.step, share)
            setup, train_set = self.setup, self.setup.train_set
            metadata = {"classes": list(train_set.classes), "crop": setup.rule.crop}
            metadata |= {"multi_label": train_set.multi_label, "decoder": setup.decoder}
            run.save_results(**metadata)
            if run.out and outcome:
                known = {"seconds", *(result.metrics or {})}  # and the report's are its own
                settings = {name: value for name, value in summary.items() if name not in known}
                page, history = run.out / REPORT, journal.records
                write_report(page, *outcome, history=history, about=settings)
            run.finish(summary)
        return result

    def _summary(self, result: TrainResult, step: int, share: Share | None) -> dict[str, Any]:
        setup, train_set = self.setup, self.setup.train_set
        selection = self.selection.about(result.history) if self.selection else {}
        return {
            **self.about,
            **(result.metrics or {}),
            "steps": step,
            **selection,
            "seconds": round(result.seconds, 1),
            "classes": len(train_set.classes),
            "training_images": len(train_set.images),
            "multi_label": train_set.multi_label,
            "evaluation_images": share.readable if share else 0,
            "skipped_images": result.skipped,
            **({"images": [*notes]} if notes else {}),
            "rule": dataclasses.asdict(setup.rule),
            **setup.options,
            "cuda_graph": setup.compute.cuda_graph,
            "device": str(setup.compute.device),
            "processes": ranks.world_size(),
            "torch": torch.__version__,
        }
