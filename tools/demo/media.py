"""The demo's photograph, and a clip in which a camera moves over it.

`astronaut.jpg` is NASA's portrait of Eileen Collins (public domain), the 512x512 crop that scikit-image ships as
`skimage.data.astronaut`, saved as JPEG at quality 92. The demo VAE never saw it in training.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ASTRONAUT = Path(__file__).parent / "astronaut.jpg"

# The camera's window is this part of the photograph's shorter side: with the pan, the tilt and the zoom below it
# stays inside the photograph at every time.
_WINDOW = 0.6


def fit(picture: Image.Image, height: int, width: int) -> torch.Tensor:
    """The largest centred part of `picture` with the wanted aspect, resized: `[1,3,H,W]` float32 in [-1, 1]."""
    scale = min(picture.width / width, picture.height / height)
    left, top = (picture.width - scale * width) / 2, (picture.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    pixels = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float().contiguous() / 127.5 - 1


def photograph(height: int = 512, width: int = 512) -> torch.Tensor:
    """The demo's photograph, `[1,3,H,W]` float32 in [-1, 1]."""
    with Image.open(ASTRONAUT) as picture:
        return fit(picture, height, width)


def camera_over(picture: Image.Image, frames: int, height: int, width: int) -> torch.Tensor:
    """A camera that pans, tilts and zooms over `picture`: `[1,3,T,H,W]` float32 in [-1, 1].

    The speed is a property of the path, not of `frames`: a longer clip shows more of it. At most 1.5 % of the frame
    width and 0.5 degrees go by between two frames.
    """
    # Resized first, so that one pixel of the photograph is about one of the frame and bicubic lookups do not alias.
    side = max(height, width)
    photo = fit(picture, round(side / _WINDOW), round(side / _WINDOW))
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    pictures = []
    for t in range(frames):
        angle = math.radians(5) * math.sin(0.1 * t)
        zoom = _WINDOW / side * 2 * (0.95 - 0.05 * math.cos(0.15 * t))  # photograph's [-1, 1] units a pixel
        centre_x, centre_y = 0.15 * math.sin(0.06 * t - 0.5), -0.25 + 0.08 * math.sin(0.09 * t)
        cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
        grid = torch.stack((cos * x - sin * y + centre_x, sin * x + cos * y + centre_y), dim=-1)
        pictures.append(
            F.grid_sample(photo, grid[None], mode="bicubic", padding_mode="reflection", align_corners=False)
        )
    return torch.stack(pictures, dim=2).clamp(-1, 1)


def clip(frames: int = 9, height: int = 256, width: int = 256) -> torch.Tensor:
    """The demo's clip: a camera moving over the photograph, `[1,3,T,H,W]` float32 in [-1, 1]."""
    with Image.open(ASTRONAUT) as picture:
        return camera_over(picture, frames, height, width)
