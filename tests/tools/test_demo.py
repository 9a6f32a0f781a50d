"""The demo: its media, its panel, its trainer, its weights, and the run as a whole."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from rich.console import Console

from pvae.tools import train_demo_vae as trainer
from pvae.tools.demo import run as demo
from pvae.tools.demo.media import clip, photograph
from pvae.tools.demo.model import ARCHITECTURE, FIGURES, FOLDER, WEIGHTS, demo_vae, load_vae
from pvae.tools.demo.panel import amplified_difference, panel, panel_size
from pvae.tools.demo.quality import psnr

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
