"""The demo: its media, its panel, its trainer, its weights, and the run as a whole."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from rich.console import Console

from pvae.options import Options
from pvae.tile_plan import Planner
from pvae.tools import cli
from pvae.tools import train_demo_vae as trainer
from pvae.tools.demo import run as demo
from pvae.tools.demo.measure import decode, encode, exact_copy
from pvae.tools.demo.media import clip, photograph
from pvae.tools.demo.model import ARCHITECTURE, FIGURES, FOLDER, WEIGHTS, demo_vae, load_vae
from pvae.tools.demo.panel import amplified_difference, mark_seams, panel, panel_size
from pvae.tools.demo.quality import psnr, relative_error, seam_figure
from pvae.tools.demo.shard import (
    DecodeGraph,
    ShardRequest,
    ShardResult,
    ShardRow,
    by_tiles,
    received_by_tiles,
    run_shard,
    shard_request,
)

TINY = trainer.Recipe(
    architecture=ARCHITECTURE | {"base_dim": 4, "dim_mult": [1, 1, 1, 1]},
    images=((2, 1, 32),),
    clips=((1, 5, 32),),
    images_only=0.5,
    longest_side=128,
)
needs_weights = pytest.mark.skipif(
    not (FOLDER / WEIGHTS).is_file(), reason="the demo's weights are not trained yet (tools/train_demo_vae.py)"
)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 96), (512, 512)])
def test_photograph(height: int, width: int) -> None:
    pixels = photograph(height, width)
    assert pixels.shape == (1, 3, height, width) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1 and pixels.std() > 0.3
    assert torch.equal(pixels, photograph(height, width))


def test_clip_moves_smoothly() -> None:
    pixels = clip(9, 64, 96)
    assert pixels.shape == (1, 3, 9, 64, 96) and pixels.abs().max() <= 1
    assert torch.equal(pixels[:, :, :5], clip(5, 64, 96)), "a longer clip is the same clip, going on"
    steps = [psnr(pixels[:, :, t], pixels[:, :, t + 1]) for t in range(8)]
    assert min(steps) > 12 and max(steps) < 40, "neighbouring frames differ, and not by much"


def test_panel(tmp_path: Path) -> None:
    images = photograph(32, 48).repeat(2, 1, 1, 1)
    difference, factor = amplified_difference(images, images + 3e-6)
    assert factor == 500_000 and difference.mean() > 0, "half of the difference of 3e-6, made visible"
    assert amplified_difference(images, images)[1] == 1
    path = tmp_path / "sub" / "panel.png"
    panel([("a", images), ("b", images), ("d", difference)], path, ["one", "two"], "caption", tile=60)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.size == panel_size(3, 2, 60, 32 / 48)
    with pytest.raises(ValueError, match="column 'b' has shape"):
        panel([("a", images), ("b", images[:1])], path, ["one", "two"], "")


def test_held_out_photographs_are_not_trained_on() -> None:
    assert not {name for _, name, _ in trainer.PHOTOGRAPHS} & set(trainer.HELD_OUT)


def test_samples_are_smooth_clips_in_range() -> None:
    atlas = trainer.load_atlas(128, torch.device("cpu"))
    torch.manual_seed(1)
    first = trainer.sample(atlas, 8, 5, 48)
    torch.manual_seed(1)
    again = trainer.sample(atlas, 8, 5, 48)
    assert first.shape == (8, 3, 5, 48, 48) and first.abs().max() <= 1 and first.std() > 0.1
    assert torch.equal(first, again)


def test_gradient_flows_through_the_caches() -> None:
    """The gradient of a clip's loss, chunk by chunk with caches, is its finite difference."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**TINY.architecture).double()
    pixels = torch.rand(1, 3, 9, 16, 16, dtype=torch.float64) * 2 - 1
    weight = vae.decoder.conv_in.weight
    direction = torch.randn_like(weight)

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        output, _, _ = trainer.reconstruct(vae, pixels)
        return output.square().mean()

    (gradient,) = torch.autograd.grad(loss(), [weight])
    with torch.no_grad():
        step = 1e-4
        weight += step * direction
        up = loss()
        weight -= 2 * step * direction
        down = loss()
    # diffusers' WanUpsample rounds to float32, which bounds the agreement.
    torch.testing.assert_close((up - down) / (2 * step), (gradient * direction).sum(), rtol=1e-3, atol=1e-7)


