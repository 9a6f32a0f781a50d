"""Runs the source of `conv_taps_hopper` in plain Python: its three parts as threads, TMA and barriers by what they promise.

What it shows without a GPU: that what is loaded where is what is multiplied with what, that barriers get the bytes that they
wait for (else it hangs, and says so), and that descriptors, bases and constants of a launch go with the kernel.
"""

from __future__ import annotations

import math
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from pvae.kernels import conv_taps_hopper as module

PATIENCE_S = 5.0


class Array(np.ndarray):
    """A block of values, all in double precision."""

    type = types.SimpleNamespace(layout=None)

    @classmethod
    def of(cls, values: Any) -> Any:
        return np.asarray(values).view(cls)

    def to(self, _dtype: Any) -> Any:
        return self


class Dtype:
    def __init__(self, bits: int) -> None:
        self.primitive_bitwidth = bits


class Shared:
    """A piece of shared memory; `index` and `reshape` are views of it."""

    def __init__(self, dtype: Dtype, values: np.ndarray) -> None:
        self.dtype, self.values, self.shape = dtype, values, values.shape

    def index(self, i: int) -> Shared:
        assert 0 <= i < len(self.values), f"buffer {i} of {len(self.values)}"
        return Shared(self.dtype, self.values[i])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.dtype, self.values.reshape(shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.dtype, self.values.transpose(order))

    def load(self, _layout: Any) -> Any:
        return Array.of(self.values.copy())

    def store(self, values: Any) -> None:
        self.values[...] = values


class Barrier:
    """An mbarrier: a phase is over after `count` arrivals, when no bytes are awaited any more."""

    changed = threading.Condition()
    broken = False

    def __init__(self) -> None:
        self.count = self.arrivals = self.bytes = self.phase = 0

    def update(self, arrivals: int, nbytes: int) -> None:
        with self.changed:
            self.arrivals += arrivals
            self.bytes += nbytes
            assert self.arrivals <= self.count
            if self.arrivals == self.count and self.bytes == 0:
                self.arrivals, self.phase = 0, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            over = self.changed.wait_for(lambda: self.phase % 2 != parity or Barrier.broken, PATIENCE_S)
        if not over or Barrier.broken:
            raise TimeoutError(f"a barrier waits for {self.bytes} bytes and {self.count - self.arrivals} arrivals")


