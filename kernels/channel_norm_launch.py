"""Runs the channel norms: the Triton kernels where they can, the reference where they cannot, and the reason why not.

A plan (grids, strides, compile-time constants, scratch) is a pure function of the operands' shapes, strides and dtypes and
of the norm's parameters, so it is made once for each kind of call and looked up after that.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.kernels.channel_norm_config import MAX_CHANNELS, chunk_config, group_config, norm_config, whole_group
from pvae.kernels.channel_norm_layout import Border, Layout, Operands, Sizes, check, find_layout, innermost, is_vector
from pvae.kernels.channel_norm_reference import Norm, empty_result, reference
from pvae.kernels.norm_config import next_power_of_2
from pvae.kernels.norm_launch import FLOATS, GRID_LIMIT, device_refusal
from pvae.kernels.triton_launch import Launch, on_device

COMBINED = 4096  # partial moments that combine_kernel reads at a time

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Step:
    """One launch of a plan: `kernel[grid](*tensors, *integers, *floats, **constants)`, tensors by name."""

    kernel: str  # module.function of pvae.kernels
    grid: tuple[int, int, int]
    tensors: tuple[str, ...]
    integers: tuple[int | None, ...]
    floats: tuple[float, ...]
    constants: dict[str, Any]  # the kernel's compile-time arguments in their order
    warps: int

    @functools.cached_property
    def _run(self) -> Launch:
        return Launch(self.kernel, self.grid, self.constants, {"num_warps": self.warps})

    def launch(self, given: dict[str, Tensor | None]) -> None:
        arguments = [given[name] for name in self.tensors]
        aligned = all(t is None or t.data_ptr() % 16 == 0 for t in arguments)
        (self._run if aligned else self._run.by_triton)(*arguments, *self.integers, *self.floats)


@dataclass(frozen=True, eq=False)
class Plan:
    """The launches of one kind of call, and the fp32 scratch between them: name -> elements."""

    steps: tuple[Step, ...]
    scratch: dict[str, int]

    def launch(self, given: dict[str, Tensor | None]) -> None:
        for step in self.steps:
            step.launch(given)


def run(norm: Norm, operands: Operands, border: Border) -> Tensor:
    """y, channels-last, of x's dtype and of x's sizes with borders."""
    x = operands.x
    if operands.scale is not None or operands.shift is not None:
        operands = innermost(operands)
    signature = tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in operands])
    plan = _plan(norm, border, signature)
    if isinstance(plan, str):
        return reference(norm, operands, border)
    y = empty_result(x, border)
    if not plan.steps:
        return y
    given: dict[str, Tensor | None] = operands._asdict() | {"y": y}
    for name, size in plan.scratch.items():
        given[name] = torch.empty(size, dtype=torch.float32, device=x.device)
    on_device(x.device, plan.launch, given)
    return y


def supports(norm: Norm, operands: Operands, border: Border) -> str | None:
    """Why the kernels do not take operands of these shapes, strides and dtypes on any device, or None if they do.

    Takes fake and meta tensors too; their sizes must be plain integers. Raises ValueError where the shapes do not go
    together at all.
    """
    plan = make_plan(norm, innermost(operands), border)
    return plan if isinstance(plan, str) else None


def refusal(norm: Norm, operands: Operands, border: Border) -> str | None:
    """Why these operands run in the reference and not in the kernels, or None: `supports`, and the device."""
    return device_refusal(operands.x.device.type) or supports(norm, operands, border)


@functools.lru_cache(maxsize=4096)
def _plan(norm: Norm, border: Border, signature: tuple[Any, ...]) -> Plan | str:
    """The plan, or why there is none; the reason is also logged, once, if the device could have run the kernels."""
    meta = [None if s is None else torch.empty_strided(s[0], s[1], dtype=s[2], device="meta") for s in signature]
    device = signature[0][3]
    if len({s[3] for s in signature if s is not None}) > 1:
        raise ValueError("the operands are on different devices")
    operands = Operands(*meta)
    check(operands)
    norm.check(operands, border)
    if reason := device_refusal(device.type):
        return reason
    lanes = 32
    if device.type == "cuda" and torch.cuda.is_available():
        lanes = torch.cuda.get_device_properties(device).warp_size
    plan = make_plan(norm, operands, border, lanes)
    if isinstance(plan, str):
        log.warning("pvae channel norm kernel refused, the reference runs instead: %s", plan)
    return plan


def make_plan(norm: Norm, operands: Operands, border: Border, lanes: int = 32) -> Plan | str:
    """The plan for operands of which shapes, strides and dtypes count, or why the kernels do not take them."""
    check(operands)
    norm.check(operands, border)
    x = operands.x
    if x.shape[1] > MAX_CHANNELS:
        return f"{x.shape[1]} channels, the kernel takes up to {MAX_CHANNELS}"
    for name, tensor in operands._asdict().items():
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"{name} is {tensor.dtype}"
        if name in ("weight", "bias") and tensor is not None and tensor.shape[0] > 1 and tensor.stride(0) != 1:
            return f"{name} has stride {tensor.stride(0)}"
    vectors = [t for t in (operands.scale, operands.shift) if t is not None and t.shape[0] > 1]
    grouped = norm.kind == "group"
    layout = find_layout(operands, border, norm.per_frame, grouped or bool(vectors))
    if isinstance(layout, str):
        return layout
    if any(not _dense_vector(t, x) for t in (operands.scale, operands.shift) if t is not None):
        return "the channels of scale or shift are not side by side"
    shape = empty_result(x.to("meta"), border).shape
    if math.prod(shape) == 0:
        return Plan((), {})
    steps: list[Step] = []
    scratch: dict[str, int] = {}
    if grouped:
        source = find_layout(Operands(x), Border(), norm.per_frame, True)
        assert isinstance(source, Layout)
        steps, scratch = _moments(norm, source, x.shape[1], lanes)
    steps.append(_normalise(norm, operands, layout, lanes))
    if any(size > GRID_LIMIT for step in steps for size in step.grid[1:]):
        return f"more than {GRID_LIMIT} frames"
    return Plan(tuple(steps), scratch)


def _dense_vector(operand: Tensor, x: Tensor) -> bool:
    return not is_vector(operand, x) or operand.shape[1] == 1 or operand.stride(1) == 1


def _units(strides: dict[str, Sizes]) -> int:
    """What divides all strides, up to 16 elements."""
    return math.gcd(16, *(step for steps in strides.values() for step in steps))


def _normalise(norm: Norm, operands: Operands, layout: Layout, lanes: int) -> Step:
    x, border = operands.x, layout.border
    channels = x.shape[1]
    n, frames, height, width = layout.sizes
    out_frames, out_height, out_width = (border.out(size, i) for i, size in enumerate(layout.sizes[1:]))
    positions = out_height * out_width
    kinds, strides = {}, dict(layout.strides)
    for name in ("scale", "shift"):
        operand = getattr(operands, name)
        kinds[name] = "none" if operand is None else "like" if name in strides else "vector"
        if kinds[name] == "vector":
            strides[name] = (operand.stride(0) if operand.shape[0] > 1 else 0, 0, 0, 0)
        strides.setdefault(name, (0, 0, 0, 0))
    factors = {name: layout.factors.get(name, (1, 1)) for name in ("scale", "shift")}
    align = _units(strides)
    config = norm_config(channels, positions, n * out_frames, lanes)
    constants = {
        "C": channels,
        "NORM": norm.kind,
        "PER_FRAME": norm.per_frame,
        "ACTIVATION": norm.activation,
        "FLAT": layout.flat,
        **{f"FRONT_{dim}": border.widths[2 * i] for i, dim in enumerate("THW")},
        **{f"MODE_{dim}": border.modes[i] for i, dim in enumerate("THW")},
        "SCALE": kinds["scale"],
        "SHIFT": kinds["shift"],
        **{f"{name.upper()}_BY_{dim}": factors[name][i] for name in factors for i, dim in enumerate("HW")},
        "ALIGN": align,
        "BLOCK": config.block,
        "ROWS": config.rows,
        "TILES": config.tiles,
    }
    steps = [step // align for name in ("x", "scale", "shift") for step in strides[name]]
    return Step(
        "channel_norm_kernel.channel_norm_kernel",
        (-(-positions // (config.rows * config.tiles)), n * out_frames, 1),
        ("x", *(("multiplier", "offset") if norm.kind == "group" else ("weight", "bias")), "scale", "shift", "y"),
        (frames, height, width, out_frames, out_width, positions, *steps),
        (norm.eps, norm.factor),
        constants,
        config.warps,
    )


def _moments(norm: Norm, layout: Layout, channels: int, lanes: int) -> tuple[list[Step], dict[str, int]]:
    """The launches that leave `multiplier` and `offset`, and the scratch that they and the last launch need."""
    n, t, height, width = layout.sizes
    frames = t if norm.per_frame else 1
    samples, positions = n * frames, n * t * height * width // (n * frames)
    wide, groups = channels // norm.groups, norm.groups
    scratch = {"multiplier": samples * channels, "offset": samples * channels}
    align = _units(layout.strides)
    strides = [step // align for step in layout.strides["x"]]
    whole = whole_group(positions, wide)
    chunk = positions
    if whole:
        config = group_config(positions, wide, lanes)
        grid = (groups, samples, 1)
    else:
        config, chunk = chunk_config(channels, positions, samples, lanes)
        grid = (-(-positions // chunk), samples, -(-channels // config.block))
    chunks = 1 if whole else grid[0]
    constants = {
        "C": channels,
        "GROUPS": groups,
        "WHOLE": whole,
        "FLAT": height == 1 and (t == 1 or norm.per_frame),
        "ALIGN": align,
        "BLOCK": config.block,
        "ROWS": config.rows,
    }
    first = Step(
        "group_moments_kernel.moments_kernel",
        grid,
        ("x", "weight", "bias", *(("multiplier", "offset") if whole else ("means", "squares"))),
        (frames, height, width, positions, chunk, *strides),
        (norm.eps,),
        constants,
        config.warps,
    )
    if whole:
        return [first], scratch
    scratch |= {"means": samples * channels * chunks, "squares": samples * channels * chunks}
    block = next_power_of_2(wide)
    combine = {
        "C": channels,
        "GROUPS": groups,
        "BLOCK": block,
        "CHUNKS": min(next_power_of_2(chunks), max(1, COMBINED // block)),
    }
    second = Step(
        "group_moments_kernel.combine_kernel",
        (groups, samples, 1),
        ("means", "squares", "weight", "bias", "multiplier", "offset"),
        (positions, chunk, chunks),
        (norm.eps,),
        combine,
        256 // lanes,
    )
    return [first, second], scratch
