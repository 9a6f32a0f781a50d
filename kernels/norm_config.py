"""How the norm kernel is cut up: a measured table, and a rule for what is not in it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

MAX_CHANNELS = 16384


@dataclass(frozen=True)
class Config:
    """Launch parameters of `norm_kernel`.

    warps   warps a program
    block   channels a piece (a power of two); 256 * warps is one 16-byte load of bf16 a thread
    rows    rows normalised together (a power of two)
    tiles   such groups a program, one after another
    stages  loads in flight over the tiles: 1 leaves it to the number of programs on a multiprocessor
    hoist   hold scale, shift, gate, weight and bias in registers over the tiles
    evict   cache policy of what is read once: "" or "evict_first"
    """

    warps: int
    block: int
    rows: int = 1
    tiles: int = 1
    stages: int = 1
    hoist: bool = False
    evict: str = "evict_first"


@dataclass(frozen=True)
class Work:
    """What the choice of a Config looks at.

    form    "norm", "residual" (norm with a residual in front), "gate" (residual_gate alone); "_select" is appended
            where there are two sets of modulation
    """

    form: str
    channels: int
    itemsize: int  # of x
    rows: int  # in all
    batch_rows: int  # in one batch entry
    lanes: int = 32  # threads of a warp: 64 on AMD's CDNA


# Measured on one H200 by `python -m pvae.tools.bench_norms --sweep`, which prints these lines:
# (form, channels, bytes of an element of x): ((rows, config), ...) with rows ascending.
TABLE: dict[tuple[str, int, int], tuple[tuple[int, Config], ...]] = {}

# Enough programs to fill any GPU a few times over: fewer rows than this stay one tile a program.
MANY_PROGRAMS = 4096


def choose(work: Work) -> Config:
    """The config measured at the nearest number of rows, if its tiles fit into a batch entry; else by rule."""
    measured = TABLE.get((work.form, work.channels, work.itemsize), ()) if work.lanes == 32 else ()
    fitting = [entry for entry in measured if entry[1].rows * entry[1].tiles <= work.batch_rows]
    if not fitting:
        return by_rule(work)
    return min(fitting, key=lambda entry: abs(math.log(entry[0] / max(1, work.rows))))[1]


def by_rule(work: Work) -> Config:
    """20 to 40 channels a thread, pieces of one 16-byte load a thread, several rows where one does not fill a warp."""
    c = work.channels
    warps = 1
    while warps < 512 // work.lanes and c > 40 * work.lanes * warps:
        warps *= 2
    block = min(next_power_of_2(c), 8 * work.lanes * warps)
    rows = 1
    while rows * c < 1024 and rows * 2 <= work.batch_rows and work.rows // (rows * 2) >= MANY_PROGRAMS // 4:
        rows *= 2
    tiles = 1
    while tiles < 4 and work.rows // (rows * tiles * 2) >= MANY_PROGRAMS and rows * tiles * 2 <= work.batch_rows:
        tiles *= 2
    return Config(warps, block, rows, tiles, hoist=tiles > 1)


def candidates(work: Work) -> list[Config]:
    """What a sweep tries: fewer and more warps than the rule's, one and two loads a thread and piece, several tiles."""
    rule = by_rule(work)
    load = work.lanes * max(4, 16 // work.itemsize)  # channels that one 16-byte load of one warp takes
    shapes = {(rule.warps, rule.block)}
    few = work.rows < MANY_PROGRAMS
    for warps in (rule.warps * 4 if few else rule.warps // 2, rule.warps, rule.warps * 2):
        if 1 <= warps <= 512 // work.lanes:
            shapes.add((warps, min(next_power_of_2(work.channels), load * warps)))
    shapes.add((rule.warps, min(next_power_of_2(work.channels), 2 * load * rule.warps)))
    walks = [(1, 1, False)]
    if not few:
        walks += [(2, 1, True), (4, 1, True), (16, 1, True), (8, 2, True), (8, 3, False)]
    found = {rule: None}
    for warps, block in sorted(shapes):
        for tiles, stages, hoist in walks:
            for rows in {1, rule.rows}:
                if rows * tiles <= work.batch_rows and work.channels / block <= 16:
                    found[Config(warps, block, rows, tiles, stages, hoist)] = None
    found[replace(rule, evict="")] = None
    return list(found)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