class Tensor:
    """What the kernel sees of a tensor descriptor: boxes of a strided view, zeros outside of it."""

    def __init__(self, host: Any) -> None:
        self.view = host.base.as_strided(host.shape, host.strides)
        self.block, self.layout, self.dtype = tuple(host.block_shape), None, Dtype(8 * host.base.itemsize)

    def parts(self, at: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where the box lies in the view, and which of the box lies there."""
        ends = zip(at, self.block, self.view.shape, strict=True)
        clipped = [(a, max(a, 0), max(min(a + b, size), max(a, 0))) for a, b, size in ends]
        return tuple(slice(i, j) for _, i, j in clipped), tuple(slice(i - a, j - a) for a, i, j in clipped)

    def copy_in(self, at: Sequence[int], bar: Barrier, smem: Shared) -> None:
        assert smem.shape == self.block
        there, here = self.parts(at)
        smem.values[...] = 0
        smem.values[here] = self.view[there].double().numpy()
        bar.update(0, -math.prod(self.block) * self.dtype.primitive_bitwidth // 8)

    def copy_out(self, at: Sequence[int], smem: Shared) -> None:
        import torch

        there, here = self.parts(at)
        self.view[there] = torch.from_numpy(smem.values[here]).to(self.view.dtype)


class Pointer:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __add__(self, where: Any) -> Any:
        return self.values, where


def _load(where: tuple[np.ndarray, Any], mask: Any, other: float) -> Any:
    values, index = where
    return Array.of(np.where(mask, values[np.where(mask, index, 0)], other))


def _allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
    if layout == "barriers":
        bars = [Barrier() for _ in range(shape[0])]
        return types.SimpleNamespace(index=bars.__getitem__)
    return Shared(dtype, np.full(shape, np.nan))


def _specialize(parts: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
    failed: list[BaseException] = []

    def run(part: Callable[..., None], args: tuple[Any, ...]) -> None:
        try:
            part(*args)
        except BaseException as error:  # handed to the caller; the other parts must not wait for this one
            failed.append(error)
            with Barrier.changed:
                Barrier.broken = True
                Barrier.changed.notify_all()

    Barrier.broken = False
    threads = [threading.Thread(target=run, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def _product(a: Any, b: Any, acc: Any, is_async: bool) -> Any:
    return acc + (a.values if isinstance(a, Shared) else a) @ b.values


GLUON = types.SimpleNamespace(
    program_id=lambda axis: 0,
    num_programs=lambda axis: 1,
    cdiv=lambda a, b: -(-a // b),
    cast=lambda value, _: value,
    maximum=max,
    minimum=min,
    static_range=range,
    arange=lambda start, stop, layout: np.arange(start, stop),
    load=_load,
    float32=None,
    int64=None,
    zeros=lambda shape, *_: Array.of(np.zeros(shape)),
    convert_layout=lambda a, *_, **__: a,
    allocate_shared_memory=_allocate,
    warp_specialize=_specialize,
    **dict.fromkeys(("SliceLayout", "NVMMADistributedLayout", "DotOperandLayout"), lambda *_: None),
)
BARRIERS = types.SimpleNamespace(
    MBarrierLayout=lambda: "barriers",
    init=lambda bar, count: setattr(bar, "count", count),
    expect=lambda bar, nbytes: bar.update(1, nbytes),
    wait=lambda bar, parity: bar.wait(parity),
    arrive=lambda bar, count: bar.update(count, 0),
)
TMA = types.SimpleNamespace(
    async_copy_global_to_shared=lambda tensor, at, bar, smem: tensor.copy_in(at, bar, smem),
    async_copy_shared_to_global=lambda tensor, at, smem: tensor.copy_out(at, smem),
    store_wait=lambda pending: None,
)


def _namespace() -> dict[str, Any]:
    names = dict(vars(module))
    names |= {
        "gl": GLUON,
        "mbarrier": BARRIERS,
        "tma": TMA,
        "fence_async_shared": lambda: None,
        "warpgroup_mma": _product,
        "warpgroup_mma_wait": lambda pending, deps: deps if len(deps) > 1 else deps[0],
    }
    for name, value in vars(module).items():
        if type(value).__name__ == "GluonJITFunction":
            names[name] = types.FunctionType(value.fn.__code__, names, name)
        elif type(value).__name__ == "constexpr":
            names[name] = value.value
    return names


class Launch:
    """In the place of `triton_launch.Launch`, for `conv_taps_hopper`."""

    def __init__(
        self, kernel: str, grid: Sequence[int], constants: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        assert kernel == "conv_taps_hopper.conv_taps_hopper"
        self.constants = constants
        self.compiled: Any = None
        self.blocks: list[list[int] | None] = []

    def compile(self, *arguments: Any) -> Any:
        """What it remembers are the descriptors' blocks."""
        self.blocks = [getattr(argument, "block_shape", None) for argument in arguments]
        described = [{} for block in self.blocks if block is not None]
        return SimpleNamespace(metadata=SimpleNamespace(tensordesc_meta=described))

    def directly(self, *arguments: Any) -> None:
        """One program does all tiles."""
        given: list[Any] = []
        for argument, block in zip(arguments, self.blocks, strict=True):
            if block is not None:
                described = {"base": argument.base, "shape": argument.shape, "strides": argument.strides}
                given.append(Tensor(SimpleNamespace(**described, block_shape=block)))
            elif hasattr(argument, "data_ptr"):
                given.append(Pointer(argument.as_strided((argument.numel(),), (1,)).double().numpy()))
            else:
                given.append(argument)
        _namespace()["conv_taps_hopper"](*given, *self.constants.values())