def test_trainer_writes_what_the_demo_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "held_out", lambda: {"astronaut_clip_5x32": clip(5, 32, 32)})
    figures = trainer.train(TINY, tmp_path, torch.device("cpu"), steps=2, minutes=None)
    assert figures["training"]["steps"] == 2
    stored = json.loads((tmp_path / FIGURES).read_text())
    assert stored["psnr_db"] == figures["psnr_db"] and stored["psnr_db"].keys() == {"astronaut_clip_5x32"}
    vae = load_vae(tmp_path, torch.float64, "cpu")
    assert vae.dtype == torch.float64 and not vae.training and not any(p.requires_grad for p in vae.parameters())
    assert len(vae.config.latents_std) == vae.config.z_dim == 16


def test_settings_change_the_recipe_and_are_recorded() -> None:
    recipe = trainer.recipe_from(["learning_rate=1e-3", "clips=[[2,5,32]]"])
    assert recipe.learning_rate == 1e-3 and recipe.clips == ((2, 5, 32),)
    assert trainer.changes(recipe) == {"learning_rate": 1e-3, "clips": ((2, 5, 32),)}
    with pytest.raises(ValueError, match=r"no 'rate'; it has .*learning_rate"):
        trainer.recipe_from(["rate=1"])


def test_missing_weights_name_the_training_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m pvae\.tools\.train_demo_vae"):
        load_vae(tmp_path, torch.float32, "cpu")


def test_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**TINY.architecture).eval().requires_grad_(False)
    compiled: list[torch.nn.Module] = []
    console = Console(record=True, width=140)
    result = demo.run_demo(
        tmp_path,
        "cpu",
        "eager",
        console,
        size=32,
        frames=5,
        repeats=1,
        vae=vae,
        compiler=lambda module, engine: compiled.append(module),
        report=lambda module: f"report of {type(module).__name__}",
    )
    assert len(compiled) == 1 and compiled[0] is not vae
    assert [(row.subject, row.operation) for row in result.rows] == [
        (subject, operation) for subject in ("photograph", "clip") for operation in ("encode", "decode")
    ]
    for row in result.rows:
        assert row.eager_error == row.pvae_error < 1e-5 and row.eager_ms > 0
        assert (row.psnr_eager_db is None) == (row.operation == "encode")
    assert json.loads((tmp_path / "results.json").read_text())["rows"][3]["operation"] == "decode"
    with Image.open(tmp_path / "panel.png") as picture:
        assert picture.size == panel_size(4, 4, 256)
    printed = console.export_text()
    assert "clip decode" in printed and "report of AutoencoderKLWan" in printed


def test_without_a_compiler_the_graph_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.usable_engine("eager", "cpu") == ("eager", None)
    assert demo.usable_engine("inductor", "cuda") == ("inductor", None)
    monkeypatch.setattr(demo.shutil, "which", lambda name: None)
    engine, note = demo.usable_engine("inductor", "cpu")
    assert engine == "eager" and note is not None and "no C++ compiler" in note


@needs_weights
def test_weights_are_small_and_good() -> None:
    assert (FOLDER / WEIGHTS).stat().st_size <= 4_000_000
    stored = json.loads((FOLDER / FIGURES).read_text())
    vae = demo_vae()
    pixels = photograph(512, 512)[:, :, None]
    measured = psnr(trainer.roundtrip(vae, pixels), pixels)
    assert measured >= 26 and abs(measured - stored["psnr_db"]["astronaut_512"]) < 0.1
    moving = clip(9, 256, 256)
    assert psnr(trainer.roundtrip(vae, moving), moving) >= 24


