"""The steps of a training, with its evaluations and checkpoints."""

import contextlib
import dataclasses
import math
import threading
import time
from typing import NamedTuple

from torch import Tensor

from bitkern.transfer import ranks
from bitkern.transfer.data.images import ImageSet
from bitkern.transfer.data.resized import Resized
from bitkern.transfer.fitting import Trial
from bitkern.transfer.inference import Share, metrics_of, predict_share
from bitkern.transfer.recipes import Recipe
from bitkern.transfer.recipes.hyperrule import HyperRule
from bitkern.transfer.run import Journal, Progress, Run
from bitkern.transfer.selection import Kept, Selection
from bitkern.transfer.setup import Setup, TrainingError
from bitkern.transfer.step import Later, Stepper
from bitkern.transfer.watching import Display, Stopped, duration

FORWARD = 3  # times as long take both passes as the forward pass alone
LONG = 3600  # seconds on a CPU, after which a shorter training is named


class Due(NamedTuple):
    """After which of ``steps`` steps something is done: every so many, and after the last."""

    steps: int
    eval_every: int | None
    checkpoint_every: int | None

    def _is(self, step: int, every: int | None) -> bool:
        return step == self.steps or step % (every or max(1, self.steps // 10)) == 0

    def evaluation(self, step: int) -> bool:
        """Whether there is an evaluation after so many steps."""
        return step > 0 and self._is(step, self.eval_every)

    def checkpoint(self, step: int) -> bool:
        """Whether there is a checkpoint after so many steps."""
        return self._is(step, self.checkpoint_every)


@dataclasses.dataclass
class Fit:
    """A training from the step on at which its run is."""

    setup: Setup
    run: Run
    display: Display
    interrupted: threading.Event
    train_images: Resized
    evaluation: tuple[Resized, ImageSet] | None
    due: Due
    skip_corrupt: bool
    selection: Selection | None
    kept: Kept

    def __post_init__(self) -> None:
        rule, self.step = self.setup.rule, self.run.done.step
        self.losses = _Losses(rule, self.run.journal, self.display)
        self.began = time.perf_counter() - self.run.done.seconds
        self.share: Share | None = None
        # Only where no other process waits, and where nothing but gradients is lost.
        buffers = any(True for _ in self.setup.model.buffers())
        self.stops_between = ranks.world_size() == 1 and not buffers

    @property
    def seconds(self) -> float:
        """Of wall time, those before the run was resumed included."""
        return time.perf_counter() - self.began

    def between(self, done: int = 0) -> None:
        """Between micro-batches, of which so many of the step are done. Raises ``Stopped``."""
        if done:
            self.display.move(self.step + done / self.setup.batch_split)
        if self.stops_between and self.interrupted.is_set():
            raise Stopped

    def steps(self, take_step: Stepper) -> Share | None:
        """Take the steps that are left; what the last evaluation computed of its set.

        Raises KeyboardInterrupt after Ctrl-C, when all that is done is saved.
        """
        rule, first = self.setup.rule, self.step
        while True:
            with contextlib.suppress(Stopped):
                self._evaluate_if_due()
            (stop,) = ranks.sums_of(self.interrupted.is_set())
            over = self.step == rule.steps or self._is_over()
            if stop or self.step > first and (over or self.due.checkpoint(self.step)):
                self._save()
            if stop:
                raise KeyboardInterrupt
            if over:
                break
            try:
                self.losses.add(self.step, take_step(self.step, rule.lr(self.step)))
                self.step += 1
                self.display.move(self.step)
            except Stopped:
                take_step.optimizer.zero_grad()  # of a part of the step
        return self.share

    def _is_over(self) -> bool:
        return bool(self.selection and self.selection.is_over(self.run.journal.records))

    def estimate(self, trial: Trial) -> str:
        """Say in a line what the training takes, by what a micro-batch does."""
        rule, setup = self.setup.rule, self.setup
        per_image = trial.seconds / setup.micro_batch
        left = range(self.step + 1, rule.steps + 1)
        evaluations = sum(map(self.due.evaluation, left))
        tested = evaluations * (len(self.evaluation[1].images) if self.evaluation else 0)
        tested_as = tested / FORWARD / ranks.world_size()
        step = setup.batch_split * trial.seconds
        total = len(left) * step + tested_as * per_image
        device, memory = setup.compute.device, trial.memory
        if device.type == "cpu":  # whose images are used from now on
            sets = self.train_images, *([self.evaluation[0]] if self.evaluation else [])
            memory += sum(images.kept.nbytes for images in sets if images.kept is not None)
        said = (
            f"estimate: {memory / 1e9:.1f} GB of {'GPU ' * (device.type == 'cuda')}memory, "
            f"{duration(step)} a step, {duration(total)} in all ({len(left)} steps of "
            f"{rule.batch_size} images of {rule.crop}x{rule.crop}, {setup.micro_batch} at a time)"
        )
        if device.type != "cpu" or total < LONG or not isinstance(rule, HyperRule):
            return said
        quick = rule.quick()
        shown = quick.steps * quick.batch_size + 10 * tested_as / max(1, evaluations)
        quickly = shown * per_image * (quick.crop / rule.crop) ** 2
        command = self.run.about.get("command")
        how = f"{command} --preset quick --out {self.run.out}-quick" if command else "rule.quick()"
        return (
            f"{said}\n{duration(quickly)} instead, usually less accurate, with images of "
            f"{quick.crop}x{quick.crop} and {quick.steps} steps of {quick.batch_size}: {how}"
        )

    def _evaluate_if_due(self) -> None:
        journal, last = self.run.journal, self.run.journal.records[-1:]
        done = last and last[0]["step"] == self.step and "top1" in last[0]
        if not self.evaluation or not self.due.evaluation(self.step) or done:
            return
        self.losses.read()
        self.share = self.predict(*self.evaluation)
        metrics = metrics_of(self.share, self.evaluation[1])
        _check_finite(metrics["eval_loss"], "evaluation loss", self.step, self.setup.rule)
        journal.add(step=self.step, **metrics)
        self.display.tell(journal.records[-1])
        if self.selection and self.selection.keep == "best":
            if self.selection.best(journal.records) is journal.records[-1]:
                self.kept.take()

    def predict(self, resized: Resized, data: ImageSet) -> Share:
        """What the model makes of a set. Raises ``Stopped`` after Ctrl-C."""
        parts = self.setup.compute, self.setup.model, resized, data, self.setup.micro_batch
        return predict_share(*parts, self.skip_corrupt, self.between)

    def _save(self) -> None:
        self.losses.read()  # so that no checkpoint holds a step that diverged
        corrupt = corrupt_everywhere(self.train_images)
        with ranks.together():
            self.run.save(Progress(self.step, self.seconds, corrupt=corrupt))


@dataclasses.dataclass
class _Losses:
    """The losses of the steps, each read when the device has the next step to do."""

    rule: Recipe
    journal: Journal
    display: Display
    unread: tuple[int, Later] | None = None

    def add(self, step: int, loss: Tensor) -> None:
        """Read the loss of the step before."""
        later = Later(loss)
        self.read()
        self.unread = step, later

    def read(self) -> None:
        """Write down the loss that is unread, if any; TrainingError if it is not finite."""
        if self.unread is None:
            return
        step, later = self.unread
        self.unread = None
        with ranks.together():
            own_loss = later.value()
        (loss,) = ranks.sums_of(own_loss)
        _check_finite(loss, "loss", step + 1, self.rule)
        self.journal.add(step=step + 1, loss=loss, lr=self.rule.lr(step))
        self.display.tell(self.journal.records[-1])


def corrupt_everywhere(images: Resized) -> tuple[int, ...]:
    """The images that some process could not read."""
    return tuple(sorted({i for corrupt in ranks.everyones([*images.corrupt]) for i in corrupt}))


def _check_finite(loss: float, name: str, step: int, rule: Recipe) -> None:
    if not math.isfinite(loss):
        base_lr = getattr(rule, "base_lr", None)
        what, now = "base_lr", base_lr
        if base_lr is None:
            what, now = "learning rate", rule.lr(step - 1)
        raise TrainingError(
            f"the {name} is {loss} at step {step}: try a lower {what} (now {now:g})"
        )
