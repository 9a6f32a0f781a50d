"""The demonstration: a photograph and a clip through the demo VAE, eager and compiled by pvae, side by side."""

from __future__ import annotations

import copy
import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import pvae
from pvae.tools.demo.measure import Row, Sides, device_name, exact_copy, measure
from pvae.tools.demo.media import clip, photograph
from pvae.tools.demo.model import demo_vae
from pvae.tools.demo.panel import amplified_difference, panel

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; `results.json` is this as JSON."""

    device: str
    dtype: str
    engine: str
    note: str | None  # why the engine is not the one asked for
    height: int
    width: int
    frames: int
    versions: dict[str, str]
    rows: tuple[Row, ...]
    report: str  # `pvae.report` as text: which passes did what
    panel: str


def pvae_compile(vae: AutoencoderKLWan, engine: str) -> None:
    """`pvae.compile(vae, engine=engine)`, without its result."""
    pvae.compile(vae, engine=engine)


def usable_engine(engine: str, device: str) -> tuple[str, str | None]:
    """The engine to use, and a sentence where it is not the one asked for: Inductor on CPU needs a C++ compiler."""
    from torch._inductor import config

    compilers = [name for name in config.cpp.cxx if name]
    if engine == "inductor" and device == "cpu" and not any(shutil.which(name) for name in compilers):
        return "eager", (
            f"no C++ compiler found ({', '.join(compilers)}; set CXX to name another), which Inductor needs on CPU: "
            "pvae's passes run, and the graph they give is interpreted (engine='eager'), so expect no speed-up"
        )
    return engine, None


def _table(result: DemoResult) -> Table:
    title = f"{result.height}x{result.width}, clip of {result.frames} frames, {result.dtype}, {result.device}"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = "error: relative L2 against float64 · PSNR: reconstruction against input"
    table.add_column("")
    for name in ("eager ms", "pvae ms", "speed-up", "eager error", "pvae error", "compile s", "PSNR eager", "pvae dB"):
        table.add_column(name, justify="right")
    for row in result.rows:
        decibels = [f"{v:.2f}" if v is not None else "" for v in (row.psnr_eager_db, row.psnr_pvae_db)]
        table.add_row(
            f"{row.subject} {row.operation}",
            f"{row.eager_ms:.1f}",
            f"{row.pvae_ms:.1f}",
            f"{row.speedup:.2f}x",
            f"{row.eager_error:.1e}",
            f"{row.pvae_error:.1e}",
            f"{row.compile_s:.1f}",
            *decibels,
        )
    return table


def _progress(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


@torch.no_grad()
def run_demo(
    out: Path,
    device: str,
    engine: str,
    console: Console,
    *,
    size: int | None = None,
    frames: int | None = None,
    repeats: int | None = None,
    vae: AutoencoderKLWan | None = None,
    compiler: Callable[[AutoencoderKLWan, str], None] = pvae_compile,
    report: Callable[[AutoencoderKLWan], object] = pvae.report,
) -> DemoResult:
    """Encodes and decodes the photograph and the clip, eager and compiled; writes `panel.png` and `results.json`.

    `device` is "cpu" or "cuda"; on CUDA the model runs in bfloat16, 17 frames of 512x512, on CPU in float32, 9 frames
    of 256x256, unless `size` (a multiple of 8) and `frames` (1 + 4k) say otherwise. Photograph and clip have one size,
    so that they share the graph of a first chunk. `vae`, `compiler` and `report` replace the demo's weights,
    `pvae.compile` and `pvae.report` (tests).
    """
    on_gpu = device == "cuda"
    size, frames = size or (512 if on_gpu else 256), frames or (17 if on_gpu else 9)
    repeats = repeats or (10 if on_gpu else 5)
    engine, note = usable_engine(engine, device)
    if note:
        console.print(f"note: {note}")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    eager = demo_vae(dtype, device) if vae is None else torch.nn.Module.to(vae, device, dtype)
    sides = Sides(eager, copy.deepcopy(eager), exact_copy(eager))
    compiler(sides.compiled, engine)

    rows: list[Row] = []
    shown: list[tuple[torch.Tensor, ...]] = []  # input, eager, pvae: pictures [n,3,H,W]
    frames_shown = sorted({0, frames // 2, frames - 1})
    with _progress(console) as progress:
        task = progress.add_task("", total=16)

        def say(stage: str) -> None:
            progress.update(task, description=stage)
            progress.advance(task)
            if not console.is_terminal:  # a log has no bar that moves
                console.print(f"  {stage}")

        for subject, pixels, times in (
            ("photograph", photograph(size, size)[:, :, None], [0]),
            ("clip", clip(frames, size, size), frames_shown),
        ):
            found, reconstructions = measure(sides, subject, pixels.to(device, dtype), repeats, say)
            rows += found
            shown.append(tuple(v[0, :, times].transpose(0, 1).float().cpu() for v in (pixels, *reconstructions)))

    originals, theirs, ours = (torch.cat(pictures) for pictures in zip(*shown, strict=True))
    difference, factor = amplified_difference(ours, theirs)
    name = device_name(device)
    precision = str(dtype).removeprefix("torch.")
    panel(
        [("input", originals), ("eager", theirs), ("pvae", ours), (f"|pvae - eager| x {factor:,.0f}", difference)],
        out / "panel.png",
        row_titles=["photograph", *(f"clip\nframe {t}" for t in frames_shown)],
        caption=f"demo VAE, {size}x{size}, {precision}, engine {engine}, {name}",
    )
    result = DemoResult(
        device=name,
        dtype=precision,
        engine=engine,
        note=note,
        height=size,
        width=size,
        frames=frames,
        versions={"pvae": pvae.__version__, "torch": torch.__version__, "python": platform.python_version()},
        rows=tuple(rows),
        report=str(report(sides.compiled)),
        panel=str(out / "panel.png"),
    )
    (out / "results.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    console.print(_table(result))
    console.print(result.report, markup=False, highlight=False)
    console.print(f"pictures: {result.panel}\nfigures:  {out / 'results.json'}")
    return result
