"""The demo in pieces: the photograph decoded as several ranks would, on one device, and how far the seams show.

    halo, patch  the whole decode is one graph; every rank's own form of it runs in lockstep with the others
    tile         the VAE's own tiling (diffusers' `AutoencoderKLWan.enable_tiling`). Tiles are computed one after another:
                 which rank computes a tile changes no value of it, so only the traffic knows of ranks

float32, TF32 off, the rewritten graph interpreted; compared with the eager unsharded decode and with float64.
"""

from __future__ import annotations

import copy
import json
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx import Graph

import pvae
from pvae.capture import Capture, capture_run
from pvae.lockstep import Traffic, all_meshes, lockstep
from pvae.module import compile_with
from pvae.options import CHOICES, Options, parse_options
from pvae.passes.ir import value
from pvae.passes.pipeline import run_pipeline
from pvae.passes.rule import Context
from pvae.ranks import mesh_shape
from pvae.runtime.fetch import fetch
from pvae.runtime.torch_compat import new_fake_mode, static_fake
from pvae.testing import Agreement
from pvae.tile_plan import TilePlan
from pvae.tiles import tiles_of
from pvae.tools.cli_options import comma_list
from pvae.tools.demo.measure import decode, device_name, encode, exact_copy
from pvae.tools.demo.media import photograph
from pvae.tools.demo.model import demo_vae
from pvae.tools.demo.panel import amplified_difference, mark_seams, panel
from pvae.tools.demo.quality import psnr, relative_error, seam_figure
from pvae.tools.model_run import RequestError

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

FORMS = ("halo", "patch", "tile")
CONTEXTS = (0, 2, 4, 8)
WORLD = 4
SIZE = 512  # the photograph's own
EXAMPLE = "pvae demo --shard patch --world 4"


@dataclass(frozen=True)
class ShardRequest:
    """Which forms, over how many ranks. `dims` is of halo and patch, `contexts` (latents, a row each) of patch."""

    forms: tuple[str, ...]
    world: int = WORLD
    dims: str = "auto"
    contexts: tuple[int, ...] = CONTEXTS

    def cases(self) -> Iterator[tuple[str, int | None]]:
        """(form, context or None), one a row."""
        for form in self.forms:
            yield from ((form, n) for n in self.contexts) if form == "patch" else [(form, None)]


def shard_request(
    shard: str | None, world: int | None, dims: str | None, contexts: str | None, engine: str | None
) -> ShardRequest | None:
    """What the options of `pvae demo` ask for; None without `--shard`. RequestError says what would work."""
    given = {"--world": world, "--shard-dims": dims, "--patch-context": contexts}
    if shard is None:
        stray = [name for name, text in given.items() if text is not None]
        if stray:
            raise RequestError(f"{stray[0]} says how to decode in pieces, which --shard asks for, such as: {EXAMPLE}")
        return None
    forms = tuple(dict.fromkeys(comma_list(shard, str)))
    unknown = [form for form in forms if form not in FORMS]
    if unknown or not forms:
        raise RequestError(
            f"--shard {shard!r} names no form; valid: {', '.join(FORMS)}, or several, such as halo,patch"
        )
    if engine not in (None, "eager"):
        raise RequestError(
            f"--engine {engine}: the ranks of --shard run on one device, their graphs interpreted (eager)"
        )
    if dims is not None and not {"halo", "patch"}.intersection(forms):
        raise RequestError("--shard-dims is of the forms halo and patch; the tiles are the VAE's own")
    if contexts is not None and "patch" not in forms:
        raise RequestError(f"--patch-context is of the form patch, such as: {EXAMPLE} --patch-context 4")
    if dims is not None and dims not in CHOICES["shard_dims"]:
        raise RequestError(f"--shard-dims {dims!r} does not exist; valid: {', '.join(CHOICES['shard_dims'])}")
    rows = CONTEXTS if contexts is None else _contexts_named(contexts)
    return ShardRequest(forms, WORLD if world is None else world, dims or "auto", rows)


