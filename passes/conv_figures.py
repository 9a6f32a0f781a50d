"""What is known about the time of a convolution's forms on a device: measured here, in a table, nearby, or by rule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from pvae.passes.compute_device import ComputeDevice
from pvae.passes.conv_problem import ConvProblem
from pvae.passes.conv_rules import rates, taps_clocks
from pvae.passes.tuning_store import DeviceTable, Forms, Measured, read, shipped, store_path

# A figure of another convolution holds if channels differ by at most a quarter and rows by at most four times.
NEAR_CHANNELS, NEAR_ROWS = math.log(1.25), math.log(4.0)
OTHER_ZEROS = 0.1  # one with other zeros around the picture is as far away as one of 1.1 times the channels
# How much faster a form must be than the one by rule to be chosen instead, by where the figures are from.
MARGINS = {"measured": 0.98, "near": 0.90, "rule": 0.85}


@dataclass(frozen=True)
class Figures:
    """Times in ms by form, all from one source. `sure` says how sure: measured, near or rule; "" if nothing is known."""

    forms: Forms
    source: str = ""
    sure: str = ""

    @property
    def margin(self) -> float:
        return MARGINS.get(self.sure, 0.0)

    def of(self, form: str) -> Measured | None:
        return self.forms.get(form)


NOTHING = Figures({})


@dataclass(frozen=True)
class Knowledge:
    """All that can be asked about a device: its own store first, then the tables that pvae brings."""

    device: ComputeDevice
    own: DeviceTable | None
    brought: tuple[DeviceTable, ...]

    @classmethod
    def of(cls, device: torch.device, options: Any) -> Knowledge:
        """Raises TuningStoreError if the store that the options name is damaged."""
        found = ComputeDevice.of(device, options)
        path = store_path(options.tuning_store)
        own = None if path is None else read(path).get(found.key)
        alike = [t for t in shipped() if t.name == found.name or (found.hopper and t.capability == found.capability)]
        return cls(found, own, tuple(sorted(alike, key=lambda t: t.name != found.name)))

    @property
    def copy(self) -> float | None:
        """Bytes/s of a copy, read and written together."""
        tables = [t for t in (self.own, *self.brought) if t is not None]
        return tables[0].copy if tables else self.device.copy

    def figures(self, problem: ConvProblem | None) -> Figures:
        """The best source that knows the problem. None (symbolic sizes): nothing is known."""
        if problem is None:
            return NOTHING
        own = [] if self.own is None else [(self.own, "measured here")]
        sources = [*own, *((t, f"table of {t.name}") for t in self.brought)]
        for table, source in sources:
            if problem in table.convolutions:
                return Figures(table.convolutions[problem], source, "measured")
        for table, source in sources:
            near = nearest(problem, table.convolutions)
            if near is not None:
                forms = scaled(near, problem, table.convolutions[near], self.device)
                sure = "measured" if _but_for_time(near) == _but_for_time(problem) else "near"
                return Figures(forms, f"{source}, at {near}", sure)
        ruled = rates(problem, self.device)
        return Figures({form: Measured(ms) for form, ms in ruled.items()}, "rule", "rule") if ruled else NOTHING


def nearest(problem: ConvProblem, known: Iterable[ConvProblem]) -> ConvProblem | None:
    """The known convolution most like `problem`: of the same kernel, and channels and rows about as many."""
    best: tuple[float, str, ConvProblem] | None = None
    for other in known:
        if not _same_kind(problem, other):
            continue
        channels = [
            abs(math.log(a / b))
            for a, b in ((problem.channels, other.channels), (problem.out_channels, other.out_channels))
        ]
        rows = abs(math.log(max(problem.rows, 1) / max(other.rows, 1)))
        if max(channels) > NEAR_CHANNELS or rows > NEAR_ROWS:
            continue
        found = (sum(channels) + rows / 4 + OTHER_ZEROS * (_pads(problem) != _pads(other)), str(other), other)
        if best is None or found[:2] < best[:2]:
            best = found
    return None if best is None else best[2]


def _pads(problem: ConvProblem) -> tuple[tuple[int, int], ...]:
    """Zeros in height and width."""
    return problem.padding[-2:]


def _but_for_time(problem: ConvProblem) -> ConvProblem:
    """The problem whose frames are all there already: before x, as padding or in x, they are the same work."""
    if problem.ndim == 2:
        return problem
    frames = problem.sizes[0] + problem.before + sum(problem.padding[0])
    sizes, padding = (frames, *problem.sizes[1:]), ((0, 0), *problem.padding[1:])
    return replace(problem, sizes=sizes, padding=padding, before=0)


def _same_kind(a: ConvProblem, b: ConvProblem) -> bool:
    half = ("bfloat16", "float16")
    same = a.precision == b.precision or (a.precision in half and b.precision in half)
    return same and (a.kernel, a.stride, a.dilation, a.groups) == (b.kernel, b.stride, b.dilation, b.groups)


def scaled(known: ConvProblem, problem: ConvProblem, forms: Forms, device: ComputeDevice) -> Mapping[str, Measured]:
    """The figures of `known` at the rate that it had, for `problem`; of `taps` on Hopper by how tiles fit in both."""
    factors = dict.fromkeys(forms, problem.flops / known.flops if known.flops else 1.0)
    if device.hopper and "taps" in forms:
        here, there = taps_clocks(problem, device.units), taps_clocks(known, device.units)
        if here is not None and there:
            factors["taps"] = here / there
    return {name: m if m.ms is None else replace(m, ms=m.ms * factors[name]) for name, m in forms.items()}
