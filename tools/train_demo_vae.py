"""Trains the demo VAE from scratch on photographs that ship inside scikit-image and scikit-learn.

    python -m pvae.tools.train_demo_vae --minutes 8 --device cuda --out tools/demo

Photographs are uploaded once; a batch is one lookup into them along smooth camera paths (pan, zoom, rotation, shear,
brightness drift), all on the device. Held out, never trained on: scikit-image's `astronaut` (the demo's photograph)
and `chelsea`. Writes `demo_vae.safetensors` (float16, exponential moving average of the weights) and `demo_vae.json`
(configuration, seed, steps, PSNR of what was stored, evaluated in float32).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
)
from PIL import Image
from safetensors.torch import save_file

from pvae.tools.demo.media import camera_over, clip, fit, photograph
from pvae.tools.demo.model import ARCHITECTURE, FIGURES, WEIGHTS, load_vae
from pvae.tools.demo.quality import psnr

# (package that holds it, file, how often it is drawn). Natural colour photographs weigh most. skimage's images are
# public domain or CC0 (its data folder's notes); china and flower are CC BY 2.0 (danielbuechele, vultilion on Flickr).
PHOTOGRAPHS = (
    ("sklearn.datasets.images", "china.jpg", 4.0),
    ("sklearn.datasets.images", "flower.jpg", 3.0),
    ("skimage.data", "coffee.png", 4.0),
    ("skimage.data", "rocket.jpg", 3.0),
    ("skimage.data", "motorcycle_left.png", 3.0),
    ("skimage.data", "motorcycle_right.png", 3.0),
    ("skimage.data", "camera.png", 2.0),
    ("skimage.data", "hubble_deep_field.jpg", 1.0),
    ("skimage.data", "retina.jpg", 1.0),
    ("skimage.data", "ihc.png", 1.0),
    ("skimage.data", "grass.png", 1.0),
    ("skimage.data", "gravel.png", 1.0),
    ("skimage.data", "brick.png", 1.0),
    ("skimage.data", "coins.png", 1.0),
    ("skimage.data", "text.png", 0.5),
    ("skimage.data", "page.png", 0.5),
)
SECOND_HELD_OUT = ("skimage.data", "chelsea.png")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights but the budget and the device."""

    architecture: dict[str, Any] = field(default_factory=lambda: dict(ARCHITECTURE))
    # (batch, frames, side in pixels), taken in turn; few shapes, so that each is captured as one CUDA graph.
    images: tuple[tuple[int, int, int], ...] = ((32, 1, 128), (12, 1, 208))
    clips: tuple[tuple[int, int, int], ...] = ((8, 9, 96), (4, 17, 112))
    images_only: float = 0.6  # this share of the budget sees no clip; afterwards image and clip batches alternate
    longest_side: int = 640  # photographs are reduced to this, and each also appears at half its size
    learning_rate: float = 2e-3
    warmup: int = 200
    absolute: float = 1.0
    square: float = 2.0
    bias: float = 0.5
    branch: float = 0.3
    kl: float = 1e-6
    unit_variance: float = 1e-2
    seed: int = 0


@dataclass(frozen=True)
class Atlas:
    """All photographs on the device: `pixels` `[1,3,N,H,W]`, each in the top left corner of its slice."""

    pixels: torch.Tensor
    sizes: torch.Tensor  # [N,2]: width, height
    cumulated: torch.Tensor  # [N]: how often each is drawn, summed up to it, the last being 1
    last: torch.Tensor  # [2]: W - 1, H - 1


def _open(package: str, name: str) -> Image.Image:
    with (files(package) / name).open("rb") as file:
        return Image.open(file).convert("RGB")


