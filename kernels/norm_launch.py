"""Runs the norm family: the Triton kernel where it can, the reference where it cannot, and the reason why it cannot.

A plan (grid, strides, compile-time constants) is a pure function of what `_signature` holds, so it is made once for
each kind of call and looked up after that.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.kernels.norm_config import MAX_CHANNELS, Config, Work, by_rule
from pvae.kernels.norm_layout import TWINS, Layout, Memory, Operands, check, find_layout
from pvae.kernels.norm_reference import reference
from pvae.kernels.triton_launch import Launch, on_device

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INDEXES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
GRID_LIMIT = 65535  # of a launch's second and third dimension
STRIDED = ("x", "residual", "gate", "scale", "shift", "select")  # in the order of the kernel's integers

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Plan:
    """One kind of launch: `norm_kernel[grid](*tensors, *integers, eps, scale_constant, **constants)`."""

    grid: tuple[int, int, int]
    integers: tuple[int | None, ...]  # None where the kernel needs none
    constants: dict[str, Any]  # the kernel's compile-time arguments in their order
    warps: int

    @functools.cached_property
    def _run(self) -> Launch:
        return Launch("norm_kernel.norm_kernel", self.grid, self.constants, {"num_warps": self.warps})

    def launch(self, tensors: tuple[Tensor | None, ...], eps: float, scale_constant: float) -> None:
        arguments = (*tensors, *self.integers, eps, scale_constant)
        for tensor in tensors:
            if tensor is not None and tensor.data_ptr() % 16:
                self._run.by_triton(*arguments, ALIGNED=False)
                return
        self._run(*arguments)


def run(
    norm: str,
    operands: Operands,
    eps: float,
    scale_constant: float,
    h_dtype: torch.dtype | None,
    y_dtype: torch.dtype | None,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(h, y), contiguous, each None where its dtype is. `config` overrides the chosen one (for sweeps)."""
    x = operands.x
    plan = _plan(norm, x.device.type, _signature(operands), h_dtype, y_dtype, config)
    if isinstance(plan, str):
        h, y = reference(norm, operands, eps, scale_constant)
        return (
            None if h_dtype is None else h.to(h_dtype).contiguous(),
            None if y_dtype is None else y.to(y_dtype).contiguous(),
        )
    h = None if h_dtype is None else x.new_empty(x.shape, dtype=h_dtype)
    y = None if y_dtype is None else x.new_empty(x.shape, dtype=y_dtype)
    if plan.grid[0]:
        on_device(x.device, plan.launch, (*operands, h, y), eps, scale_constant)
    return h, y


def supports(
    norm: str, operands: Operands, h_dtype: torch.dtype | None = None, y_dtype: torch.dtype | None = None
) -> str | None:
    """Why the kernel does not take operands of these shapes, strides and dtypes on any device, or None if it does.

    Takes fake and meta tensors too; their sizes must be plain integers. Raises ValueError where the shapes do not go
    together at all.
    """
    check(operands)
    plan = make_plan(norm, operands, h_dtype, y_dtype)
    return plan if isinstance(plan, str) else None


def refusal(
    norm: str, operands: Operands, h_dtype: torch.dtype | None = None, y_dtype: torch.dtype | None = None
) -> str | None:
    """Why these operands run in the reference and not in the kernel, or None: `supports`, and the device."""
    plan = _plan(norm, operands.x.device.type, _signature(operands), h_dtype, y_dtype, None)
    return plan if isinstance(plan, str) else None


def _signature(operands: Operands) -> tuple[Any, ...]:
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in operands])


@functools.cache
def device_refusal(device: str) -> str | None:
    """Why Triton cannot run on this type of device, or None. "cuda" is NVIDIA and ROCm alike."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device in ("cuda", "xpu"):
        return None
    import triton

    if device == "cpu" and triton.knobs.runtime.interpret:
        return None
    return f"Triton does not run on {device}"


@functools.cache
def _lanes(device: torch.device) -> int:
    """Threads in a warp of the device; 32 where it is not here to be asked (fake tensors)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 32
    return torch.cuda.get_device_properties(device).warp_size