# --- in pieces ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny() -> Iterator[AutoencoderKLWan]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield AutoencoderKLWan(**TINY.architecture).eval().requires_grad_(False)


def test_seam_figure() -> None:
    ramp = torch.arange(8.0).expand(1, 3, 8, 8)  # along the columns
    assert seam_figure(ramp, (), ()) is None and seam_figure(ramp, (4,), ()) is None
    assert seam_figure(ramp, (), (4,)) == 1
    stepped = ramp + 3 * (torch.arange(8) >= 5)
    assert seam_figure(stepped, (), (5,)) == 4 and seam_figure(stepped, (), (4,)) == pytest.approx(6 / 9)
    assert seam_figure(stepped, (3,), (5,)) == pytest.approx((4 + 0) / 2 / (6 / 12)), "rows and columns are one mean"


def test_seams_are_marked_at_the_edges_only() -> None:
    black = -torch.ones(2, 3, 32, 48)
    marked = mark_seams(black, (16,), (1, 40))
    changed = (marked != black).any(1)[0]
    assert changed[15:17, :3].all() and changed[15:17, -3:].all() and not changed[4:28, 4:44].any()
    assert changed[:2, 39:41].all() and changed[-2:, :2].all() and changed.sum() == 2 * 2 * 3 + 2 * 2 * 2 * 2
    assert torch.equal(mark_seams(black, (), ()), black)


def shard_row(result: ShardResult, name: str) -> ShardRow:
    return next(row for row in result.rows if row.name == name)


def test_in_pieces(tiny: AutoencoderKLWan, tmp_path: Path) -> None:
    console = Console(record=True, width=160)
    (tmp_path / "results.json").write_text('{"rows": [1], "shard": {}}')
    request = ShardRequest(("halo", "patch", "tile"), 2, contexts=(0, 3))
    result = run_shard(tmp_path, "cpu", request, console, size=64, vae=tiny)
    picture = 3 * 64 * 64 * 4  # bytes

    halo = shard_row(result, "halo")
    assert halo.exact and halo.grid == (2, 1) and (halo.psnr_db is None or halo.psnr_db > 120)
    assert halo.visible == pytest.approx(1, abs=1e-4) and halo.received > picture / 2 and halo.collectives > 2
    blunt, better = shard_row(result, "patch, context 0"), shard_row(result, "patch, context 3")
    assert blunt.grid == better.grid == (1, 2)
    assert (blunt.received, blunt.collectives) == (picture / 2, 1), "nothing moves but the result"
    assert not blunt.exact and blunt.psnr_db is not None and better.psnr_db is not None
    assert better.psnr_db > blunt.psnr_db + 6 and better.max_error < blunt.max_error
    tile = shard_row(result, "tile")
    assert tile.grid == (3, 3) and not tile.exact and tile.psnr_db is not None and tile.psnr_db < 100
    assert result.ok and not replace(result, rows=(replace(halo, exact=False),)).ok

    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["rows"] == [1] and [row["form"] for row in stored["shard"]["rows"]] == [
        "halo",
        "patch",
        "patch",
        "tile",
    ]
    with Image.open(tmp_path / "shard.png") as drawn:
        assert drawn.size == panel_size(4, 4, 384)
    printed = console.export_text()
    assert "patch, context 3" in printed and "shard.png" in printed


