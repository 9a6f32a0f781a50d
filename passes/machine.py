"""What a machine can do, as the few numbers that the cost model needs, and where each comes from.

Units: FLOP/s, bytes/s, seconds, bytes. Only `h200` is measured;
the other presets are data-sheet peaks times the share of its own data sheet that the H200 reached, and say so.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch

__all__ = ["H200", "MACHINES", "Machine", "MachineError", "Table", "machine_named"]

Table = tuple[tuple[float, float], ...]  # (x, y) with rising x; straight lines between, the end values outside


class MachineError(ValueError):
    """An unknown machine or constant, or a value that is none; the message lists what is valid."""


@dataclass(frozen=True)
class Machine:
    """One accelerator and its links to the others.

    matrix, tf32, fp32, fp64   rate of matrix products in half precision, in float32 as convolutions take it (torch lets
                               cuDNN use TF32) and as products take it, and in float64, FLOP/s
    memory, capacity           traffic of device memory, bytes/s (read and written together), and its size, bytes
    units                      multiprocessors: what a kernel of few tiles leaves idle
    launch                     from one kernel's end to the next one's start, s
    exchange                   (bytes that a rank sends in all, seconds) of one exchange between neighbours
    link                       what a rank receives in a large collective, bytes/s
    convolution, convolution3d (channels, share of the matrix rate): by the fewer of a convolution's channels, in or out
    attention                  share of the matrix rate that fused attention reaches
    wide_attention             the same for heads wider than `widest_head`, which fused kernels for half precision leave out
    """

    name: str
    matrix: float
    tf32: float
    fp32: float
    fp64: float
    memory: float
    capacity: float
    units: float
    launch: float
    exchange: Table
    link: float
    convolution: Table
    convolution3d: Table
    attention: float
    wide_attention: float
    measured: bool
    source: str

    def product_rate(self, dtype: torch.dtype, *, convolution: bool = False) -> float:
        """FLOP/s of a large matrix product of `dtype`, or of the one that a convolution of `dtype` is."""
        if dtype.itemsize < 4:
            return self.matrix
        if dtype in (torch.float64, torch.complex128):
            return self.fp64
        return self.tf32 if convolution else self.fp32

    def busy(self, rows: float, columns: float) -> float:
        """The share of the units that a product of this output size keeps busy: half a wave of tiles is lost at the end."""
        tiles = -(-rows // 128) * -(-columns // 128)
        return tiles / (tiles + self.units / 2) if tiles else 1.0

    def exchange_seconds(self, size: float) -> float:
        """An exchange with neighbours in which a rank sends (or receives) `size` bytes in all."""
        last, at_last = self.exchange[-1]
        return interpolate(self.exchange, size) if size <= last else at_last + (size - last) / self.link

    def gather_seconds(self, size: float) -> float:
        """An all-gather in which a rank receives `size` bytes."""
        return self.exchange[0][1] + size / self.link


def interpolate(table: Table, x: float) -> float:
    """The table's value at x: straight lines between its points, the end values outside."""
    if x <= table[0][0]:
        return table[0][1]
    for (x0, y0), (x1, y1) in pairwise(table):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return table[-1][1]


H200 = Machine(
    name="h200",
    matrix=786e12,  # 8192^3, bf16
    tf32=393e12,  # not measured: half of it, as in the data sheet
    fp32=53e12,  # not measured: the data sheet's 67e12 times 786 / 989
    fp64=53e12,  # likewise
    memory=4.26e12,  # copy, read + written
    capacity=139 * 2**30,
    units=132,
    launch=2e-6,
    exchange=((0, 20e-6), (2 * 640 * 2**10, 20e-6), (2 * 2560 * 2**10, 38e-6)),  # all_to_all_single, two neighbours
    link=315e9,  # all-gather of 512 MiB
    # Whole decodes of docs/measurements.md, less their light kernels: Qwen-Image 500 TFLOP/s, Flux2 350, the 96-channel
    # convolutions of Wan, unfolded, 600.
    convolution=((0, 0.0), (96, 0.60), (192, 0.68), (384, 0.76)),
    # measured forms of convolution, less the half wave: 237 TFLOP/s at 96 channels, 538 at 192, 526 to 600 at 384; at 128, a
    # full tile, from LTX-2 and CogVideoX.
    convolution3d=((0, 0.0), (96, 0.32), (128, 0.60), (192, 0.70), (384, 0.78)),
    attention=0.7,  # what a Wan 14B block leaves it when its products run at the matrix rate
    wide_attention=0.3,  # what Qwen-Image's decode leaves it
    measured=True,
    source="measured on one to four NVIDIA H200, torch 2.11, cuDNN 9.19",
)


