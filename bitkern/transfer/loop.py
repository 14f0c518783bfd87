"""The training loop: steps, evaluations and checkpoints."""

import contextlib
import dataclasses
import math
import threading
import time

from bitkern.text import format_duration
from bitkern.transfer import ranks
from bitkern.transfer.data.images import ImageSet
from bitkern.transfer.data.resized import ResizedImages
from bitkern.transfer.inference import RankPredictions, predict_on_rank
from bitkern.transfer.micro_batch import Trial
from bitkern.transfer.progress import Display, StopRequested
from bitkern.transfer.recipes import Recipe
from bitkern.transfer.recipes.hyperrule import HyperRule
from bitkern.transfer.run import Progress, Run
from bitkern.transfer.selection import BestModel
from bitkern.transfer.step import AsyncScalar, TrainStep
from bitkern.transfer.train_setup import TrainSetup

FORWARD = 3  # duration of forward and backward relative to forward alone
LONG = 3600  # seconds on a CPU after which the quick preset is suggested


class TrainingError(RuntimeError):
    """Training cannot continue: the loss is not finite, or there is too little memory."""


@dataclasses.dataclass
class TrainLoop:
    """The loop of a training, from the run's current step on."""

    setup: TrainSetup
    run: Run
    display: Display
    interrupted: threading.Event
    train_images: ResizedImages
    evaluation: tuple[ResizedImages, ImageSet] | None
    best_model: BestModel

    def __post_init__(self) -> None:
        self.step = self.run.done.step
        self.began = time.perf_counter() - self.run.done.seconds
        self.unread: tuple[int, AsyncScalar] | None = None  # the last step, and its loss
        self.predictions: RankPredictions | None = None
        # Within a step only if no other process waits and gradients are the only state.
        has_buffers = any(True for _ in self.setup.model.buffers())
        self.stops_within_step = ranks.world_size() == 1 and not has_buffers

    @property
    def seconds(self) -> float:
        """Wall time, including that before the run was resumed."""
        return time.perf_counter() - self.began

    def on_micro_batch(self, done: int = 0) -> None:
        """Show that ``done`` micro-batches of the step are done. Raises ``StopRequested``."""
        if done:
            self.display.update(self.step + done / self.setup.batch_split)
        if self.stops_within_step and self.interrupted.is_set():
            raise StopRequested

    def fit(self, take_step: TrainStep) -> RankPredictions | None:
        """Take the remaining steps; returns the predictions of the last evaluation.

        Raises KeyboardInterrupt after Ctrl-C, once the finished steps are saved.
        """
        rule, selection = self.setup.rule, self.setup.selection
        first, records = self.step, self.run.journal.records
        while True:
            with contextlib.suppress(StopRequested):
                self._evaluate_if_due()
            (stop,) = ranks.all_reduce_sum(self.interrupted.is_set())
            over = self.step == rule.steps or bool(selection and selection.is_over(records))
            due = over or self.setup.is_due(self.step, self.setup.checkpoint_every)
            if stop or self.step > first and due:
                self._read_loss()  # raises if it is not finite, so that no such step is saved
                corrupt = gather_corrupt(self.train_images)
                with ranks.propagate_errors():
                    self.run.save(Progress(self.step, self.seconds, corrupt=corrupt))
            if stop:
                raise KeyboardInterrupt
            if over:
                break
            try:
                loss = AsyncScalar(take_step(self.step, rule.lr(self.step)))
                self._read_loss()  # that of the step before, while the device computes this one
                self.step += 1
                self.unread = self.step, loss
                self.display.update(self.step)
            except StopRequested:
                take_step.optimizer.zero_grad()  # those of a part of the step
        return self.predictions

    def _read_loss(self) -> None:
        """Record the unread loss, if any. Raises TrainingError if it is not finite."""
        if self.unread is None:
            return
        (step, scalar), self.unread = self.unread, None
        with ranks.propagate_errors():
            own_loss = scalar.value()
        (loss,) = ranks.all_reduce_sum(own_loss)
        rule, journal = self.setup.rule, self.run.journal
        _check_finite(loss, "loss", step, rule)
        journal.add(step=step, loss=loss, lr=rule.lr(step - 1))
        self.display.show(journal.records[-1])

    def estimate(self, trial: Trial) -> str:
        """Describe the memory and time of the training, extrapolated from a micro-batch."""
        rule, setup = self.setup.rule, self.setup
        per_image = trial.seconds / setup.micro_batch
        left = range(self.step + 1, rule.steps + 1)
        evaluations = sum(setup.is_due(step, setup.eval_every) for step in left)
        eval_images = evaluations * (len(self.evaluation[1].images) if self.evaluation else 0)
        eval_cost = eval_images / FORWARD / ranks.world_size()  # in training images
        step = setup.batch_split * trial.seconds
        total = len(left) * step + eval_cost * per_image
        device, memory = setup.config.device, trial.memory
        if device.type == "cpu":  # the images in RAM are not resident yet
            sets = self.train_images, *([self.evaluation[0]] if self.evaluation else [])
            memory += sum(images.cached.nbytes for images in sets if images.cached is not None)
        text = (
            f"estimate: {memory / 1e9:.1f} GB of {'GPU ' * (device.type == 'cuda')}memory, "
            f"{format_duration(step)} per step, {format_duration(total)} in total "
            f"({len(left)} steps of {rule.batch_size} images of {rule.crop}x{rule.crop}, "
            f"{setup.micro_batch} at a time)"
        )
        if device.type != "cpu" or total < LONG or not isinstance(rule, HyperRule):
            return text
        quick = rule.quick()
        quick_images = quick.steps * quick.batch_size + 10 * eval_cost / max(1, evaluations)
        quick_time = quick_images * per_image * (quick.crop / rule.crop) ** 2
        command = self.run.about.get("command")
        how = f"{command} --preset quick --out {self.run.out}-quick" if command else "rule.quick()"
        return (
            f"{text}\n{format_duration(quick_time)} instead, usually less accurate, with images of "
            f"{quick.crop}x{quick.crop} and {quick.steps} steps of {quick.batch_size}: {how}"
        )

    def _evaluate_if_due(self) -> None:
        setup, journal = self.setup, self.run.journal
        due = self.step > 0 and setup.is_due(self.step, setup.eval_every)
        done = any(r["step"] == self.step and "top1" in r for r in journal.records[-1:])
        if not self.evaluation or not due or done:
            return
        self._read_loss()
        self.predictions = self.predict(*self.evaluation)
        metrics = self.predictions.metrics()
        _check_finite(metrics["eval_loss"], "evaluation loss", self.step, setup.rule)
        journal.add(step=self.step, **metrics)
        self.display.show(journal.records[-1])
        if setup.selection and setup.selection.keep == "best":
            if setup.selection.best(journal.records) is journal.records[-1]:
                self.best_model.save()

    def predict(self, resized: ResizedImages, data: ImageSet) -> RankPredictions:
        """Predict this process's share of a set. Raises ``StopRequested`` after Ctrl-C."""
        parts = self.setup.config, self.setup.model, resized, data, self.setup.micro_batch
        return predict_on_rank(*parts, self.setup.read_options.skip_corrupt, self.on_micro_batch)


def gather_corrupt(images: ResizedImages) -> tuple[int, ...]:
    """Return the images that any process could not read."""
    return tuple(sorted({i for rank in ranks.all_gather_object([*images.corrupt]) for i in rank}))


def _check_finite(loss: float, name: str, step: int, rule: Recipe) -> None:
    if not math.isfinite(loss):
        lr_name, lr = "base_lr", getattr(rule, "base_lr", None)
        if lr is None:
            lr_name, lr = "learning rate", rule.lr(step - 1)
        raise TrainingError(
            f"the {name} is {loss} at step {step}: try a lower {lr_name} (now {lr:g})"
        )
