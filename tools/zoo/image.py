"""The zoo's picture autoencoders. `full` is the published configuration, `tiny` the same blocks with few channels."""

from pvae.tools.zoo.entry import Entry, Preset

_FOUR_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}

# dc-ae-f32c32-sana-1.1; the class's defaults have none of its linear attention.
_DC_SANA = {
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
}

IMAGE: dict[str, Entry] = {
    "kl": Entry(
        "AutoencoderKL",
        spatial=8,
        # The VAE of FLUX.1-dev.
        full=Preset(
            _FOUR_LEVELS
            | {
                "block_out_channels": (128, 256, 512, 512),
                "layers_per_block": 2,
                "latent_channels": 16,
                "sample_size": 1024,
                "use_quant_conv": False,
                "use_post_quant_conv": False,
            },
            size=(1024, 1024),
        ),
        tiny=Preset(
            _FOUR_LEVELS
            | {
                "block_out_channels": (8, 16, 32, 32),
                "latent_channels": 4,
                "norm_num_groups": 4,
                "use_quant_conv": False,
                "use_post_quant_conv": False,
            },
            size=(32, 48),
        ),
    ),
    "flux2": Entry(
        "AutoencoderKLFlux2",
        spatial=8,
        full=Preset({}, size=(1024, 1024)),
        tiny=Preset(
            {
                "block_out_channels": (8, 16, 32, 32),
                "layers_per_block": 1,
                "latent_channels": 4,
                "norm_num_groups": 4,
            },
            size=(32, 48),
        ),
    ),
    "dc": Entry(
        "AutoencoderDC",
        spatial=32,
        full=Preset(_DC_SANA, size=(1024, 1024)),
        tiny=Preset(
            _DC_SANA
            | {
                "latent_channels": 8,
                "attention_head_dim": 8,
                "encoder_block_out_channels": (8, 16, 16, 16, 32, 32),
                "decoder_block_out_channels": (8, 16, 16, 16, 32, 32),
                "encoder_layers_per_block": (1,) * 6,
                "decoder_layers_per_block": (1,) * 6,
            },
            size=(128, 192),
        ),
    ),
    "tiny-kl": Entry(
        "AutoencoderTiny",
        spatial=8,
        gain=1.75,  # no norms; 1 leaves 0.03 of contrast in the full model's picture, 2.25 makes it 14
        full=Preset({}, size=(1024, 1024)),  # taesd
        tiny=Preset(
            {
                "encoder_block_out_channels": (8,) * 4,
                "decoder_block_out_channels": (8,) * 4,
                "num_encoder_blocks": (1, 1, 1, 1),
                "num_decoder_blocks": (1, 1, 1, 1),
            },
            size=(32, 48),
        ),
    ),
}
