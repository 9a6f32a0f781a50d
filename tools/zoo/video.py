"""The zoo's video autoencoders, those that make pictures with one frame among them.

`full` is the published configuration at the size of the project's measurements, `tiny` the same blocks with few
channels and enough latent frames that causal caches are written, read and shifted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pvae.tools.zoo.entry import Entry, Preset


def _framewise(conv: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A 2-D convolution on every frame of `[N, C, T, H, W]`."""
    return conv(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


# diffusers' Allegro encodes and decodes in tiles only. These are the steps of its one tile, without its tile loop.
def _allegro_decode(model: Any, inputs: Sequence[torch.Tensor], kwargs: Mapping[str, object]) -> torch.Tensor:
    (latents,) = inputs
    return model.decoder(_framewise(model.post_quant_conv, latents))


def _allegro_encode(model: Any, inputs: Sequence[torch.Tensor], kwargs: Mapping[str, object]) -> torch.Tensor:
    (pixels,) = inputs
    return _framewise(model.quant_conv, model.encoder(pixels))


_NARROW_WAN = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1}

_LTX_095 = {
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "spatio_temporal_scaling": (True,) * 4,
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (False,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}

VIDEO: dict[str, Entry] = {
    "wan2.1": Entry(
        "AutoencoderKLWan",
        spatial=8,
        temporal=4,
        full=Preset({}, size=(81, 480, 832)),
        tiny=Preset(_NARROW_WAN, size=(13, 32, 48)),
    ),
    "wan2.2": Entry(
        "AutoencoderKLWan",
        spatial=16,
        temporal=4,
        # Wan2.2-TI2V-5B, less the latents' mean and deviation, which neither encode nor decode reads.
        full=Preset(
            {
                "base_dim": 160,
                "decoder_base_dim": 256,
                "z_dim": 48,
                "is_residual": True,
                "in_channels": 12,
                "out_channels": 12,
                "patch_size": 2,
                "scale_factor_spatial": 16,
            },
            size=(81, 480, 832),
        ),
        tiny=Preset(
            _NARROW_WAN
            | {
                "decoder_base_dim": 12,
                "is_residual": True,
                "in_channels": 12,
                "out_channels": 12,
                "patch_size": 2,
                "scale_factor_spatial": 16,
            },
            size=(13, 64, 96),
        ),
    ),
    "qwen-image": Entry(
        "AutoencoderKLQwenImage",
        spatial=8,
        temporal=4,
        full=Preset({}, size=(1024, 1024)),
        tiny=Preset(_NARROW_WAN, size=(32, 48)),
    ),
    "hunyuan-video": Entry(
        "AutoencoderKLHunyuanVideo",
        spatial=8,
        temporal=4,
        full=Preset({}, size=(17, 360, 640)),
        tiny=Preset(
            {
                "block_out_channels": (8, 16, 32, 32),
                "latent_channels": 4,
                "layers_per_block": 1,
                "norm_num_groups": 4,
            },
            size=(9, 32, 48),
        ),
    ),
    "hunyuan-video-1.5": Entry(
        "AutoencoderKLHunyuanVideo15",
        spatial=16,
        temporal=4,
        full=Preset({}, size=(17, 480, 832)),
        tiny=Preset(
            {"block_out_channels": (8, 16, 32, 64, 64), "latent_channels": 8, "layers_per_block": 1},
            size=(9, 64, 96),
        ),
    ),
    "ltx-video": Entry(
        "AutoencoderKLLTXVideo",
        spatial=32,
        temporal=8,
        full=Preset({}, size=(49, 480, 704)),
        tiny=Preset(
            {
                "latent_channels": 8,
                "block_out_channels": (8, 16, 32, 32),
                "decoder_block_out_channels": (8, 16, 32, 32),
                "layers_per_block": (1,) * 5,
                "decoder_layers_per_block": (1,) * 5,
            },
            size=(17, 128, 192),
        ),
    ),
    "ltx-video-0.9.5": Entry(
        "AutoencoderKLLTXVideo",
        spatial=32,
        temporal=8,
        # The decoder is told the noise level of its latents. A sixteenth is near the pipeline's 0.05 and exact in every
        # dtype: the embedding multiplies it by 1000, so rounding it would turn sines by a tenth of a radian.
        decode_kwargs={"temb": 0.0625},
        # Releases 0.9.1 to 0.9.4 also inject noise, which no two compilers draw alike; they are not here for that.
        full=Preset(
            _LTX_095
            | {
                "block_out_channels": (128, 256, 512, 1024, 2048),
                "decoder_block_out_channels": (256, 512, 1024),
                "layers_per_block": (4, 6, 6, 2, 2),
                "decoder_layers_per_block": (5, 5, 5, 5),
            },
            size=(49, 480, 704),
        ),
        tiny=Preset(
            _LTX_095
            | {
                "latent_channels": 8,
                "block_out_channels": (8, 16, 32, 64, 64),
                "decoder_block_out_channels": (16, 32, 64),
                "layers_per_block": (1,) * 5,
                "decoder_layers_per_block": (1,) * 4,
            },
            size=(17, 128, 192),
        ),
    ),
    "ltx2-video": Entry(
        "AutoencoderKLLTX2Video",
        spatial=32,
        temporal=8,
        full=Preset({}, size=(49, 480, 704)),
        tiny=Preset(
            {
                "latent_channels": 8,
                "block_out_channels": (8, 16, 32, 64),
                "decoder_block_out_channels": (16, 32, 64),
                "layers_per_block": (1,) * 5,
                "decoder_layers_per_block": (1,) * 4,
            },
            size=(17, 128, 192),
        ),
    ),
    "cogvideox": Entry(
        "AutoencoderKLCogVideoX",
        spatial=8,
        temporal=4,
        full=Preset({}, size=(9, 480, 720)),
        tiny=Preset(
            {
                "block_out_channels": (8, 16, 16, 32),
                "latent_channels": 4,
                "layers_per_block": 1,
                "norm_num_groups": 4,
            },
            size=(17, 32, 48),  # decoded as 3 + 2 latent frames, encoded as 9 + 8 frames
        ),
    ),
    "mochi": Entry(
        "AutoencoderKLMochi",
        spatial=8,
        temporal=6,
        full=Preset({}, size=(19, 480, 848)),
        # Its group norms have 32 groups whatever the configuration.
        tiny=Preset(
            {
                "encoder_block_out_channels": (32, 32, 64, 64),
                "decoder_block_out_channels": (32, 32, 64, 64),
                "latent_channels": 4,
                "layers_per_block": (1,) * 5,
            },
            size=(13, 32, 48),
        ),
    ),
    "magvit": Entry(
        "AutoencoderKLMagvit",
        spatial=8,
        temporal=4,
        full=Preset({}, size=(17, 384, 672)),
        tiny=Preset(
            {
                "block_out_channels": (8, 16, 32, 32),
                "latent_channels": 4,
                "layers_per_block": 1,
                "norm_num_groups": 4,
            },
            size=(9, 32, 48),
        ),
    ),
    "allegro": Entry(
        "AutoencoderKLAllegro",
        spatial=8,
        temporal=4,
        first_alone=False,
        calls={"decode": _allegro_decode, "encode": _allegro_encode},
        full=Preset({}, size=(24, 320, 320)),  # one of its tiles
        tiny=Preset(
            {"block_out_channels": (8, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 4},
            size=(12, 32, 48),
        ),
    ),
    "cosmos": Entry(
        "AutoencoderKLCosmos",
        spatial=8,
        temporal=8,
        cpu_gaps={("encode", torch.bfloat16): "avg_pool3d", ("encode", torch.float16): "avg_pool3d"},
        full=Preset({}, size=(17, 480, 832)),
        # Attention in the blocks follows the nominal resolution: 64 / patch 4 = 16.
        tiny=Preset(
            {
                "encoder_block_out_channels": (8, 16, 32, 32),
                "decode_block_out_channels": (16, 32, 32, 32),
                "latent_channels": 4,
                "num_layers": 1,
                "resolution": 64,
                "attention_resolutions": (8,),
            },
            size=(17, 32, 48),
        ),
    ),
}