def load_atlas(longest_side: int, device: torch.device) -> Atlas:
    """The training photographs, and each again at half its size (antialiased: fine detail at every scale)."""
    pictures, weights = [], []
    for package, name, weight in PHOTOGRAPHS:
        picture = _open(package, name)
        for side in (longest_side, longest_side // 2):
            scale = min(1.0, side / max(picture.size))
            pictures.append(fit(picture, round(picture.height * scale), round(picture.width * scale))[0])
            weights.append(weight)
    height, width = max(p.shape[1] for p in pictures), max(p.shape[2] for p in pictures)
    pixels = torch.stack([F.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pictures], dim=1)
    sizes = torch.tensor([[p.shape[2], p.shape[1]] for p in pictures], dtype=torch.float32)
    cumulated = torch.tensor(weights).cumsum(0) / sum(weights)
    last = torch.tensor([width - 1, height - 1])
    return Atlas(pixels[None].to(device), sizes.to(device), cumulated.to(device), last.to(device))


def sample(atlas: Atlas, batch: int, frames: int, side: int) -> torch.Tensor:
    """`[batch,3,frames,side,side]` in [-1, 1]: random camera paths over random photographs.

    Half of the samples keep the photograph's own pixels (whole-pixel steps, quarter turns), since every other lookup
    blurs; beyond a photograph's edge it is mirrored.
    """
    device = atlas.pixels.device

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(batch, *shape, device=device) * (high - low) + low

    def normal(scale: float, *shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, device=device) * scale

    index = torch.searchsorted(atlas.cumulated, uniform(0, 1)).clamp(max=len(atlas.cumulated) - 1)
    sharp = uniform(0, 1) < 0.5
    time_ = torch.arange(frames, device=device, dtype=torch.float32)

    # Paths: velocity up to some 8 pixels a frame, with a slow wobble; one clip in ten stands still.
    speed = uniform(0, 4, 1) * (uniform(0, 1, 1) > 0.1)
    velocity = normal(1.0, 2) * speed
    wobble = normal(2.0, 2, 1) * torch.sin(uniform(0.1, 0.5, 2, 1) * time_ + uniform(0, 2 * math.pi, 2, 1))
    position = uniform(0, 1, 2) * atlas.sizes[index]
    path = position[..., None] + velocity[..., None] * time_ + wobble * (speed[..., None] > 0)
    half = (side - 1) / 2
    path = torch.where(sharp[:, None, None], (path - half).round() + half, path)

    turns = uniform(0, 4).floor() * (math.pi / 2)
    free = ~sharp
    angle = (turns + free * uniform(-0.5, 0.5))[:, None] + (free * normal(0.015))[:, None] * time_
    zoom = torch.exp((free * uniform(-0.7, 0.25))[:, None] + (free * normal(0.008))[:, None] * time_)
    shear = (free * normal(0.1))[:, None, None]
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)[:, None]

    axis = torch.arange(side, device=device) - half
    y, x = (a.reshape(1, 1, -1) for a in torch.meshgrid(axis, axis, indexing="ij"))
    x = x * mirror[..., None] + shear * y
    cos, sin = (zoom * angle.cos())[..., None], (zoom * angle.sin())[..., None]
    place = (
        torch.stack((cos * x - sin * y, sin * x + cos * y), dim=-1) + path.transpose(1, 2)[:, :, None]
    )  # [B,T,S*S,2]

    # Mirrored at the edges of its photograph, then in units of the whole atlas; the third axis picks the photograph.
    last = (atlas.sizes[index] - 1)[:, None, None]
    place = place.remainder(2 * last)
    place = torch.minimum(place, 2 * last - place)
    count = atlas.pixels.shape[2]
    place = place / atlas.last * 2 - 1
    depth = (index / (count - 1) * 2 - 1)[:, None, None, None].expand(*place.shape[:-1], 1)
    grid = torch.cat((place, depth), dim=-1).reshape(1, batch * frames, side, side, 3)
    pixels = F.grid_sample(atlas.pixels, grid, align_corners=True, padding_mode="border")
    pixels = pixels.reshape(3, batch, frames, side, side).transpose(0, 1)

    # Colours: a mild random mixing of channels, sometimes a permutation, contrast, offset, and a drift in brightness.
    order = torch.where(uniform(0, 1, 1) < 0.3, uniform(0, 1, 3), torch.arange(3, device=device) / 2).argsort(dim=1)
    mixing = torch.eye(3, device=device)[order] * torch.exp(normal(0.15, 1, 1)) + normal(0.06, 3, 3)
    pixels = torch.einsum("bij,bjthw->bithw", mixing, pixels)
    drift = 1 + (normal(0.008, 1) * time_)[:, None, :, None, None]
    return (pixels * drift + normal(0.08, 3, 1, 1, 1)).clamp(-1, 1)


