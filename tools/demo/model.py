"""The demo's video VAE: Wan 2.1's architecture (diffusers `AutoencoderKLWan`), narrow, trained by
`tools/train_demo_vae.py`. Weights are stored in float16 beside this file, with the configuration and the training
figures in a JSON of the same name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

WEIGHTS = "demo_vae.safetensors"
FIGURES = "demo_vae.json"
FOLDER = Path(__file__).parent

# 16 channels at full resolution: a third of Wan's depth per block and a sixth of its width, so that 1.9 million
# parameters fit in 4 MB and two CPU cores decode 9 frames of 256x256 in about a second. 8x in space, 4x in time.
ARCHITECTURE: dict[str, Any] = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 3],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}


def load_vae(folder: Path, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKLWan:
    """The VAE stored in `folder`, in evaluation mode, without gradients. FileNotFoundError if it is not there."""
    from diffusers import AutoencoderKLWan

    for name in (WEIGHTS, FIGURES):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{name} is missing from {folder}; make it with: "
                "python -m pvae.tools.train_demo_vae --minutes 8.2 --device cuda --out tools/demo"
            )
    config = json.loads((folder / FIGURES).read_text())["config"]
    vae = AutoencoderKLWan(**config)
    vae.load_state_dict(load_file(folder / WEIGHTS))
    # Module.to and not ModelMixin.to, which warns about modules to be kept in float32 though there are none.
    torch.nn.Module.to(vae, device=device, dtype=dtype)
    return vae.eval().requires_grad_(False)


def demo_vae(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> AutoencoderKLWan:
    """The committed demo VAE. Pixels `[N,3,T,H,W]` in [-1, 1] with T = 1 + 4k and H, W multiples of 8; latents
    `[N,16,1+k,H/8,W/8]`, normalised by the configuration's `latents_mean` and `latents_std` to unit variance."""
    return load_vae(FOLDER, dtype, device)
