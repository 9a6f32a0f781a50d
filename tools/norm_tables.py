"""The figures of `bench_norms --json` as Markdown: `python -m pvae.tools.norm_tables figures.json`.

One table a form. TB/s of each implementation (SGLang: the faster, where it has two), ours as a share of the copy, and how
many times faster ours is than max-autotune and than the fastest other; errors are relative to float64.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from pvae.tools.bench_norms import FOCUS, Row

TITLES = {
    "norm": "Layer norm, scale, shift",
    "residual": "Gated residual, layer norm, scale, shift",
    "select": "Layer norm, two sets of scale and shift by index",
    "residual_select": "Gated residual, layer norm, two sets of gate, scale and shift by index",
    "gate": "Gated residual alone",
    "rms": "RMS norm, scale, shift",
    "residual_rms": "Gated residual, RMS norm, scale, shift",
}
COLUMNS = ("eager", "inductor", "max", "sglang", "pvae", "copy")


def times(row: Row) -> dict[str, float]:
    """Milliseconds by column, of what was measured."""
    found = {name: ms for name, ms in row.ms.items() if name in COLUMNS}
    sglang = [ms for name, ms in row.ms.items() if name.startswith("sglang")]
    return found | ({"sglang": min(sglang)} if sglang else {})


def line(row: Row) -> str:
    ms = times(row)
    best = min(ms[name] for name in ms if name not in ("pvae", "copy"))
    cells = [f"{row.bytes / ms[name] / 1e9:.2f}" if name in ms else "" for name in COLUMNS]
    cells += [f"{100 * ms['copy'] / ms['pvae']:.0f} %", f"{ms['max'] / ms['pvae']:.2f}", f"{best / ms['pvae']:.2f}"]
    cells += [f"{row.error[name] * 1e3:.2f}e-3" for name in ("eager", "pvae")]
    batch, rows, channels = row.shape
    shape = f"{batch}x{rows}x{channels}" if batch > 1 else f"{rows}x{channels}"
    return f"| {shape} | " + " | ".join(cells) + " |"


def summary(rows: list[Row]) -> str:
    """Share of the copy at the three large shapes, and the spread of the ratios over all shapes."""
    focus = [row for row in rows if tuple(row.shape) in FOCUS]
    shares = ", ".join(f"{100 * row.ms['copy'] / row.ms['pvae']:.0f} %" for row in focus)
    pairs = [(times(row), row) for row in rows]
    most = [ms["max"] / ms["pvae"] for ms, _ in pairs]
    best = [min(ms[n] for n in ms if n not in ("pvae", "copy")) / ms["pvae"] for ms, _ in pairs]
    mean = math.exp(sum(math.log(ratio) for ratio in most) / len(most))
    slower = sum(ratio < 0.995 for ratio in best)
    return (
        f"{shares} of a copy at the first three shapes. Over {len(rows)} shapes {min(most):.2f} to {max(most):.2f} times "
        f"max-autotune (geometric mean {mean:.2f}); {min(best):.2f} to {max(best):.2f} times the best other, slower than it "
        f"by more than half a percent at {slower}."
    )


def tables(rows: list[Row]) -> str:
    parts = []
    for form, title in TITLES.items():
        own = [row for row in rows if row.form == form]
        if not own:
            continue
        own.sort(key=lambda row: (tuple(row.shape) not in FOCUS, *row.shape))
        parts.append(f"## {title} (`{form}`)\n\n{summary(own)}\n")
        heads = ("shape", *COLUMNS, "of copy", "x max", "x best other", "error eager", "error pvae")
        parts.append("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
        parts.append("\n".join(line(row) for row in own) + "\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    args = parser.parse_args()
    print(tables([Row(**row) for row in json.loads(args.figures.read_text())]))


if __name__ == "__main__":
    main()