def _by_data_sheet(
    name: str,
    half: float,
    tf32: float,
    fp32: float,
    fp64: float,
    memory: float,
    capacity: float,
    units: float,
    link: float,
    source: str,
) -> Machine:
    """A machine that nobody measured: each peak times what the H200 reached of its own (989.4e12, 4.8e12, 450e9)."""
    product, traffic, wire = H200.matrix / 989.4e12, H200.memory / 4.8e12, H200.link / 450e9
    return replace(
        H200,
        name=name,
        matrix=half * product,
        tf32=tf32 * product,
        fp32=fp32 * product,
        fp64=fp64 * product,
        memory=memory * traffic,
        capacity=capacity,
        units=units,
        link=link * wire,
        measured=False,
        source=f"not measured: peaks of {source}, times what the H200 reaches of its own",
    )


MACHINES: Mapping[str, Machine] = {
    m.name: m
    for m in (
        H200,
        _by_data_sheet(
            "h100",
            989.4e12,
            494.7e12,
            66.9e12,
            66.9e12,
            3.35e12,
            80e9,
            132,
            450e9,
            "H100 SXM5 (glennklockwood.com/garden/processors/h100)",
        ),
        _by_data_sheet(
            "a100",
            312e12,
            156e12,
            19.5e12,
            19.5e12,
            2.039e12,
            80e9,
            108,
            300e9,
            "A100 SXM4 80 GB (glennklockwood.com/garden/processors/A100)",
        ),
    )
}


def machine_named(text: str) -> Machine:
    """`h200`, `h200,memory=4.2e12`, or `matrix=786e12,link=100e9` (on h200): a preset with constants of one's own.

    Tables are points `x:y` joined by `/`, such as `exchange=0:20e-6/5e6:38e-6`; a lone number stands for every x.
    Raises MachineError, which lists the presets and constants.
    """
    items = [item.strip() for item in text.split(",") if item.strip()]
    machine = H200
    if items and "=" not in items[0]:
        name = items.pop(0).lower()
        if name not in MACHINES:
            raise _unknown("machine", name, tuple(MACHINES))
        machine = MACHINES[name]
    constants = {f.name: f.type for f in fields(Machine) if f.type in ("float", "Table")}
    given: dict[str, float | Table] = {}
    for item in items:
        key, equals, number = (part.strip() for part in item.partition("="))
        if not equals:
            raise MachineError(f"--machine: {item!r} is not written CONSTANT=NUMBER; constants: {', '.join(constants)}")
        if key not in constants:
            raise _unknown("constant of a machine", key, tuple(constants))
        given[key] = _table(key, number) if constants[key] == "Table" else _number(key, number)
    if not given:
        return machine
    changed = ", ".join(f"{key}={number:g}" if isinstance(number, float) else key for key, number in given.items())
    return replace(machine, **given, source=f"{machine.source}; given: {changed}")  # type: ignore[arg-type]


def _unknown(what: str, name: str, valid: tuple[str, ...]) -> MachineError:
    near = difflib.get_close_matches(name, valid, 1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return MachineError(f"there is no {what} {name!r}{hint} Valid: {', '.join(valid)}")


def _number(key: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise MachineError(f"{key}={text} is not a number, such as {key}=1e12") from None
    if not 0 < number < float("inf"):
        raise MachineError(f"{key}={text}: it must be a positive number")
    return number


def _table(key: str, text: str) -> Table:
    points = [point.partition(":") for point in text.split("/")]
    if len(points) == 1 and not points[0][1]:
        return ((0.0, _number(key, text)),)
    try:
        table = tuple((float(x), float(y)) for x, _, y in points)
    except ValueError:
        raise MachineError(f"{key}={text} is neither a number nor points such as 0:20e-6/5e6:38e-6") from None
    if any(a[0] >= b[0] for a, b in pairwise(table)) or any(x < 0 or y < 0 for x, y in table):
        raise MachineError(f"{key}={text}: the points must rise, and no number may be negative")
    return table
