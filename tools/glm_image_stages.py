"""What `pvae.tools.glm_image` runs, without pvae: diffusers' GlmImagePipeline with random weights, and its three stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pvae.tools.zoo.transformer import draw_weights

try:
    import transformers.models.glm_image as autoregressive
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
    from diffusers.pipelines.glm_image.pipeline_glm_image import calculate_shift, retrieve_timesteps
    from diffusers.utils.torch_utils import randn_tensor
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel
except ImportError as error:
    raise ImportError(
        f"the GLM-Image example is made of diffusers and transformers 5 ({error}): pip install 'pvae[models]'"
    ) from error


# The models --------------------------------------------------------------------------------------------------------------


class Writer(NamedTuple):
    """Sizes of the autoregressive model. `rotary` frequencies of a head are of time, row and column."""

    codebook: int
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    rotary: tuple[int, int, int]


@dataclass(frozen=True)
class Preset:
    """Configurations of the four models, and the picture: `columns` tokens wide and at most `rows` tokens high.

    A token is 32x32 pixels. `ending` is added to the score of the token that ends the picture: random weights would write
    on for as long as the codebook is large.
    """

    columns: int
    rows: int
    ending: float
    writer: Writer
    glyphs: Mapping[str, Any]
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]


def _vae(widths: Sequence[int], layers: int, groups: int) -> dict[str, Any]:
    return {
        "block_out_channels": tuple(widths),
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "latent_channels": 16,
        "latents_mean": (0.1,) * 16,
        "latents_std": (1.5,) * 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    }


# `full` has the published widths (the VAE: CogView4's), and of the layers 2 of 40, all 12 of ByT5's, 2 of 30 of the DiT.
PRESETS: Mapping[str, Preset] = {
    "tiny": Preset(
        columns=5,
        rows=7,
        ending=1.0,
        writer=Writer(50, 48, 96, layers=2, heads=3, kv_heads=1, rotary=(2, 3, 3)),
        glyphs={"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2},
        transformer={
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "text_embed_dim": 32,
            "time_embed_dim": 24,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 50,
        },
        vae=_vae((8, 8, 8, 8), 1, 4),
    ),
    "full": Preset(
        columns=32,
        rows=32,
        ending=3.0,
        writer=Writer(16384, 4096, 13696, layers=2, heads=32, kv_heads=2, rotary=(8, 12, 12)),
        glyphs={"d_model": 1472, "d_kv": 64, "d_ff": 3584, "num_layers": 12, "num_heads": 6},
        transformer={"num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 32},
        vae=_vae((128, 512, 1024, 1024), 3, 32),
    ),
}


def _writer_config(sizes: Writer) -> Any:
    """Its vocabulary: the codebook, begin and end of a picture, then ByT5's bytes."""
    codes, share = sizes.codebook, 2 * sum(sizes.rotary) * sizes.heads / sizes.hidden
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}
    vocabulary = codes + 2 + len(ByT5Tokenizer())
    text = {
        "vocab_size": vocabulary,
        "vision_vocab_size": codes + 2,
        "pad_token_id": codes + 2,
        "eos_token_id": codes + 1,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.feed_forward,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "rope_parameters": rope | {"mrope_section": list(sizes.rotary)},
    }
    unused = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "image_size": 64}
    return autoregressive.GlmImageConfig(
        text_config=text,
        vision_config=unused,  # it looks at pictures to be edited; there are none here
        vq_config={"embed_dim": 16, "latent_channels": 16, "num_embeddings": codes},
        image_token_id=vocabulary - 1,
        image_start_token_id=codes,
        image_end_token_id=codes + 1,
    )


def _made(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """A model with random weights that depend on the seed alone, so that ranks on devices of one kind have the same."""
    torch.manual_seed(seed)
    with torch.no_grad(), device:
        model = make()
        if device.type != "meta":
            draw_weights(model)
    return nn.Module.to(model, dtype=dtype).eval().requires_grad_(False)


def build(
    preset: Preset, device: torch.device, dtype: torch.dtype, *, seed: int = 0, main: bool = True
) -> GlmImagePipeline:
    """diffusers' pipeline with random weights. Unless `main`, what runs on rank 0 alone has its weights on `meta`."""
    there = device if main else torch.device("meta")
    config = _writer_config(preset.writer)
    return GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=None,  # it prepares prompts for published weights, and cannot be had without them
        vision_language_encoder=_made(
            lambda: autoregressive.GlmImageForConditionalGeneration(config), there, dtype, seed
        ),
        text_encoder=_made(lambda: T5EncoderModel(T5Config(vocab_size=384, **preset.glyphs)), there, dtype, seed),
        transformer=_made(lambda: GlmImageTransformer2DModel(**preset.transformer), device, dtype, seed),
        vae=_made(lambda: AutoencoderKL(**preset.vae), device, dtype, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear"
        ),
    )