def _contexts_named(text: str) -> tuple[int, ...]:
    parts = comma_list(text, str)
    if not parts or not all(part.isdecimal() for part in parts):
        raise RequestError(f"--patch-context {text!r} is no list of latent rows of 0 or more, such as 0,4")
    return tuple(dict.fromkeys(map(int, parts)))


@dataclass(frozen=True)
class ShardRow:
    """One line of the table, against the unsharded float32 decode. Pixels are in [-1, 1].

    `seam` is the mean absolute difference across seams over that inside, of this decode; `seam_unsharded` that of the
    unsharded one at the same places. Where both are equal the seams cannot be seen. None where there is no seam.
    """

    form: str
    context: int | None  # latents around a patch
    world: int
    grid: tuple[int, int]  # pieces of the picture in rows and columns
    psnr_db: float | None  # None where no value differs
    seam: float | None
    seam_unsharded: float | None
    max_error: float
    error: float  # relative L2 against float64
    exact: bool  # `error` is within the contract (1.25 times the eager error)
    collectives: int  # of the busiest rank, the gathering of the result among them
    received: int  # bytes, likewise

    @property
    def ok(self) -> bool:
        """Whether the row keeps what its form promises: halo is exact, the others need not be."""
        return self.exact or self.form != "halo"

    @property
    def visible(self) -> float | None:
        """How much more a seam shows than the picture itself does there: 1.0 is invisible."""
        return self.seam / self.seam_unsharded if self.seam and self.seam_unsharded else None

    @property
    def name(self) -> str:
        return self.form if self.context is None else f"{self.form}, context {self.context}"


@dataclass(frozen=True)
class ShardResult:
    """What the demo in pieces found; `results.json` has it under "shard"."""

    device: str
    dtype: str
    height: int
    width: int
    versions: dict[str, str]
    eager_error: float  # of the unsharded decode, relative L2 against float64
    rows: tuple[ShardRow, ...]
    panel: str

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)


@dataclass(frozen=True)
class Decoded:
    """The photograph put together from pieces: `[1,3,1,H,W]`, where they meet, and what the busiest rank received.

    `rows` are the pixel rows before which a seam lies, `columns` likewise.
    """

    picture: Tensor
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    collectives: int
    received: int


# --- halo and patch ----------------------------------------------------------------------------------------------------


class _Decode(nn.Module):
    """The decode of latents as one forward: `[N,z,t,h,w]` to `[N,3,T,H,W]`."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return decode(self.vae, latents)


@dataclass(frozen=True)
class DecodeGraph:
    """The unsharded decode as one graph, with what its placeholders take."""

    capture: Capture
    inputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, vae: AutoencoderKLWan, latents: Tensor) -> DecodeGraph:
        module, mode = _Decode(vae), new_fake_mode()
        weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        inputs = (latents, *weights.values())

        def run(latents: Tensor, *flat: Tensor) -> list[Tensor]:
            return [torch.func.functional_call(module, dict(zip(weights, flat, strict=True)), (latents,))]

        return cls(capture_run(run, [static_fake(mode, t) for t in inputs], list(weights), mode), inputs)

    def in_pieces(self, options: Options, world: int) -> Decoded:
        """Every rank's graph of it, all run in lockstep; rank 0's result, which is whole as every rank's is."""
        graphs = []
        for mesh in all_meshes(mesh_shape(options, world)):
            gm = copy.deepcopy(self.capture.gm)
            context = Context(options, self.capture.weights, mesh=mesh)
            run_pipeline(gm, options.pipeline, context, check=options.verify == "on")
            graphs.append(gm)
        traffic = [Traffic() for _ in graphs]
        (picture,), *_ = lockstep(graphs, [self.inputs] * world, traffic)
        rows, columns = _seams(graphs[0].graph, picture)
        busiest = max(traffic, key=lambda t: t.received)
        return Decoded(picture, rows, columns, busiest.collectives, busiest.received)


