"""Wan and its kin in the zoo: transformers whose blocks modulate by a table plus the time.

Presets and sizes are as in `video_transformers.py`.
"""

from collections.abc import Mapping
from typing import Any

import torch

from pvae.tools.zoo.transformer import Sizes, TransformerEntry, latents, timestep
from pvae.tools.zoo.video_inputs import HEADS, combined, common, entry, known_first_frame, video

_wan = common("text_dim")


def _clip(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """A picture as CLIP's 257 tokens."""
    return {"encoder_hidden_states_image": torch.randn(sizes.batch, 257, model.config.image_dim)}


def _vace(model: Any, sizes: Sizes) -> Mapping[str, object]:
    return {
        "control_hidden_states": video(model.config.vace_in_channels, sizes),
        "control_hidden_states_scale": torch.linspace(1.0, 0.5, len(model.config.vace_layers)),
    }


def _animate(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """A pose for all frames but the first, which is the character's picture, and a face for each of their pixels'."""
    after = sizes.latent[0] - 1
    side = model.config.motion_encoder_size
    return {
        "pose_hidden_states": video(model.config.latent_channels, sizes, after),
        "face_pixel_values": torch.rand(sizes.batch, 3, 4 * after - 3, side, side) * 2 - 1,
    }


def _forcing(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """A time for each frame, later frames noisier."""
    times = timestep(sizes)[:, None] * 0.5 ** torch.arange(sizes.latent[0]).flip(0).clamp(max=4)
    return {"timestep": times, "enable_diffusion_forcing": True, "fps": [0] * sizes.batch}


def _anyflow(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """Frames before channels; from one time to another, both of each frame."""
    time = timestep(sizes)[:, None].repeat(1, sizes.latent[0])
    return {"hidden_states": latents(model, sizes).transpose(1, 2), "timestep": time, "r_timestep": time / 4}


def _helios(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """A long, a middle and a short history before the frames to make."""
    counts = {"long": 16, "mid": 2, "short": 2}
    taken: dict[str, object] = {}
    start = 0
    for name, frames in counts.items():
        taken[f"latents_history_{name}"] = video(model.config.in_channels, sizes, frames)
        taken[f"indices_latents_history_{name}"] = torch.arange(start, start + frames).expand(sizes.batch, -1)
        start += frames
    return taken | {"indices_hidden_states": torch.arange(start, start + sizes.latent[0]).expand(sizes.batch, -1)}


_TINY_WAN = HEADS | {"in_channels": 4, "out_channels": 4, "text_dim": 32, "ffn_dim": 96, "num_layers": 2}
_TINY_PICTURE: dict[str, object] = {"in_channels": 10, "image_dim": 20, "added_kv_proj_dim": 48}
_FULL_PICTURE: dict[str, object] = {"num_layers": 1, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}

WAN_TRANSFORMERS: dict[str, TransformerEntry] = {
    # 14B text to video; Wan 2.2 has the same transformer, twice.
    "wan2.1-dit": entry("WanTransformer3DModel", _TINY_WAN, {"num_layers": 1}, _wan, "blocks"),
    "wan2.1-i2v-dit": entry(
        "WanTransformer3DModel",
        _TINY_WAN | _TINY_PICTURE,
        _FULL_PICTURE,
        combined(_wan, _clip),
        "blocks",
    ),
    "wan2.2-ti2v-dit": entry(
        "WanTransformer3DModel",
        _TINY_WAN,
        {"num_layers": 1, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
        combined(_wan, known_first_frame),
        "blocks",
        full_size=Sizes((31, 44, 80), text=512),  # 121 frames of 704 x 1280
    ),
    "wan-vace-dit": entry(
        "WanVACETransformer3DModel",
        _TINY_WAN | {"vace_layers": [0, 1], "vace_in_channels": 6},
        {"num_layers": 2, "vace_layers": [0]},
        combined(_wan, _vace),
        "blocks",
        "vace_blocks",
    ),
    "wan-animate-dit": entry(
        "WanAnimateTransformer3DModel",
        _TINY_WAN
        | {"in_channels": 12, "latent_channels": 4, "image_dim": 20, "added_kv_proj_dim": 48}
        | {"motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16}
        | {"motion_style_dim": 12, "motion_dim": 4, "motion_encoder_dim": 12}
        | {"face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2}
        | {"inject_face_latents_blocks": 1},
        {"num_layers": 2, "added_kv_proj_dim": 5120, "inject_face_latents_blocks": 2},  # of 5, as published
        combined(_wan, _clip, _animate),
        "blocks",
        "face_adapter",
        full_size=Sizes((21, 90, 160), text=512),
    ),
    "skyreels-v2-dit": entry(
        "SkyReelsV2Transformer3DModel",
        _TINY_WAN,
        {"num_layers": 1, "num_attention_heads": 40, "ffn_dim": 13824},
        _wan,
        "blocks",
        full_size=Sizes((25, 68, 120), text=512),  # 97 frames of 544 x 960
    ),
    "skyreels-v2-df-dit": entry(
        "SkyReelsV2Transformer3DModel",
        _TINY_WAN | {"inject_sample_info": True},
        {"num_layers": 1, "num_attention_heads": 12, "ffn_dim": 8960, "inject_sample_info": True},
        combined(_wan, _forcing),
        "blocks",
        tiny_size=Sizes((3, 4, 6), text=5),  # the frame rate is added along the wrong axis of a batch
        full_size=Sizes((25, 68, 120), text=512),
    ),
    "chronoedit-dit": entry(
        "ChronoEditTransformer3DModel",
        _TINY_WAN | _TINY_PICTURE,
        _FULL_PICTURE,
        combined(_wan, _clip),
        "blocks",
        tiny_size=Sizes((2, 4, 6), text=5, batch=2),
        full_size=Sizes((2, 90, 160), text=512),
    ),
    "anyflow-dit": entry("AnyFlowTransformer3DModel", _TINY_WAN, {"num_layers": 1}, combined(_wan, _anyflow), "blocks"),
    "helios-dit": entry(
        "HeliosTransformer3DModel",
        _TINY_WAN | {"rope_dim": (4, 4, 4)},
        {"num_layers": 1},
        combined(_wan, _helios),
        "blocks",
        tiny_size=Sizes((3, 8, 16), text=5, batch=2),
        full_size=Sizes((9, 48, 80), text=512),  # 33 frames of 384 x 640
    ),
}
