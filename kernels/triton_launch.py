"""Launches Triton kernels: the first time by Triton, after that without its dispatch.

Triton's own launch looks at every argument and calls its hooks. That of a compiled kernel costs the host a third.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

LOADING = threading.Lock()


@functools.cache
def kernel_named(name: str) -> Any:
    """`module.function` of pvae.kernels. Triton is imported by the first launch only."""
    module, _, function = name.partition(".")
    return getattr(importlib.import_module(f"pvae.kernels.{module}"), function)


@functools.cache
def _driver() -> Any:
    from triton.runtime import driver

    return driver.active


def on_device(device: torch.device, launch: Callable[..., Result], *arguments: Any) -> Result:
    """`launch(*arguments)`, with `device` as the current one: Triton launches there."""
    if device.type == "cpu" or device.index is None or device.index == torch.accelerator.current_device_index():
        return launch(*arguments)
    with torch.accelerator.device_index(device.index):
        return launch(*arguments)


class Launch:
    """`kernel[grid](*arguments, **constants)`, the kernel by its name in pvae.kernels.

    What Triton compiles for the first call serves them all: tensors of the same dtypes that begin at multiples of 16 bytes,
    or None in the same places; numbers that it does not specialise, or the same ones. `constants` are the compile-time
    arguments in their order; `options` are Triton's, such as num_warps.
    """

    __slots__ = ("compiled", "constants", "grid", "kernel", "options")

    def __init__(
        self, kernel: str, grid: tuple[int, int, int], constants: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        self.kernel, self.grid, self.constants, self.options = kernel, grid, constants, options
        self.compiled: Any = None

    def __call__(self, *arguments: Any) -> None:
        if self.compiled is None:
            self.compiled = self.by_triton(*arguments)  # None under the interpreter
        else:
            self.directly(*arguments)

    def by_triton(self, *arguments: Any, **instead: Any) -> Any:
        """Launched with all of Triton's checks, and constants of this call alone; what it was compiled to."""
        return kernel_named(self.kernel)[self.grid](*arguments, **{**self.constants, **instead}, **self.options)

    def compile(self, *arguments: Any) -> Any:
        """What `by_triton` would launch, not launched."""
        compiled = kernel_named(self.kernel).warmup(*arguments, grid=self.grid, **self.constants, **self.options)
        with LOADING:
            compiled.run  # noqa: B018  loads it, but says that it has before it is done
        return compiled

    def directly(self, *arguments: Any) -> None:
        """Launch `compiled`."""
        driver, compiled = _driver(), self.compiled
        stream = driver.get_current_stream(driver.get_current_device())
        compiled.run(
            *self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *arguments, *self.constants.values(),
        )  # fmt: skip


__all__ = ["Launch", "kernel_named", "on_device"]