@torch.no_grad()
def initialise(vae: AutoencoderKLWan, recipe: Recipe) -> None:
    """Starts as a nearly linear image autoencoder applied frame by frame, which learns its first 20 dB quickly.

    torch's default loses the signal among the biases: it shrinks at each of some twenty convolutions in a row.
    """
    for module in vae.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            # The present frame's tap alone, keeping the variance; the past is learnt from clips.
            present = module.weight if module.weight.dim() == 4 else module.weight[:, :, -1]
            module.weight.zero_()
            present.normal_(std=present[0].numel() ** -0.5)
            # Constant channels: RMS normalisation would otherwise take away how bright a pixel is.
            module.bias.normal_(std=recipe.bias)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            module.conv2.weight.mul_(recipe.branch)
            module.conv2.bias.zero_()
        elif isinstance(module, WanAttentionBlock):
            module.proj.weight.mul_(0.1)
            module.proj.bias.zero_()
        elif isinstance(module, WanResample) and module.mode in ("upsample3d", "downsample3d"):
            # The present frame passes, the past does not: into both halves (two frames) where time is doubled.
            weight = module.time_conv.weight
            identity = torch.eye(weight.shape[1], device=weight.device).repeat(weight.shape[0] // weight.shape[1], 1)
            weight.zero_()[:, :, -1, 0, 0] += identity
            module.time_conv.bias.zero_()
    for conv in (vae.quant_conv, vae.post_quant_conv):
        torch.nn.init.orthogonal_(conv.weight)
        conv.bias.zero_()
    vae.decoder.conv_out.bias.zero_()
    # Little noise: with unit noise at the start the decoder never learns to look at the latents.
    vae.quant_conv.weight[vae.z_dim :] *= 0.1
    vae.quant_conv.bias[vae.z_dim :] = -7


def single_frames_in_2d(vae: AutoencoderKLWan) -> None:
    """Runs the causal convolution of one frame with no cache as the 2-D convolution of its last tap, which is all that
    does not meet padding: a third of the arithmetic, and faster kernels."""

    def specialise(conv: WanCausalConv3d) -> None:
        whole = conv.forward

        def forward(x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
            if x.shape[2] > 1 or cache_x is not None:
                return whole(x, cache_x)
            padding = (conv._padding[2], conv._padding[0])
            return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=padding)[:, :, None]

        conv.forward = forward

    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            specialise(module)


def reconstruct(vae: AutoencoderKLWan, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels through a sampled latent and back: reconstruction, latent mean and log variance (`[N,z,t,h,w]`).

    Chunk by chunk with caches, as at inference: gradients flow through the caches. `vae.decode` is not used since it
    clamps its result, and a clamped pixel has no gradient.
    """
    posterior = vae.encode(pixels).latent_dist
    latents = vae.post_quant_conv(posterior.mean + posterior.std * torch.randn_like(posterior.mean))
    vae.clear_cache()
    chunks = []
    for i in range(latents.shape[2]):
        vae._conv_idx = [0]
        chunks.append(vae.decoder(latents[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx))
    vae.clear_cache()
    return torch.cat(chunks, dim=2), posterior.mean.float(), posterior.logvar.float()


def loss_of(recipe: Recipe, vae: AutoencoderKLWan, pixels: torch.Tensor) -> torch.Tensor:
    """Absolute and squared error, a little KL, and a penalty off zero mean and unit variance."""
    output, mean, logvar = reconstruct(vae, pixels)
    error = output.float() - pixels
    loss = recipe.absolute * error.abs().mean() + recipe.square * error.square().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    std, centre = torch.std_mean(mean, dim=(0, 2, 3, 4))
    return loss + recipe.kl * kl + recipe.unit_variance * (centre.square() + (std - 1).square()).mean()


@torch.no_grad()
def roundtrip(vae: AutoencoderKLWan, pixels: torch.Tensor) -> torch.Tensor:
    """The reconstruction from the latent mean, for `[1,3,T,H,W]`."""
    return vae.decode(vae.encode(pixels).latent_dist.mode()).sample


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, recipe: Recipe, atlas: Atlas) -> dict[str, Any]:
    """`latents_mean` and `latents_std` of the configuration, over one training batch of each shape."""
    latents = [vae.encode(sample(atlas, *shape)).latent_dist.mode() for shape in recipe.images + recipe.clips]
    std, mean = torch.std_mean(torch.cat([z.transpose(0, 1).flatten(1) for z in latents], dim=1), dim=1)
    return {
        "latents_mean": [round(v, 4) for v in mean.tolist()],
        "latents_std": [round(v, 4) for v in std.tolist()],
    }


def held_out() -> dict[str, torch.Tensor]:
    """What the VAE is judged by, `[1,3,T,H,W]`: two photographs never trained on, whole, and a clip of each."""
    second = _open(*SECOND_HELD_OUT)
    return {
        "astronaut_512": photograph(512, 512)[:, :, None],
        "astronaut_256": photograph(256, 256)[:, :, None],
        "astronaut_clip_17x256": clip(17, 256, 256),
        "chelsea_296x448": fit(second, 296, 448)[:, :, None],
        "chelsea_clip_17x256": camera_over(second, 17, 256, 256),
    }


def evaluate(vae: AutoencoderKLWan) -> dict[str, float]:
    """PSNR in dB of each held-out subject's reconstruction."""
    return {name: round(psnr(roundtrip(vae, pixels.to(vae.device)), pixels), 2) for name, pixels in held_out().items()}


class Trainer:
    """One training step for each batch shape: sample, forward, backward, clip, update. On a GPU each is one CUDA graph,
    since some two thousand small launches a step would take longer than their work."""

    def __init__(self, recipe: Recipe, vae: AutoencoderKLWan, atlas: Atlas) -> None:
        self.recipe, self.vae, self.atlas = recipe, vae, atlas
        self.device = vae.device
        self.rate = torch.zeros((), device=self.device)  # a tensor, so that a captured update sees its changes
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            vae.parameters(), self.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True, capturable=on_gpu
        )
        shapes = recipe.images + recipe.clips
        self.step = self.captured(shapes) if on_gpu else {shape: partial(self.eager_step, shape) for shape in shapes}

    def eager_step(self, shape: tuple[int, int, int]) -> torch.Tensor:
        """The loss, a scalar on the device."""
        pixels = sample(self.atlas, *shape)
        # No cache of casted weights: it would outlive a capture.
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False
        ):
            loss = loss_of(self.recipe, self.vae, pixels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def captured(self, shapes: tuple[tuple[int, int, int], ...]) -> dict[tuple[int, int, int], Callable[[], torch.Tensor]]:
        """Each shape's step as the replay of a CUDA graph. The rate is still 0, so warming up changes no weight; all
        warm up first, since the optimizer's state must exist before any capture."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for shape in shapes * 3:
                self.eager_step(shape)
        torch.cuda.current_stream(self.device).wait_stream(side)
        pool = torch.cuda.graph_pool_handle()
        return {shape: self.capture(shape, pool) for shape in shapes}

    def capture(self, shape: tuple[int, int, int], pool: Any) -> Callable[[], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            loss = self.eager_step(shape)

        def replay() -> torch.Tensor:
            graph.replay()
            return loss

        return replay


def train(recipe: Recipe, out: Path, device: torch.device, steps: int | None, minutes: float | None) -> dict[str, Any]:
    """Trains until `steps` or `minutes` are used up, whichever is first; writes both files to `out`; returns the JSON's
    content."""
    torch.manual_seed(recipe.seed)
    torch.backends.cudnn.benchmark = True
    atlas = load_atlas(recipe.longest_side, device)
    vae = AutoencoderKLWan(**recipe.architecture)
    initialise(vae, recipe)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    single_frames_in_2d(vae)
    vae = vae.to(device).train()
    trainer = Trainer(recipe, vae, atlas)
    watched = [pixels.to(device) for pixels in (photograph(512, 512)[:, :, None], clip(9, 256, 256))]
    alternating = tuple(shape for pair in zip(recipe.images, recipe.clips, strict=True) for shape in pair)

    started = time.perf_counter()
    step, spent, next_print = 0, 0.0, 0.0
    while spent < 1:
        shapes = recipe.images if spent < recipe.images_only else alternating
        shape = shapes[step % len(shapes)]
        trainer.rate.fill_(
            recipe.learning_rate * min(1, (step + 1) / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * spent))
        )
        loss = trainer.step[shape]()
        step += 1
        if step % 16 == 0 and device.type == "cuda":
            torch.cuda.synchronize(device)  # keeps the clock below honest
        elapsed = time.perf_counter() - started
        spent = max(step / steps if steps else 0.0, elapsed / (60 * minutes) if minutes else 0.0)
        if spent >= next_print:
            next_print += 0.02
            figures = " ".join(f"{psnr(roundtrip(vae, pixels), pixels):5.2f}" for pixels in watched)
            print(
                f"step {step:6d}  {elapsed:6.1f} s  {100 * min(spent, 1):5.1f} %  rate {trainer.rate.item():.1e}  "
                f"loss {loss.item():.4f} ({shape[1]} frames)  photograph, clip {figures} dB",
                flush=True,
            )
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}")

    seconds = time.perf_counter() - started
    statistics = latent_statistics(vae.eval(), recipe, atlas)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().half().cpu().contiguous() for name, p in vae.state_dict().items()}, out / WEIGHTS)
    figures: dict[str, Any] = {
        "config": recipe.architecture | statistics,
        "training": {
            "command": f"python -m pvae.tools.train_demo_vae --out tools/demo --device {device.type}"
            + (f" --steps {steps}" if steps else "")
            + (f" --minutes {minutes:g}" if minutes else "")
            + "".join(f" --set {name}='{json.dumps(value)}'" for name, value in changes(recipe).items()),
            "steps": step,
            "seconds": round(seconds, 1),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}
            | {name: version(name) for name in ("scikit-image", "scikit-learn")},
            "recipe": {name: value for name, value in asdict(recipe).items() if name != "architecture"},
            "photographs": [name for _, name, _ in PHOTOGRAPHS],
            "held_out": ["astronaut.png", SECOND_HELD_OUT[1]],
        },
    }
    # Written before it is evaluated, so that what is judged is what is stored: float16 weights, float32 arithmetic.
    (out / FIGURES).write_text(json.dumps(figures, indent=2) + "\n")
    figures["psnr_db"] = evaluate(load_vae(out, torch.float32, "cpu"))
    (out / FIGURES).write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def changes(recipe: Recipe) -> dict[str, Any]:
    """What of `recipe` is not the default."""
    default = asdict(Recipe())
    return {name: value for name, value in asdict(recipe).items() if value != default[name]}


def recipe_from(settings: list[str]) -> Recipe:
    """The recipe with `NAME=JSON` settings applied. ValueError for a name that it does not have."""
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        names = [f.name for f in fields(Recipe)]
        if name not in names:
            raise ValueError(f"the recipe has no {name!r}; it has {', '.join(names)}")
        values[name] = json.loads(value)
        if name in ("images", "clips"):
            values[name] = tuple(tuple(shape) for shape in values[name])
    return Recipe(**values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--minutes", type=float, help="stop after this time, evaluation not included")
    parser.add_argument("--steps", type=int, help="stop after so many steps (repeats a run that was bounded by time)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="changes the recipe")
    arguments = parser.parse_args()
    if arguments.minutes is None and arguments.steps is None:
        parser.error("give a budget: --minutes or --steps")
    recipe = recipe_from(arguments.set)
    figures = train(recipe, arguments.out, torch.device(arguments.device), arguments.steps, arguments.minutes)
    print(json.dumps(figures["psnr_db"], indent=2))


if __name__ == "__main__":
    main()