# The three stages --------------------------------------------------------------------------------------------------------


class Prior(NamedTuple):
    """What the first stage tells the others.

    `tokens` are `[1, 4 * rows * columns]` ids of the codebook, one for each patch of the DiT; `glyphs` are `[2, L, D]` text
    embeddings, the prompt's and, padded to its length, those of no text. `written` is how many tokens were generated.
    """

    tokens: Tensor
    glyphs: Tensor
    rows: int
    columns: int
    written: int


def prior(pipeline: GlmImagePipeline, preset: Preset, prompt: str, seed: int) -> Prior:
    """Write the picture as tokens: whole rows, at least one, at most `preset.rows`; and read the prompt."""
    writer = pipeline.vision_language_encoder
    device, config = writer.device, writer.config
    begin, end = config.image_start_token_id, config.image_end_token_id
    text = [end + 1 + byte for byte in pipeline.tokenizer(prompt).input_ids]
    asked = torch.tensor([[*text, begin]], device=device)
    torch.manual_seed(seed)
    written = writer.generate(
        asked,
        image_grid_thw=torch.tensor([[1, preset.rows, preset.columns]], device=device),
        do_sample=True,
        min_new_tokens=preset.columns,
        max_new_tokens=preset.rows * preset.columns + 1,
        suppress_tokens=[begin],
        sequence_bias={(end,): preset.ending},
    )[0, asked.shape[1] :]
    codes = written[written != end]
    rows = len(codes) // preset.columns
    tokens = pipeline._upsample_token_ids(codes[: rows * preset.columns], rows, preset.columns)
    glyphs, _ = pipeline.encode_prompt(
        [prompt, ""], do_classifier_free_guidance=False, device=device, dtype=pipeline.text_encoder.dtype
    )
    return Prior(tokens, glyphs, rows, preset.columns, len(written))


def denoise(pipeline: GlmImagePipeline, prior: Prior, steps: int, guidance: float, seed: int) -> Iterator[Tensor]:
    """The latents `[1, 16, 4 * rows, 4 * columns]` after each step, as GlmImagePipeline computes them.

    Guidance's two branches are one batch; the second drops the prior's tokens. Latents are float32 between steps, or float64
    with a float64 model.
    """
    dit, scheduler = pipeline.transformer, pipeline.scheduler
    device, dtype = dit.device, dit.dtype
    height, width = 4 * prior.rows, 4 * prior.columns
    noise = torch.Generator().manual_seed(seed)  # on the CPU: every rank draws the same
    latents = randn_tensor((1, dit.config.in_channels, height, width), noise, device, torch.float32).to(dtype)
    pixels = [pipeline.vae_scale_factor * height, pipeline.vae_scale_factor * width]
    times = np.linspace(scheduler.config.num_train_timesteps, 1.0, steps + 1)[:-1].astype(np.int64).astype(np.float32)
    mu = calculate_shift(prior.tokens.shape[1], 256, scheduler.config.base_shift, scheduler.config.max_shift)
    sigmas = times / scheduler.config.num_train_timesteps
    retrieve_timesteps(scheduler, steps, device, times, sigmas, mu=mu)
    kept = {
        "encoder_hidden_states": prior.glyphs.to(dtype),
        "prior_token_id": prior.tokens.repeat(2, 1),
        "prior_token_drop": torch.tensor([[False], [True]], device=device).repeat(1, prior.tokens.shape[1]),
        "target_size": torch.tensor([pixels] * 2, device=device, dtype=dtype),
        "crop_coords": torch.zeros(2, 2, device=device, dtype=dtype),
        "return_dict": False,
    }
    for t in scheduler.timesteps:
        both = dit(hidden_states=latents.to(dtype).repeat(2, 1, 1, 1), timestep=t.expand(2) - 1, **kept)[0]
        wanted, free = both.to(torch.promote_types(dtype, torch.float32)).chunk(2)
        latents = scheduler.step(free + guidance * (wanted - free), t, latents, return_dict=False)[0]
        yield latents


def decode(pipeline: GlmImagePipeline, latents: Tensor) -> Tensor:
    """The picture `[1, 3, 32 * rows, 32 * columns]`, about -1 to 1."""
    vae = pipeline.vae
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=vae.dtype).view(1, -1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return vae.decode(latents.to(vae.dtype) * std + mean, return_dict=False)[0]
