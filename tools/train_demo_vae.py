"""Trains the demo VAE from scratch on photographs that ship inside scikit-image and scikit-learn.

    python -m pvae.tools.train_demo_vae --minutes 8.2 --device cuda --out tools/demo

The clips that it learns from are those of `tools/demo/training_clips.py`. Writes `demo_vae.safetensors` (float16) and
`demo_vae.json` (configuration, recipe, steps, PSNR of what was stored, evaluated in float32).
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
from safetensors.torch import save_file

from pvae.tools.demo.media import clip, photograph
from pvae.tools.demo.model import ARCHITECTURE, FIGURES, WEIGHTS, load_vae
from pvae.tools.demo.quality import psnr
from pvae.tools.demo.training_clips import HELD_OUT, PHOTOGRAPHS, Atlas, held_out, load_atlas, sample


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights but the budget and the device."""

    architecture: dict[str, Any] = field(default_factory=lambda: dict(ARCHITECTURE))
    # (batch, frames, side in pixels), taken in turn; few shapes, so that each is captured as one CUDA graph.
    images: tuple[tuple[int, int, int], ...] = ((32, 1, 128), (12, 1, 208))
    clips: tuple[tuple[int, int, int], ...] = ((10, 9, 96), (5, 13, 112))
    images_only: float = 0.3  # this share of the budget sees no clip; afterwards image and clip batches alternate
    longest_side: int = 640  # photographs are reduced to this, and each also appears at half its size
    learning_rate: float = 4e-3
    warmup: int = 200
    absolute: float = 0.2
    square: float = 2.0
    kl: float = 1e-6
    unit_variance: float = 1e-2
    seed: int = 0


@torch.no_grad()
def initialise(vae: AutoencoderKLWan) -> None:
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
            module.bias.normal_(std=0.5)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            module.conv2.weight.mul_(0.3)
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


def evaluate(vae: AutoencoderKLWan) -> dict[str, float]:
    """PSNR in dB of each held-out subject's reconstruction."""
    return {name: round(psnr(roundtrip(vae, pixels.to(vae.device)), pixels), 2) for name, pixels in held_out().items()}


class Trainer:
    """One training step for each batch shape: sample, forward, backward, clip, update. On a GPU each is one CUDA graph,
    since the few thousand small launches of a step would take longer than their work."""

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
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            loss = loss_of(self.recipe, self.vae, pixels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def captured(
        self, shapes: tuple[tuple[int, int, int], ...]
    ) -> dict[tuple[int, int, int], Callable[[], torch.Tensor]]:
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
    initialise(vae)
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
            decibels = " ".join(f"{psnr(roundtrip(vae, pixels), pixels):5.2f}" for pixels in watched)
            print(
                f"step {step:6d}  {elapsed:6.1f} s  {100 * min(spent, 1):5.1f} %  rate {trainer.rate.item():.1e}  "
                f"loss {loss.item():.4f} ({shape[1]} frames)  photograph, clip {decibels} dB",
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
            "held_out": HELD_OUT,
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
