"""What the demo VAE learns from: photographs that ship inside scikit-image and scikit-learn, and a camera over them.

Photographs are uploaded once; a batch is one lookup into them along smooth camera paths (pan, zoom, rotation, shear,
brightness drift), all on the device and without a wait for it, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.resources import files

import torch
import torch.nn.functional as F
from PIL import Image

from pvae.tools.demo.media import camera_over, clip, fit, photograph

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
HELD_OUT = ("astronaut.png", "chelsea.png")  # of skimage.data, never trained on; the first is the demo's photograph


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


def held_out() -> dict[str, torch.Tensor]:
    """What the VAE is judged by, `[1,3,T,H,W]`: two photographs never trained on, whole, and a clip of each."""
    second = _open("skimage.data", HELD_OUT[1])
    return {
        "astronaut_512": photograph(512, 512)[:, :, None],
        "astronaut_256": photograph(256, 256)[:, :, None],
        "astronaut_clip_17x256": clip(17, 256, 256),
        "chelsea_296x448": fit(second, 296, 448)[:, :, None],
        "chelsea_clip_17x256": camera_over(second, 17, 256, 256),
    }
