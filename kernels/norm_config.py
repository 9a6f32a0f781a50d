"""How the norm kernel is cut up, by a rule that `python -m pvae.tools.bench_norms --sweep` checks against its neighbours."""

from __future__ import annotations

from dataclasses import dataclass, replace

MAX_CHANNELS = 16384


@dataclass(frozen=True)
class Config:
    """Launch parameters of `norm_kernel`.

    warps   warps a program
    block   channels a piece (a power of two); 256 * warps is one 16-byte load of bf16 a thread
    rows    rows normalised together (a power of two)
    early   load scale, shift, weight and bias with x and not after the statistics
    """

    warps: int
    block: int
    rows: int = 1
    early: bool = True


@dataclass(frozen=True)
class Work:
    """What the choice of a Config looks at."""

    channels: int
    rows: int  # in all
    batch_rows: int  # in one batch entry
    residual: bool = False
    lanes: int = 32  # threads of a warp: 64 on AMD's CDNA


# Fewer rows than this leave multiprocessors idle, so that a program's latency counts and not its registers.
FEW_ROWS = 1024
# This many programs fill any GPU a few times over.
MANY_PROGRAMS = 1024


def by_rule(work: Work) -> Config:
    """20 to 40 channels a thread, half of it with a residual, whose program holds twice as much; whole loads of bf16.

    Of few rows, up to four warps share one as soon as it gives a thread 24 channels. Large programs on many rows load
    late: with fewer registers more of them fit on a multiprocessor.
    """
    c, few, warps = work.channels, work.rows <= FEW_ROWS, 1
    while warps < 512 // work.lanes and c > (24 if work.residual or (few and warps < 4) else 40) * work.lanes * warps:
        warps *= 2
    block = min(next_power_of_2(c), (4 if work.residual else 8) * work.lanes * warps)
    rows = 1
    while rows * c < 1024 and rows * 2 <= work.batch_rows and work.rows // (rows * 2) >= MANY_PROGRAMS:
        rows *= 2
    return Config(warps, block, rows, early=few or work.lanes * warps < 256)


def candidates(work: Work) -> list[Config]:
    """What a sweep tries: half to four times the rule's warps, half to two loads a thread, late and early, a warp a row."""
    rule = by_rule(work)
    load = work.lanes * 8
    found = {rule: None}
    for warps in (rule.warps // 2, rule.warps, rule.warps * 2, rule.warps * 4):
        if not 1 <= warps <= 512 // work.lanes:
            continue
        for block in (load * warps // 2, load * warps, load * warps * 2):
            if work.channels <= 16 * block and block <= next_power_of_2(work.channels):
                for early in (True, False):
                    found[replace(rule, warps=warps, block=block, early=early)] = None
        if 1 < warps <= work.batch_rows and work.channels <= 8 * load:
            found[Config(warps, load, warps)] = None
    return list(found)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
