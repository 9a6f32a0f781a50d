"""Plans as a picture, as self-contained SVG: for each world the plane with its ranks' pieces and halos, or a strip for each
place where tokens are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise, product

from pvae.passes.shard_choice import NONE
from pvae.tools.plan import LINES, Cut, Plan, TokenCut

__all__ = ["picture"]

WIDTH, GAP, MARGIN, HEADER = 420, 40, 24, 64
STRIP = 34  # pixels of a strip's height
LEAST = 3  # pixels of a halo band: thinner ones would not be seen
_HUES = (210, 30, 140, 280, 0, 180, 60, 320)
_STYLE = """
  svg { background: #fff; font-family: system-ui, sans-serif; fill: #1d1d1f }
  .title { font-size: 16px; font-weight: 600 } .note { font-size: 12px; fill: #555 }
  .rank { font-size: 13px; font-weight: 600; text-anchor: middle } .piece { font-size: 11px; text-anchor: middle }
  .plane { fill: none; stroke: #1d1d1f; stroke-width: 1.5 }
"""


def picture(plans: Sequence[Plan]) -> str:
    """An SVG document, a panel for each plan, side by side. Halo bands are to scale, but at least three pixels wide;
    a piece too small for its name has none."""
    panels: list[_Plane | _Strips] = []
    for index, plan in enumerate(plans):
        form, of_tokens = plan.candidate.form, plan.slowest.of_tokens
        kind = _Strips if form == "sequence" or (plan.candidate == NONE and of_tokens) else _Plane
        panels.append(kind(plan, MARGIN + index * (WIDTH + GAP)))
    width = 2 * MARGIN + len(panels) * (WIDTH + GAP) - GAP
    height = max((panel.bottom for panel in panels), default=0) + MARGIN
    body = "\n".join(line for panel in panels for line in panel.lines())
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" width="{width}" height="{height:g}">'
    )
    return f"{head}\n<style>{_STYLE}</style>\n{body}\n</svg>\n"


def _heading(plan: Plan, left: float) -> Iterator[str]:
    yield _text(left, 36, "title", f"{plan.world} ranks: {plan.candidate}" if plan.world > 1 else "1 rank")
    figures = f"{1e3 * plan.seconds:.1f} ms, {plan.alone / plan.seconds:.2f}x, {plan.memory / 2**30:.2f} GiB a rank"
    yield _text(left, 56, "note", figures)


def _fill(rank: int) -> str:
    hue = _HUES[rank % len(_HUES)]
    return f'fill="hsl({hue} 70% 88%)" stroke="hsl({hue} 50% 40%)"'


class _Strips:
    """One plan of tokens, drawn from `left` on: for each dimension that is cut a strip of its ranks' pieces, to scale."""

    def __init__(self, plan: Plan, left: int) -> None:
        self.plan, self.left, self.cuts = plan, left, plan.slowest.token_cuts
        self.bottom = HEADER + MARGIN + max(len(self.cuts), 1) * (STRIP + MARGIN)

    def lines(self) -> Iterator[str]:
        yield from _heading(self.plan, self.left)
        if not self.cuts:
            yield _text(self.left, HEADER + MARGIN, "note", "nothing is cut")
        for index, cut in enumerate(self.cuts):
            yield from self._strip(cut, HEADER + MARGIN + index * (STRIP + MARGIN))

    def _strip(self, cut: TokenCut, top: float) -> Iterator[str]:
        yield _text(self.left, top - 5, "note", f"dimension {cut.dimension} of {cut.node}, {cut.size}")
        for rank, (lo, hi) in enumerate(pairwise(cut.bounds)):
            x, width = self.left + WIDTH * lo / cut.size, WIDTH * (hi - lo) / cut.size
            size = f'width="{width:.2f}" height="{STRIP}"'
            if lo < hi:
                yield f'<rect x="{x:.2f}" y="{top:.2f}" {size} {_fill(rank)}/>'
            words = f"{lo}-{hi}"
            if width > 7 * len(words):
                yield _text(x + width / 2, top + STRIP / 2 + 4, "piece", words)


class _Plane:
    """One plan of pictures, drawn from `left` on."""

    def __init__(self, plan: Plan, left: int) -> None:
        self.plan, self.left = plan, left
        shape = plan.slowest.input[-2:] or (1, 1)
        self.rows, self.columns = self._cut("h", shape[0]), self._cut("w", shape[1])
        self.height = min(max(WIDTH * shape[0] / shape[1], WIDTH / 4), 2 * WIDTH)
        self.bottom = HEADER + MARGIN + self.height + 40

    def _cut(self, direction: str, size: int) -> Cut:
        whole = Cut(direction, size, (0, size), (0, size))
        return next((cut for cut in self.plan.slowest.cuts if cut.direction == direction), whole)

    def _x(self, column: float) -> float:
        return self.left + WIDTH * column / self.columns.size

    def _y(self, row: float) -> float:
        return HEADER + MARGIN + self.height * row / self.rows.size

    def lines(self) -> Iterator[str]:
        yield from _heading(self.plan, self.left)
        pieces = list(product(pairwise(self.rows.bounds), pairwise(self.columns.bounds)))
        for rank, ((top, bottom), (left, right)) in enumerate(pieces):
            if top < bottom and left < right:
                yield self._box(left, top, right, bottom, _fill(rank))
        for rank, ((top, bottom), (left, right)) in enumerate(pieces):
            if top < bottom and left < right:
                yield from self._halo(_HUES[rank % len(_HUES)], top, bottom, left, right)
        yield self._box(0, 0, self.columns.size, self.rows.size, 'class="plane"')
        for rank, ((top, bottom), (left, right)) in enumerate(pieces):
            x, y = self._x((left + right) / 2), self._y((top + bottom) / 2)
            width, height = self._x(right) - self._x(left), self._y(bottom) - self._y(top)
            words = self._piece(top, bottom, left, right)
            if width > 7 * len(words) and height > 34:
                yield _text(x, y - 2, "rank", f"rank {rank}")
                yield _text(x, y + 13, "piece", words)
            elif width > 50 and height > 13:
                yield _text(x, y + 5, "rank", f"rank {rank}")
        for offset, cut in enumerate((self.rows, self.columns)):
            reach, of = cut.halo
            what = f"{cut.size} {LINES[cut.direction]}" + (f", widest halo {reach} of {of}" if reach else "")
            yield _text(self.left, self.bottom - 22 + 16 * offset, "note", what)

    def _piece(self, top: int, bottom: int, left: int, right: int) -> str:
        parts = []
        if len(self.rows.bounds) > 2:
            parts.append(f"rows {top}-{bottom}")
        if len(self.columns.bounds) > 2:
            parts.append(f"columns {left}-{right}")
        return ", ".join(parts) or "all"

    def _halo(self, hue: int, top: int, bottom: int, left: int, right: int) -> Iterator[str]:
        """The bands that a rank reads around its piece, where the plane goes on."""
        up = max(self.rows.size * self.rows.halo[0] / self.rows.halo[1], LEAST * self.rows.size / self.height)
        side = max(self.columns.size * self.columns.halo[0] / self.columns.halo[1], LEAST * self.columns.size / WIDTH)
        t = max(top - up, 0) if self.rows.halo[0] else top
        b = min(bottom + up, self.rows.size) if self.rows.halo[0] else bottom
        lft = max(left - side, 0) if self.columns.halo[0] else left
        rgt = min(right + side, self.columns.size) if self.columns.halo[0] else right
        style = f'fill="hsl({hue} 70% 45%)" fill-opacity="0.35"'
        bands = ((lft, t, rgt, top), (lft, bottom, rgt, b), (lft, top, left, bottom), (right, top, rgt, bottom))
        for x0, y0, x1, y1 in bands:
            if x0 < x1 and y0 < y1:
                yield self._box(x0, y0, x1, y1, style)

    def _box(self, left: float, top: float, right: float, bottom: float, style: str) -> str:
        x, y = self._x(left), self._y(top)
        size = f'width="{self._x(right) - x:.2f}" height="{self._y(bottom) - y:.2f}"'
        return f'<rect x="{x:.2f}" y="{y:.2f}" {size} {style}/>'


def _text(x: float, y: float, kind: str, words: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(words)}</text>'
