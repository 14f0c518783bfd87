"""An optimizer step. It reads nothing back from the device, so that the host can run ahead."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bitkern.nn.standardized import standardized
from bitkern.optim import SGD
from bitkern.transfer import ranks
from bitkern.transfer.cuda_graphs import Batch, CudaGraphRunner
from bitkern.transfer.device_config import DeviceConfig
from bitkern.transfer.gradient_reducer import GradientReducer
from bitkern.transfer.recipes.mixup import mix, mixed_loss
from bitkern.transfer.schedule import RankSlice, Schedule


class AsyncScalar:
    """A number on the device, whose copy to the host starts now."""

    def __init__(self, number: Tensor) -> None:
        self.number = number.to("cpu", non_blocking=number.is_cuda, copy=True)
        self.copied: torch.cuda.Event | None = None
        if number.is_cuda:
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record(torch.cuda.current_stream(number.device))

    def value(self) -> float:
        """Wait for the copy, but for no work launched after it, and return the number."""
        if self.copied:
            self.copied.synchronize()
        return float(self.number)


class TrainStep:
    """An optimizer step on the next micro-batches.

    ``batches`` yields the process's micro-batches, (images, labels), in the order of the schedule;
    ``reducer`` sums the gradients of the processes; ``class_weight`` goes to the recipe's loss.
    ``on_micro_batch`` is called with the number of micro-batches done after each but the last of a
    step, unless a graph is replayed, and may raise an exception to stop. Values that change from
    step to step are tensors on the device, which a graph can read.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SGD,
        schedule: Schedule,
        config: DeviceConfig,
        batches: Iterator[Sequence[Tensor]],
        scaler: torch.amp.GradScaler | None = None,
        reducer: GradientReducer | None = None,
        class_weight: Tensor | None = None,
        on_micro_batch: Callable[[int], object] = lambda done: None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.on_micro_batch = on_micro_batch
        self.scaler = scaler or config.scaler()
        self.reducer = reducer or GradientReducer(model)
        self.loss = schedule.recipe.loss
        if class_weight is not None:
            self.loss = partial(self.loss, class_weight=class_weight.to(config.device))
        self.schedule, self.config, self.batches = schedule, config, batches
        self.own = [part.own for part in schedule.step(0).slices]  # the same in every step
        self.lam = torch.zeros((), device=config.device)
        # Only PyTorch's fused update takes the learning rate from a tensor without reading it back:
        # on GPUs a float32, on the CPU also a float64, which rounds nothing.
        dtype = torch.float64 if config.device.type == "cpu" else torch.float32
        self.lr = torch.zeros((), dtype=dtype, device=config.device)
        for group in optimizer.param_groups:  # those of a checkpoint may differ
            group.update(lr=self.lr, fused=True)
            for p in group["params"]:  # the fused update needs momentum for all or none
                optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        self.update: Callable[[Iterable[Batch]], Tensor] = self._update
        if config.cuda_graph:
            self.update = CudaGraphRunner(self._update, config.device)

    def __call__(self, step: int, lr: float) -> Tensor:
        """Take the step; returns this process's part of the mean loss over the batch.

        The next step may overwrite it.
        """
        lam, slices = self.schedule.step(step)
        self.lr.fill_(lr)
        if lam is not None:
            self.lam.fill_(lam)
        self.model.train()
        return self.update(self._load(rank_slice) for rank_slice in slices)

    def rehearse(self) -> float:
        """Compute gradients of a step's largest micro-batch twice; returns the second duration.

        The second time adds to gradients and finds all buffers allocated.
        """
        self.model.train()
        rank_slice = self.schedule.step(0).slices[0]
        began = 0.0
        with standardized(self.model):
            for _ in range(2):
                batch = self._load(rank_slice)
                began = time.perf_counter()
                self._accumulate(rank_slice.own, batch).item()  # waits for the device
        return time.perf_counter() - began

    def _load(self, rank_slice: RankSlice) -> Batch:
        images, labels = next(self.batches)
        if rank_slice.permutation is None:
            return images, labels
        permutation = torch.from_numpy(rank_slice.permutation)
        if self.config.device.type == "cuda":  # a copy from pageable memory may synchronize
            permutation = permutation.pin_memory()
        return images, labels, permutation

    def _update(self, batches: Iterable[Batch]) -> Tensor:
        # The scaler inspects gradients before the step, so it cannot be fused.
        fused = None if self.scaler.is_enabled() else self.optimizer
        with standardized(self.model, optimizer=fused, sums=self.reducer):
            with ranks.propagate_errors(), self.reducer.reduce():
                losses: list[Tensor] = []
                for own, batch in zip(self.own, batches, strict=True):
                    if len(losses) == len(self.own) - 1:
                        self.reducer.begin_last_micro_batch()
                    losses.append(self._accumulate(own, batch))
                    if len(losses) < len(self.own):
                        self.on_micro_batch(len(losses))
                loss = torch.stack(losses).sum()
        if not fused:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        return loss

    def _accumulate(self, own: int, batch: Batch) -> Tensor:
        """Accumulate a micro-batch's gradients; returns its part of the mean loss over the batch.

        The process computes the first ``own`` of the images that it loads.
        """
        device = self.config.device
        x = self.config.to_input(batch[0])
        y, *permutation = (tensor.to(device, non_blocking=True) for tensor in batch[1:])
        with self.config.autocast():
            if permutation:
                x, y, y_perm = mix(x, y, self.lam, *permutation)
                logits = self.model(x[:own])
                loss = mixed_loss(logits, y[:own], y_perm[:own], self.lam, self.loss)
            else:
                loss = self.loss(self.model(x), y)
        scaled = loss * (own / self.schedule.recipe.batch_size)
        self.scaler.scale(scaled).backward()  # type: ignore[no-untyped-call]
        return scaled.detach()