@functools.lru_cache(maxsize=4096)
def _plan(
    norm: str,
    device: str,
    signature: tuple[Any, ...],
    h_dtype: torch.dtype | None,
    y_dtype: torch.dtype | None,
    config: Config | None,
) -> Plan | str:
    """The plan, or why there is none; the reason is also logged, once, if the device could have run the kernel."""
    operands = Operands(
        *[None if s is None else torch.empty_strided(s[0], s[1], dtype=s[2], device="meta") for s in signature]
    )
    check(operands)
    if reason := device_refusal(device):
        return reason
    if len({s[3] for s in signature if s is not None}) > 1:
        raise ValueError("the operands are on different devices")
    plan = make_plan(norm, operands, h_dtype, y_dtype, config, _lanes(signature[0][3]))
    if isinstance(plan, str):
        log.warning("pvae norm kernel refused, the reference runs instead: %s", plan)
    return plan


def make_plan(
    norm: str,
    operands: Operands,
    h_dtype: torch.dtype | None,
    y_dtype: torch.dtype | None,
    config: Config | None = None,
    lanes: int = 32,
) -> Plan | str:
    """The plan for operands of which shapes, strides and dtypes count, or why the kernel does not take them."""
    x = operands.x
    channels = x.shape[-1]
    if not 0 < channels <= MAX_CHANNELS:
        return f"{channels} channels, the kernel takes 1 to {MAX_CHANNELS}"
    for name, tensor in operands._asdict().items():
        if tensor is not None and tensor.dtype not in (INDEXES if name == "select" else FLOATS):
            return f"{name} is {tensor.dtype}"
    for dtype in (h_dtype, y_dtype):
        if dtype is not None and dtype not in FLOATS:
            return f"the output is {dtype}"
    for name in ("weight", "bias"):
        vector = getattr(operands, name)
        if vector is not None and channels > 1 and vector.stride(0) != 1:
            return f"{name} has stride {vector.stride(0)}"
    layout = find_layout(operands)
    if isinstance(layout, str):
        return layout
    for first, second in TWINS:
        if second in layout.operands and layout.operands[first] != layout.operands[second]:
            return f"{first} and {second} lie differently in memory"
        one, two = getattr(operands, first), getattr(operands, second)
        if two is not None and one.dtype != two.dtype:
            return f"{first} is {one.dtype} and {second} is {two.dtype}"
    for name in ("x", "residual"):
        if name in layout.operands and layout.operands[name].kind not in ("row", "batch"):
            return f"the rows of {name} are not evenly spaced"
    config = config or by_rule(_work(operands, layout, lanes))
    return _planned(norm, operands, layout, config)


def work_of(operands: Operands) -> Work:
    """What the choice of a configuration looks at, for operands that the kernel takes."""
    layout = find_layout(operands)
    assert not isinstance(layout, str), layout
    return _work(operands, layout, 32)


def _work(operands: Operands, layout: Layout, lanes: int) -> Work:
    channels, rows = operands.x.shape[-1], layout.batches * layout.rows
    return Work(channels, rows, layout.rows, operands.residual is not None, lanes)


def _planned(norm: str, operands: Operands, layout: Layout, config: Config) -> Plan:
    x = operands.x
    none = Memory("batch", 0, 0)
    memory = [layout.operands.get(name, none) for name in STRIDED]
    align = math.gcd(16, *(s for m in memory[:-1] for s in (m.batch, m.row)))  # not of select, the last
    rounds = -(-layout.batches // GRID_LIMIT)
    grid = (0 if x.numel() == 0 else -(-layout.rows // config.rows), -(-layout.batches // max(1, rounds)), rounds)
    fp32 = x.dtype == torch.float32 or (operands.residual is not None and operands.residual.dtype == torch.float32)
    constants = {
        "C": x.shape[-1],
        "NORM": norm,
        "COMPENSATE": fp32 and norm == "layer",
        **{name.upper(): m.kind for name, m in zip(STRIDED, memory, strict=True)},
        "ALIGN": align,
        "ALIGNED": True,
        "BLOCK": config.block,
        "ROWS": config.rows,
        "EARLY": config.early,
    }
    batched = layout.batches > 1
    integers = [
        layout.batches if rounds > 1 else None,
        layout.rows if batched or config.rows > 1 else None,
        layout.group if layout.group > 1 else None,
    ]
    for name, m in zip(STRIDED, memory, strict=True):
        unit = 1 if name == "select" else align
        integers += [m.batch // unit if batched else None, None if m.kind == "batch" else m.row // unit]
    return Plan(grid, tuple(integers), constants, config.warps)
