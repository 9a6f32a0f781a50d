"""`CudaGraphed`: a compiled function recorded once and replayed as one CUDA (or HIP) graph.

A step of many small kernels takes longer to launch than to run, the more so when every collective waits for the slowest of
several CPUs. A replay launches all of it at once, collectives included.

What the graph reads and writes stays where it was: other inputs are copied into place before a replay, results are copied
out after it. Weights are read where they are, so writing into one is seen; one that is somewhere else (reloaded, moved,
replaced) makes the graph be recorded anew.

NCCL waits for the graphs that use a communicator before it lets go of it: `release_all` drops them.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor

__all__ = ["CudaGraphed", "release_all"]


class CudaGraphed:
    """`run`, which takes a list and empties it, for inputs of always the same shapes, strides and dtypes.

    The first call runs as it is: kernels are tuned and communicators made. The second one records. All graphs of a process
    share one pool of memory, for they are replayed one after the other and their results copied out.

    Args:
        weights: for each input whether it is a weight.
        frozen: `run` keeps what it made of weights (`FrozenWeights`), so writing into one is a reason to record anew.

    All tensors must be on the GPU.
    """

    _alive: ClassVar[WeakSet[CudaGraphed]] = WeakSet()

    def __init__(self, run: Callable[[list[Any]], Sequence[Any]], weights: Sequence[bool], frozen: bool) -> None:
        self.run, self.weights, self.frozen = run, tuple(weights), frozen
        self.calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._read: list[tuple[int, int]] = []
        self._inputs: list[Any] = []
        self._outputs: Sequence[Any] = ()

    def release(self) -> None:
        """Drop the graph; the next call records it anew."""
        self._graph, self._inputs, self._outputs = None, [], ()
        self._alive.discard(self)

    def __call__(self, inputs: list[Any]) -> list[Any]:
        self.calls += 1
        if self.calls == 1:
            return list(self.run(inputs))
        weights = [x for x, is_weight in zip(inputs, self.weights, strict=True) if is_weight]
        read = [(x.data_ptr(), x._version if self.frozen and not x.is_inference() else 0) for x in weights]
        if self._graph is None or read != self._read:
            self._record(inputs, read)
        else:
            for mine, given, is_weight in zip(self._inputs, inputs, self.weights, strict=True):
                if isinstance(given, Tensor) and not is_weight:
                    mine.copy_(given)
        inputs.clear()
        assert self._graph is not None
        self._graph.replay()
        return [o.clone() if isinstance(o, Tensor) else o for o in self._outputs]

    def _record(self, inputs: Sequence[Any], read: list[tuple[int, int]]) -> None:
        self.release()
        self._read = read
        with torch.inference_mode(False), torch.no_grad():  # later calls write to them, in whatever mode
            self._inputs = [
                x.clone() if isinstance(x, Tensor) and not is_weight else x
                for x, is_weight in zip(inputs, self.weights, strict=True)
            ]
        others = [other._graph.pool() for other in self._alive if other._graph is not None]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads, NCCL's watchdog among them, may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=others[0] if others else None, capture_error_mode="thread_local"):
            self._outputs = self.run(list(self._inputs))
        self._graph = graph
        self._alive.add(self)


@atexit.register
def release_all() -> None:
    """Drop every graph of this process. Call it before `torch.distributed.destroy_process_group()`."""
    for graphed in list(CudaGraphed._alive):
        graphed.release()
