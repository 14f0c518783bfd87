"""CUDA graphs: what a step launches, recorded once and replayed as a whole."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]

WARM_UP = 3  # calls that run as ever, in which caches, plans and workspaces come to be


class Recorder:
    """The stream on which a function is warmed up and recorded: one, as autograd needs it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Run the block on the stream, between what is launched before it and after it."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What launches all that ``function`` would, which is called but not executed."""
        graph = torch.cuda.CUDAGraph()
        # Only of this thread is everything forbidden that a graph cannot hold: the loader's pins
        # memory meanwhile.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            result = function()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class Graphed:
    """A function of batches on a GPU: three calls run it, the next records it and all replay it.

    Replayed is what it launches. The rest of it, and numbers of the host that it launches kernels
    with, stay as they were when it was recorded. A call with shapes other than the first's runs it
    as ever. The next call overwrites the result.
    """

    def __init__(self, function: Callable[[Iterable[Batch]], Tensor], device: torch.device) -> None:
        self.function, self.device = function, device
        self.recorder = Recorder(device)
        self.warm_up = WARM_UP
        self.shapes: list[list[torch.Size]] | None = None
        self.inputs: list[Batch] = []  # which the graph reads
        self.replay: Callable[[], Tensor] | None = None

    def __call__(self, batches: Iterable[Batch]) -> Tensor:
        given = list(batches)
        shapes = [[tensor.shape for tensor in batch] for batch in given]
        self.shapes = self.shapes or shapes
        if shapes != self.shapes:
            return self.function(given)
        if self.warm_up:
            self.warm_up -= 1
            with self.recorder.aside():
                return self.function(given)
        if self.replay is None:
            self.inputs = [
                tuple(torch.empty_like(tensor, device=self.device) for tensor in batch)
                for batch in given
            ]
            self.replay = self.recorder.record(lambda: self.function(self.inputs))
        for batch, inputs in zip(given, self.inputs, strict=True):
            for tensor, own in zip(batch, inputs, strict=True):
                own.copy_(tensor, non_blocking=True)
        return self.replay()
