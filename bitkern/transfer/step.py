"""An optimizer step. It reads nothing back from the device, so that the host can run ahead."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bitkern.nn.standardized import standardized
from bitkern.optim import SGD
from bitkern.transfer import ranks
from bitkern.transfer.compute import Compute
from bitkern.transfer.graphs import Batch, Graphed
from bitkern.transfer.recipes.mixup import mix, mixed_loss
from bitkern.transfer.reduction import Reduction
from bitkern.transfer.schedule import Part, Schedule


class Later:
    """A number on the device, which is on its way to the host from now on."""

    def __init__(self, number: Tensor) -> None:
        self.number = number.to("cpu", non_blocking=number.is_cuda, copy=True)
        self.arrival: torch.cuda.Event | None = None
        if number.is_cuda:
            self.arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.arrival.record(torch.cuda.current_stream(number.device))

    def value(self) -> float:
        """The number; waits for it, but for nothing that was launched after it."""
        if self.arrival:
            self.arrival.synchronize()
        return float(self.number)


class Stepper:
    """What an optimizer step is made of, and the step.

    ``batches`` are the process's micro-batches, (images, labels), in the order of the schedule;
    ``scaler`` is ``Compute.scaler``; ``reduction`` sums the gradients of the processes;
    ``class_weight`` goes to the recipe's loss. ``on_micro_batch`` is called with the number of
    micro-batches done after each but the last of a step, which it may break off by an exception;
    not where a graph is replayed. What changes from step to step is in tensors on the device, for a
    graph to read.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SGD,
        schedule: Schedule,
        compute: Compute,
        batches: Iterator[Sequence[Tensor]],
        scaler: torch.amp.GradScaler | None = None,
        reduction: Reduction | None = None,
        class_weight: Tensor | None = None,
        on_micro_batch: Callable[[int], object] = lambda done: None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.on_micro_batch = on_micro_batch
        self.scaler = scaler or compute.scaler()
        self.reduction = reduction or Reduction(model)
        self.loss = schedule.recipe.loss
        if class_weight is not None:
            self.loss = partial(self.loss, class_weight=class_weight.to(compute.device))
        self.schedule, self.compute, self.batches = schedule, compute, batches
        self.own = [part.own for part in schedule.step(0).parts]  # as in every step
        self.lam = torch.zeros((), device=compute.device)
        # Of PyTorch's updates the fused one alone takes the learning rate from a tensor without
        # reading it back: on GPUs a float32, on the CPU also a float64, which rounds nothing.
        dtype = torch.float64 if compute.device.type == "cpu" else torch.float32
        self.lr = torch.zeros((), dtype=dtype, device=compute.device)
        for group in optimizer.param_groups:  # of a checkpoint, those of its version
            group.update(lr=self.lr, fused=True)
            for p in group["params"]:  # the fused update wants momentum for all or for none
                optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        self.update = Graphed(self._update, compute.device) if compute.cuda_graph else self._update

    def __call__(self, step: int, lr: float) -> Tensor:
        """Take the step; what this process adds to the mean loss over the batch.

        The next step may overwrite it.
        """
        lam, parts = self.schedule.step(step)
        self.lr.fill_(lr)
        if lam is not None:
            self.lam.fill_(lam)
        self.model.train()
        return self.update(self._load(part) for part in parts)

    def rehearse(self) -> float:
        """Compute gradients of a step's largest micro-batch twice; the seconds of the second time.

        Which adds to gradients that are there, and finds everything made.
        """
        self.model.train()
        part = self.schedule.step(0).parts[0]
        began = 0.0
        with standardized(self.model):
            for _ in range(2):
                batch = self._load(part)
                began = time.perf_counter()
                self._accumulate(part.own, batch).item()  # waits for the device
        return time.perf_counter() - began

    def _load(self, part: Part) -> Batch:
        images, labels = next(self.batches)
        if part.permutation is None:
            return images, labels
        permutation = torch.from_numpy(part.permutation)
        if self.compute.device.type == "cuda":  # else copying it may wait for the device
            permutation = permutation.pin_memory()
        return images, labels, permutation

    def _update(self, batches: Iterable[Batch]) -> Tensor:
        # A scaled gradient is looked at before the step.
        fused = None if self.scaler.is_enabled() else self.optimizer
        with standardized(self.model, optimizer=fused, sums=self.reduction):
            with ranks.together(), self.reduction.meeting():
                shares: list[Tensor] = []
                for own, batch in zip(self.own, batches, strict=True):
                    if len(shares) == len(self.own) - 1:
                        self.reduction.begin()
                    shares.append(self._accumulate(own, batch))
                    if len(shares) < len(self.own):
                        self.on_micro_batch(len(shares))
                loss = torch.stack(shares).sum()
        if not fused:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        return loss

    def _accumulate(self, own: int, batch: Batch) -> Tensor:
        """Add the gradients of a micro-batch; what it adds to the mean loss over the batch.

        This process computes its part of it, the first ``own`` of the images that it loads.
        """
        device = self.compute.device
        x = self.compute.to_input(batch[0])
        y, *permutation = (tensor.to(device, non_blocking=True) for tensor in batch[1:])
        with self.compute.autocast():
            if permutation:
                x, y, y_perm = mix(x, y, self.lam, *permutation)
                logits = self.model(x[:own])
                loss = mixed_loss(logits, y[:own], y_perm[:own], self.lam, self.loss)
            else:
                loss = self.loss(self.model(x), y)
        share = loss * (own / self.schedule.recipe.batch_size)
        self.scaler.scale(share).backward()  # type: ignore[no-untyped-call]
        return share.detach()
