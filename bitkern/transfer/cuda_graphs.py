"""CUDA graphs: the kernels of a step, recorded once and replayed together."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]

WARM_UP = 3  # calls before the recording, which create caches, plans and workspaces


class GraphRecorder:
    """The one stream on which a function is warmed up and recorded, as autograd requires."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Run the block on the stream, ordered with the current stream."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture the kernels that ``function`` launches; returns a function that replays them."""
        graph = torch.cuda.CUDAGraph()
        # Errors for this thread only, because the loader's threads pin memory meanwhile.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            result = function()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class CudaGraphRunner:
    """Calls a function of batches on a GPU: three calls run it, the next records it for replays.

    Only kernels are replayed; Python code, and numbers that it passes to kernels, stay as recorded.
    A call with other shapes than the first runs the function. The next call overwrites the result.
    """

    def __init__(self, function: Callable[[Iterable[Batch]], Tensor], device: torch.device) -> None:
        self.function, self.device = function, device
        self.recorder = GraphRecorder(device)
        self.warm_up = WARM_UP
        self.shapes: list[list[torch.Size]] | None = None
        self.inputs: list[Batch] = []  # read by the graph
        self.replay: Callable[[], Tensor] | None = None

    def __call__(self, batches: Iterable[Batch]) -> Tensor:
        batches = list(batches)
        shapes = [[tensor.shape for tensor in batch] for batch in batches]
        self.shapes = self.shapes or shapes
        if shapes != self.shapes:
            return self.function(batches)
        if self.warm_up:
            self.warm_up -= 1
            with self.recorder.aside():
                return self.function(batches)
        if self.replay is None:
            self.inputs = [
                tuple(torch.empty_like(tensor, device=self.device) for tensor in batch)
                for batch in batches
            ]
            self.replay = self.recorder.record(lambda: self.function(self.inputs))
        for batch, inputs in zip(batches, self.inputs, strict=True):
            for tensor, own in zip(batch, inputs, strict=True):
                own.copy_(tensor, non_blocking=True)
        return self.replay()