def _seams(graph: Graph, picture: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the pieces of the result meet, along its rows and its columns: read off the fetches that make it whole."""
    meet: dict[int, set[int]] = {}
    for node in graph.nodes:
        if node.target is not fetch:
            continue
        x, dim, have, need = node.args[:4]
        whole = all(interval == (0, have[-1]) for interval in map(tuple, need))
        if whole and value(x).dim() == picture.dim() and have[-1] == picture.shape[dim]:
            meet[dim] = set(have) - {0, have[-1]}
    height, width = picture.dim() - 2, picture.dim() - 1
    return tuple(sorted(meet.get(height, ()))), tuple(sorted(meet.get(width, ())))


# --- tile --------------------------------------------------------------------------------------------------------------


def by_tiles(vae: AutoencoderKLWan, latents: Tensor, options: Options, world: int) -> Decoded:
    """The VAE's own tiled decode, its tiles shared by `world` ranks, with the VAE's own tile and stride: 256 and 192 pixels.

    For a picture with a side below two tiles, both are scaled down so that several tiles remain.
    """
    tiled = copy.deepcopy(vae)
    scale = tiled.spatial_compression_ratio
    side = min(latents.shape[-2:]) * scale
    own, own_stride = tiled.tile_sample_min_height, tiled.tile_sample_stride_height
    tile = min(own, side // 2 // (4 * scale) * (4 * scale))
    if not tile:
        raise ValueError(f"a picture of {side} pixels has no two tiles; it needs {8 * scale}")
    stride = tile * own_stride // own
    tiled.enable_tiling(tile, tile, stride, stride)
    compile_with(tiled, options)
    picture = decode(tiled, latents)
    entry, tiles = tiled.decode, tiles_of(tiled)
    assert tiles is not None
    plan = tiles.planner.plan("decode", entry.own, (latents,), {})
    rows, columns = (tuple(range(stride, side, stride)) for side in picture.shape[-2:])
    return Decoded(picture, rows, columns, int(world > 1), received_by_tiles(plan, world))


def received_by_tiles(plan: TilePlan, world: int) -> int:
    """Bytes of the results of other ranks' tiles, of the rank that has fewest of its own."""
    own, owners = [0] * world, plan.owners(world)
    for call in plan.calls:
        specs = [call.kind.outputs[i] for i in call.sends]
        own[owners[call.task]] += sum(math.prod(s.shape) * s.dtype.itemsize for s in specs)
    return plan.bytes - min(own)


# --- the whole ---------------------------------------------------------------------------------------------------------


def _options(form: str, dims: str, context: int | None) -> Options:
    """PVAE_* variables have a say in all but the form."""
    given = parse_options(None)
    formed = replace(given, shard=form, shard_dims=dims, mesh=None, patch_context=context or 0)
    return replace(formed, engine="eager", gather="on")


@torch.no_grad()
def run_shard(
    out: Path,
    device: str,
    request: ShardRequest,
    console: Console,
    *,
    size: int = SIZE,
    vae: AutoencoderKLWan | None = None,
) -> ShardResult:
    """Decodes the photograph (`size` x `size` pixels, a multiple of 8) whole and in pieces.

    Writes `shard.png` and, into `results.json`, "shard"; what else that file has stays. `vae` replaces the demo's weights
    (tests).
    """
    dtype = torch.float32
    eager = demo_vae(dtype, device) if vae is None else nn.Module.to(vae, device, dtype)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        pixels = photograph(size, size)[:, :, None].to(device, dtype)
        latents = encode(eager, pixels)
        console.print("  unsharded")
        whole = decode(eager, latents)
        console.print("  unsharded, float64")
        truth = decode(exact_copy(eager), latents.double())
        eager_error = relative_error(whole, truth)
        graph, found = None, []
        for form, context in request.cases():
            console.print(f"  {form}{'' if context is None else f', context {context}'}")
            options = _options(form, request.dims, context)
            if form == "tile":
                decoded = by_tiles(eager, latents, options, request.world)
            else:
                graph = graph or DecodeGraph.of(eager, latents)
                decoded = graph.in_pieces(options, request.world)
            found.append((_row(form, context, request.world, decoded, whole, truth, eager_error), decoded))
    result = ShardResult(
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        height=size,
        width=size,
        versions={"pvae": pvae.__version__, "torch": torch.__version__, "python": platform.python_version()},
        eager_error=eager_error,
        rows=tuple(row for row, _ in found),
        panel=str(out / "shard.png"),
    )
    _draw(result, pixels, whole, found)
    path = out / "results.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {"shard": asdict(result)}, indent=2) + "\n")
    console.print(_table(result))
    console.print(f"pictures: {result.panel}\nfigures:  {path}")
    return result


def _row(
    form: str, context: int | None, world: int, decoded: Decoded, whole: Tensor, truth: Tensor, eager_error: float
) -> ShardRow:
    decibels = psnr(decoded.picture, whole)
    error = relative_error(decoded.picture, truth)
    return ShardRow(
        form=form,
        context=context,
        world=world,
        grid=(len(decoded.rows) + 1, len(decoded.columns) + 1),
        psnr_db=decibels if math.isfinite(decibels) else None,
        seam=seam_figure(decoded.picture, decoded.rows, decoded.columns),
        seam_unsharded=seam_figure(whole, decoded.rows, decoded.columns),
        max_error=(decoded.picture - whole).abs().max().item(),
        error=error,
        exact=Agreement(whole.dtype, error, eager_error, whole.numel()).ok,
        collectives=decoded.collectives,
        received=decoded.received,
    )


def _draw(result: ShardResult, pixels: Tensor, whole: Tensor, found: Sequence[tuple[ShardRow, Decoded]]) -> None:
    def flat(picture: Tensor) -> Tensor:
        return picture[:, :, 0].float().cpu()

    differences, titles = [], []
    for row, decoded in found:
        difference, factor = amplified_difference(flat(decoded.picture), flat(whole))
        differences.append(mark_seams(difference, decoded.rows, decoded.columns))
        decibels = "equal" if row.psnr_db is None else f"{row.psnr_db:.1f} dB"
        lines = [*row.name.split(", "), "x".join(map(str, row.grid)), decibels, "difference", f"x {factor:,.0f}"]
        titles.append("\n".join(lines))
    same = [picture.expand(len(found), -1, -1, -1) for picture in (flat(pixels), flat(whole))]
    columns = [
        ("input", same[0]),
        ("unsharded", same[1]),
        ("in pieces", torch.cat([flat(decoded.picture) for _, decoded in found])),
        ("|in pieces - unsharded|, seams marked", torch.cat(differences)),
    ]
    world = result.rows[0].world
    caption = f"demo VAE, {result.height}x{result.width}, {result.dtype}, {world} ranks on one device ({result.device})"
    panel(columns, Path(result.panel), titles, caption, tile=384)


def _table(result: ShardResult) -> Table:
    title = f"photograph of {result.height}x{result.width} decoded in pieces, {result.dtype}, {result.device}"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = (
        "PSNR, largest difference (pixels in [-1, 1]): against the unsharded decode\n"
        "seam: mean absolute difference across seams over that inside; ratio: to the unsharded picture's own there, "
        "1 is invisible\n"
        f"error: relative L2 against float64, unsharded {result.eager_error:.2e}; exact: at most 1.25 times that\n"
        "received: by the busiest rank, the result's other pieces among it"
    )
    table.add_column("form")
    names = ("ranks", "grid", "PSNR dB", "largest", "seam", "ratio", "error", "exact", "collectives", "received")
    for name in names:
        table.add_column(name, justify="right")

    def shown(number: float | None, form: str, otherwise: str = "") -> str:
        return otherwise if number is None else format(number, form)

    for row in result.rows:
        table.add_row(
            row.name,
            str(row.world),
            "x".join(map(str, row.grid)),
            shown(row.psnr_db, ".1f", "equal"),
            f"{row.max_error:.1e}",
            shown(row.seam, ".3f"),
            shown(row.visible, ".3f"),
            f"{row.error:.2e}",
            "yes" if row.exact else "no",
            str(row.collectives),
            f"{row.received / 2**20:.2f} MiB",
            style=None if row.ok else "red",
        )
    return table