@pytest.mark.parametrize(("form", "world"), [("halo", 3), ("patch", 1), ("tile", 1)])
def test_exact_in_float64(tiny: AutoencoderKLWan, form: str, world: int) -> None:
    """halo always, the others in a world of one: a patch is then the whole, a tile what the VAE's own tiling gives."""
    exact = exact_copy(tiny)
    latents = encode(exact, photograph(64, 64)[:, :, None].double())
    wanted = decode(exact, latents)
    options = Options(shard=form, shard_dims="w" if form == "halo" else "auto", engine="eager")
    if form == "tile":
        serial = copy.deepcopy(exact)
        serial.enable_tiling(32, 32, 24, 24)
        wanted = decode(serial, latents)
        found = by_tiles(exact, latents, options, world)
        assert (found.rows, found.columns) == ((24, 48), (24, 48)) and not exact.use_tiling
    else:
        found = DecodeGraph.of(exact, latents).in_pieces(options, world)
        assert (found.rows, found.columns) == ((), (24, 48) if world == 3 else ())
    assert relative_error(found.picture, wanted) < 1e-12
    assert (found.received == 0) == (world == 1)


def test_the_busiest_rank_of_tiles_receives_all_but_its_own(tiny: AutoencoderKLWan) -> None:
    latents = encode(tiny, photograph(64, 64)[:, :, None])
    tiny.enable_tiling(32, 32, 24, 24)
    plan = Planner(tiny, {"decoder": tiny.decoder}).plan("decode", tiny.decode, (latents,), {})
    sides = (32, 32, 16)  # of the 3 x 3 tiles, at 0, 24 and 48 of 64
    whole = 3 * 4 * sum(sides) ** 2
    assert received_by_tiles(plan, 1) == 0
    assert received_by_tiles(plan, 9) == whole - 3 * 4 * 16 * 16, "a tile each; the smallest is 16 x 16"
    assert received_by_tiles(plan, 12) == whole, "a rank without a tile"


def test_a_picture_too_small_for_tiles_says_what_it_needs(tiny: AutoencoderKLWan) -> None:
    with pytest.raises(ValueError, match="32 pixels has no two tiles; it needs 64"):
        by_tiles(tiny, torch.zeros(1, 16, 1, 8, 4), Options(shard="tile", engine="eager"), 2)


def test_what_the_options_ask_for() -> None:
    assert shard_request(None, None, None, None, "inductor") is None
    assert shard_request("patch", None, None, None, None) == ShardRequest(("patch",), 4, "auto", (0, 2, 4, 8))
    found = shard_request("halo, patch,halo", 3, "hw", "4,0", "eager")
    assert found == ShardRequest(("halo", "patch"), 3, "hw", (4, 0))
    assert list(found.cases()) == [("halo", None), ("patch", 4), ("patch", 0)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--world", "2"], "--world says how to decode in pieces, which --shard asks for, such as: pvae demo --shard"),
        (["--patch-context", "2"], "--patch-context says how to decode in pieces"),
        (["--shard", "auto"], "--shard 'auto' names no form; valid: halo, patch, tile, or several"),
        (["--shard", ","], "names no form"),
        (["--shard", "tile", "--shard-dims", "h"], "--shard-dims is of the forms halo and patch"),
        (["--shard", "halo", "--shard-dims", "wh"], "--shard-dims 'wh' does not exist; valid: auto, h, w, hw"),
        (["--shard", "halo", "--patch-context", "4"], "--patch-context is of the form patch, such as: pvae demo"),
        (["--shard", "patch", "--patch-context", "0,x"], "no list of latent rows of 0 or more, such as 0,4"),
        (["--shard", "halo", "--engine", "inductor"], "graphs interpreted (eager)"),
    ],
)
def test_mistakes(arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["demo", "--out", str(tmp_path / "out"), *arguments])
    assert left.value.code == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_in_pieces(
    tiny: AutoencoderKLWan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pvae.tools.demo.shard.demo_vae", lambda dtype, device: tiny)
    monkeypatch.setattr(run_shard, "__kwdefaults__", {"size": 64, "vae": None})
    arguments = ["--shard", "patch", "--world", "2", "--patch-context", "1", "--device", "cpu", "--json"]
    with pytest.raises(SystemExit) as left:
        cli.main(["demo", "--out", str(tmp_path), *arguments])
    (row,) = json.loads(capsys.readouterr().out)["shard"]["rows"]
    assert not left.value.code and (row["form"], row["context"], row["world"]) == ("patch", 1, 2)
