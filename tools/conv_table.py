"""What `pvae.tools.bench_conv` measured, as figures of the tuning store: the source of `passes/conv_table_*.json`.

A row is two convolutions of the store: the zeros around the picture are its padding, or lie in x already. Of each layout
that is cuDNN's time for the one or the other. Frames before x come from a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pvae.passes.conv_problem import ConvProblem
from pvae.passes.tuning_store import Measured
from pvae.tools.conv_shapes import Shape

NATIVE = {"native": "native contiguous", "channels_last": "native channels_last"}


def figures(row: Mapping[str, Any], precision: str) -> dict[ConvProblem, dict[str, Measured]]:
    """A row of the bench's JSON by convolution and form, in the store's name for how it was computed (`ConvProblem`).

    Where the windows tile a video it has none: that is a product of patches, which the bench does not run.
    """
    shape = Shape.parse(row["shape"])
    if len(shape.kernel) == 3 and shape.kernel == shape.stride:
        return {}
    inner, padded = problem_of(shape, precision, padded=False), problem_of(shape, precision, padded=True)
    return {problem: _forms(problem, shape, row) for problem in dict.fromkeys((inner, padded))}


def problem_of(shape: Shape, precision: str, *, padded: bool) -> ConvProblem:
    """The bench's shape, with the zeros around the picture in x (`padded`) or as its padding."""
    borders = shape.borders()
    reads = [s * (n - 1) + k for k, s, n in zip(shape.kernel, shape.stride, shape.size, strict=True)]
    time, before = (1, shape.cached_frames()) if len(reads) == 3 else (0, 0)
    sizes = [reads[0] - before] * time
    sizes += [n - (0 if padded else sum(pair)) for n, pair in zip(reads[-2:], borders, strict=True)]
    padding = [(0, 0)] * time + [(0, 0) if padded else pair for pair in borders]
    ones = (1,) * len(reads)
    return ConvProblem(
        precision,
        shape.batch,
        shape.channels,
        tuple(sizes),
        shape.out_channels,
        shape.kernel,
        shape.stride,
        tuple(padding),
        ones,
        before=before,
    )


def _forms(problem: ConvProblem, shape: Shape, row: Mapping[str, Any]) -> dict[str, Measured]:
    """By form, as far as it was measured so. A pad of one side is written beforehand, so that one costs what is padded."""
    ms: Mapping[str, float] = row["ms"]
    by_itself = any(map(any, problem.padding)) and all(front == back for front, back in problem.padding)
    names = {form: name if by_itself else f"{name} padded" for form, name in NATIVE.items()}
    times = {form: ms[name] for form, name in names.items() if name in ms}
    if len(shape.kernel) == 3 and shape.kernel[0] == 1 and "frames padded" in ms:
        # The same sums as a conv3d of one frame; the bench runs it on padded frames alone.
        times = {"frames": min(times["channels_last"], ms["frames padded"])}
    unfolds = [t for name, t in ms.items() if name.startswith("unfold")]
    times |= {"unfold2d": min(unfolds)} if unfolds else {}
    found = {form: Measured(round(t, 5)) for form, t in times.items()}
    tuned = ms.get("tuned", ms["taps"])
    config = tuple(row["tuned_config"]) if tuned < ms["taps"] else ()
    return found | {"taps": Measured(round(min(tuned, ms["taps"]), 5), None, config)}
