"""The zoo's picture transformers that take latents as a picture and make patches themselves.

`full` has the published widths, `tiny` the same blocks with few channels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pvae.tools.zoo.transformer import Inputs, Sizes, TransformerEntry, latents, text, timestep

_HEADS = {"attention_head_dim": 16, "num_attention_heads": 3}
_TINY_SIZE = Sizes((8, 12), text=5, batch=2)
_FULL_SIZE = Sizes((128, 128), text=512)  # 1024 x 1024 pixels


def _common(text_channels: str, scale: float = 1000.0, more: Inputs | None = None) -> Inputs:
    """Latents, a text of the width that the configuration calls `text_channels`, a time up to `scale`, and `more`."""

    def inputs(model: Any, sizes: Sizes) -> Mapping[str, object]:
        taken: dict[str, object] = {
            "hidden_states": latents(model, sizes),
            "encoder_hidden_states": text(sizes, model.config[text_channels]),
            "timestep": timestep(sizes, scale),
        }
        return taken | dict(more(model, sizes) if more else {})

    return inputs


def _pooled(model: Any, sizes: Sizes) -> Mapping[str, object]:
    return {"pooled_projections": torch.randn(sizes.batch, model.config.pooled_projection_dim)}


def _mask(name: str) -> Inputs:
    """All of the text; bool, as the pipelines make it of the tokenizer's."""
    return lambda model, sizes: {name: torch.ones(sizes.batch, sizes.text, dtype=torch.bool)}


def _hunyuan(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """The second text is the glyphs', by ByT5."""
    everything = torch.ones(sizes.batch, sizes.text, dtype=torch.bool)
    return {
        "encoder_attention_mask": everything,
        "encoder_hidden_states_2": text(sizes, model.config.text_embed_2_dim),
        "encoder_attention_mask_2": everything,
    }


def _pixels(names: Sequence[str]) -> Inputs:
    """Picture sizes and a crop's corner, `[B, 2]` each."""

    def inputs(model: Any, sizes: Sizes) -> Mapping[str, object]:
        pixels = torch.tensor([[8.0 * extent for extent in sizes.latent]] * sizes.batch)
        return {name: torch.zeros_like(pixels) if name == "crop_coords" else pixels for name in names}

    return inputs


def _glm(model: Any, sizes: Sizes) -> Mapping[str, object]:
    shape = (sizes.batch, math.prod(sizes.latent) // 4)
    return {
        "prior_token_id": torch.randint(model.config.prior_vq_quantizer_codebook_size, shape),
        "prior_token_drop": torch.zeros(shape, dtype=torch.bool),
    } | dict(_pixels(("target_size", "crop_coords"))(model, sizes))


def _pixart(model: Any, sizes: Sizes) -> Mapping[str, object]:
    resolution = torch.tensor([[8.0 * extent for extent in sizes.latent]] * sizes.batch)
    return {"added_cond_kwargs": {"resolution": resolution, "aspect_ratio": resolution[:, :1] / resolution[:, 1:]}}


def _dit(model: Any, sizes: Sizes) -> Mapping[str, object]:
    labels = torch.randint(model.config.num_embeds_ada_norm, (sizes.batch,))
    return {"hidden_states": latents(model, sizes), "timestep": timestep(sizes), "class_labels": labels}


def _hidream(model: Any, sizes: Sizes) -> Mapping[str, object]:
    t5, llama = model.config.caption_channels
    return {
        "hidden_states": latents(model, sizes),
        "timesteps": timestep(sizes),
        "encoder_hidden_states_t5": text(sizes, t5),
        "encoder_hidden_states_llama3": torch.stack([text(sizes, llama) for _ in model.config.llama_layers]),
        "pooled_embeds": torch.randn(sizes.batch, model.config.text_emb_dim),
    }


def _zimage(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """A list of pictures of one frame, and one of texts."""
    return {
        "x": list(latents(model, sizes).unsqueeze(2)),
        "t": timestep(sizes, 1.0),
        "cap_feats": list(text(sizes, model.config.cap_feat_dim)),
    }


def _stacked(model: Any, inputs: Sequence[torch.Tensor], kwargs: Mapping[str, object]) -> torch.Tensor:
    """The pictures of Z-Image's list, as a batch."""
    return torch.stack(model(*inputs, **kwargs, return_dict=False)[0])


def _fibo2(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """A text for the gist and one for each injecting block; a picture to edit, whose tokens are modulated apart."""
    texts = 1 + len(model.config.injection_layer_ids)
    return {
        "hidden_states": latents(model, sizes),
        "timestep": timestep(sizes, 1.0),
        "encoder_hidden_states": torch.randn(sizes.batch, texts, sizes.text, model.config.cap_feat_dim),
        "context_latents": [latents(model, sizes)],
    }


def _omnigen(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """A causal text, the time, and latents that see everything."""
    length = sizes.text + 1 + math.prod(sizes.latent) // model.config.patch_size**2
    seen = torch.ones(
        length, length
    ).tril()  # the model's (1 - mask) * min is NaN for the pipeline's integers in float64
    seen[sizes.text + 1 :] = 1
    return {
        "hidden_states": latents(model, sizes),
        "timestep": timestep(sizes, 1.0),
        "input_ids": torch.randint(model.config.vocab_size, (sizes.batch, sizes.text)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": seen.expand(sizes.batch, -1, -1),
        "position_ids": torch.arange(length).expand(sizes.batch, -1),
    }


def _ernie(model: Any, sizes: Sizes) -> Mapping[str, object]:
    return {
        "hidden_states": latents(model, sizes),
        "timestep": timestep(sizes),
        "text_bth": text(sizes, model.config.text_in_dim),
        "text_lens": torch.full((sizes.batch,), sizes.text),
    }


def _joyimage(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """Two pictures a sample, one of them to edit."""
    pictures = torch.randn(sizes.batch, 2, model.config.in_channels, 1, *sizes.latent)
    return {
        "hidden_states": pictures,
        "encoder_hidden_states": text(sizes, model.config.text_dim),
        "timestep": timestep(sizes),
    }


def _dreamlite(model: Any, sizes: Sizes) -> Mapping[str, object]:
    return {
        "hidden_states": latents(model, sizes),
        "encoder_hidden_states": text(sizes, model.config.cross_attention_dim),
    }


def _angles(sizes: Sizes, head: int) -> torch.Tensor:
    """`[rows, columns, head / 2]` rotary angles, half of them of the row; a patch is 2 x 2."""
    rate = 10000 ** -torch.linspace(0, 1, head // 4 + 1)[:-1]
    row, column = (torch.arange(extent // 2)[:, None] * rate for extent in sizes.latent)
    shape = (len(row), len(column), -1)
    return torch.cat([row[:, None].expand(shape), column.expand(shape)], dim=-1)


def _lumina(model: Any, sizes: Sizes) -> Mapping[str, object]:
    angles = _angles(sizes, model.config.hidden_size // model.config.num_attention_heads)
    mask = torch.ones(sizes.batch, sizes.text)
    rotary = torch.polar(torch.ones_like(angles), angles)
    return {"image_rotary_emb": rotary, "encoder_mask": mask, "cross_attention_kwargs": {}}


def _hunyuan_dit(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """CLIP's text and T5's; as its version 1.2, without the picture's size and style."""
    config = model.config
    angles = _angles(sizes, config.attention_head_dim).flatten(0, 1).repeat_interleave(2, dim=-1)
    return {
        "hidden_states": latents(model, sizes),
        "timestep": timestep(sizes),
        "encoder_hidden_states": torch.randn(sizes.batch, config.text_len, config.cross_attention_dim),
        "text_embedding_mask": torch.arange(config.text_len).expand(sizes.batch, -1) < config.text_len - 1,
        "encoder_hidden_states_t5": torch.randn(sizes.batch, config.text_len_t5, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": torch.arange(config.text_len_t5).expand(sizes.batch, -1) < config.text_len_t5 - 1,
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _entry(
    cls: str,
    tiny: Mapping[str, object],
    full: Mapping[str, object],
    inputs: Callable[[Any, Sizes], Mapping[str, object]],
    *blocks: str,
    full_size: Sizes = _FULL_SIZE,
    tiny_size: Sizes = _TINY_SIZE,
) -> TransformerEntry:
    return TransformerEntry(cls, tiny, full, inputs, tiny_size, full_size, blocks or ("transformer_blocks",))


_TINY_SD3 = _HEADS | {
    "sample_size": 12,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,  # the last one gives no text
    "joint_attention_dim": 32,
    "caption_projection_dim": 48,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 16,
}
_FULL_SD3 = {
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
_TINY_COGVIEW = _HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": 32,
    "time_embed_dim": 24,
    "condition_dim": 8,
}
_COGVIEW_SIZES = ("original_size", "target_size", "crop_coords")

IMAGE_TRANSFORMERS: dict[str, TransformerEntry] = {
    "sd3-dit": _entry(
        "SD3Transformer2DModel",
        _TINY_SD3,
        _FULL_SD3 | {"num_layers": 2},
        _common("joint_attention_dim", more=_pooled),
        full_size=Sizes((128, 128), text=333),
    ),
    # Stable Diffusion 3.5 medium: a second attention on the picture alone, with its own scale, shift and gate.
    "sd3.5-dit": _entry(
        "SD3Transformer2DModel",
        _TINY_SD3 | {"num_layers": 5, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        _FULL_SD3 | {"num_layers": 3, "dual_attention_layers": (0,), "qk_norm": "rms_norm", "pos_embed_max_size": 384},
        _common("joint_attention_dim", more=_pooled),
        full_size=Sizes((128, 128), text=333),
    ),
    "hunyuan-image-dit": _entry(
        "HunyuanImageTransformer2DModel",
        _HEADS
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "text_embed_dim": 32,
            "text_embed_2_dim": 24,
            "rope_axes_dim": (8, 8),
        },
        {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_2_dim": 1472},
        _common("text_embed_dim", more=_hunyuan),
        "transformer_blocks",
        "single_transformer_blocks",
        full_size=Sizes((64, 64), text=512),  # 2048 x 2048 pixels
    ),
    # The second half of the blocks adds what the first half has kept.
    "hunyuan-dit": _entry(
        "HunyuanDiT2DModel",
        _HEADS
        | {
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": 48,
            "num_layers": 6,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 24,
            "pooled_projection_dim": 16,
            "text_len": 5,
            "text_len_t5": 7,
            "use_style_cond_and_image_meta_size": False,
        },
        {
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": 1408,
            "num_layers": 4,
            "mlp_ratio": 4.3637,
            "use_style_cond_and_image_meta_size": False,
        },
        _hunyuan_dit,
        "blocks",
        full_size=Sizes((128, 128)),
    ),
    "cogview3-plus-dit": _entry(
        "CogView3PlusTransformer2DModel",
        _TINY_COGVIEW | {"pos_embed_max_size": 16, "sample_size": 12},
        {"num_layers": 1},
        _common("text_embed_dim", more=_pixels(_COGVIEW_SIZES)),
        full_size=Sizes((128, 128), text=224),
    ),
    "cogview4-dit": _entry(
        "CogView4Transformer2DModel",
        _TINY_COGVIEW | {"rope_axes_dim": (16, 16), "sample_size": 12},
        {"num_layers": 1, "attention_head_dim": 128, "num_attention_heads": 32},
        _common("text_embed_dim", more=_pixels(_COGVIEW_SIZES)),
    ),
    "glm-image-dit": _entry(
        "GlmImageTransformer2DModel",
        _TINY_COGVIEW | {"prior_vq_quantizer_codebook_size": 50},
        {"num_layers": 1, "attention_head_dim": 128, "num_attention_heads": 32},
        _common("text_embed_dim", more=_glm),
        full_size=Sizes((128, 128), text=64),
    ),
    "auraflow-dit": _entry(
        "AuraFlowTransformer2DModel",
        _HEADS
        | {
            "sample_size": 12,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 48,
            "pos_embed_max_size": 100,
        },
        {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 9216},
        _common("joint_attention_dim", 1.0),
        "joint_transformer_blocks",
        "single_transformer_blocks",
        full_size=Sizes((128, 128), text=256),
    ),
    "lumina2-dit": _entry(
        "Lumina2Transformer2DModel",
        {
            "in_channels": 4,
            "hidden_size": 48,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 8,
            "axes_dim_rope": (4, 4, 4),
            "cap_feat_dim": 32,
        },
        {"num_layers": 1, "num_refiner_layers": 1, "cap_feat_dim": 2304},
        _common("cap_feat_dim", 1.0, _mask("encoder_attention_mask")),
        "layers",
        "noise_refiner",
        "context_refiner",
        full_size=Sizes((128, 128), text=256),
    ),
    "lumina-next-dit": _entry(
        "LuminaNextDiT2DModel",
        {
            "hidden_size": 48,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 8,
            "cross_attention_dim": 32,
        },
        {"num_layers": 1, "num_kv_heads": 8},
        _common("cross_attention_dim", 1.0, _lumina),
        "layers",
        full_size=Sizes((128, 128), text=256),
    ),
    "sana-dit": _entry(
        "SanaTransformer2DModel",
        _HEADS
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_cross_attention_heads": 3,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 48,
            "caption_channels": 32,
        },
        {"num_layers": 1},
        _common("caption_channels"),
        full_size=Sizes((32, 32), text=300),
    ),
    "pixart-dit": _entry(
        "PixArtTransformer2DModel",
        _HEADS
        | {
            "num_layers": 2,
            "cross_attention_dim": 48,
            "sample_size": 12,
            "use_additional_conditions": True,
            "caption_channels": 32,
        },
        {"num_layers": 1, "caption_channels": 4096},
        _common("caption_channels", more=_pixart),
        full_size=Sizes((128, 128), text=120),
    ),
    "dit": _entry(
        "DiTTransformer2DModel",
        _HEADS | {"num_layers": 2, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 10},
        {"num_layers": 1, "out_channels": 8},
        _dit,
        tiny_size=Sizes((8, 8), batch=2),  # the class makes its output square
        full_size=Sizes((32, 32)),
    ),
    "hidream-dit": _entry(
        "HiDreamImageTransformer2DModel",
        _HEADS
        | {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "caption_channels": [32, 24],
            "text_emb_dim": 20,
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (12, 12),
            "llama_layers": [0, 1, 2, 3],
        },
        {
            "patch_size": 2,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": [4096, 4096],
            "axes_dims_rope": (64, 32, 32),
            "llama_layers": [0, 1],
        },
        _hidream,
        "double_stream_blocks",
        "single_stream_blocks",
        full_size=Sizes((128, 128), text=128),
    ),
    "z-image-dit": TransformerEntry(
        "ZImageTransformer2DModel",
        tiny={
            "in_channels": 4,
            "dim": 48,
            "n_layers": 2,
            "n_heads": 3,
            "n_kv_heads": 3,
            "cap_feat_dim": 32,
            "axes_dims": [4, 6, 6],
            "axes_lens": [128, 32, 32],
        },
        full={"n_layers": 1, "n_refiner_layers": 1},
        inputs=_zimage,
        tiny_size=_TINY_SIZE,
        full_size=_FULL_SIZE,
        blocks=("layers", "noise_refiner", "context_refiner"),
        call=_stacked,
    ),
    "bria-fibo2-dit": _entry(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "dim": 48,
            "n_layers": 4,
            "n_heads": 3,
            "cap_feat_dim": 32,
            "injection_layer_ids": (1, 3),
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 2,
            "gist_max_text_len": 16,
            "axes_dims": (4, 6, 6),
            "axes_lens": (64, 32, 32),
        },
        {"n_layers": 2, "n_refiner_layers": 1, "injection_layer_ids": (1,), "perceiver_num_layers": 1},
        _fibo2,
        "layers",
        "noise_refiner",
        full_size=Sizes((128, 128), text=1024),
    ),
    "omnigen-dit": _entry(
        "OmniGenTransformer2DModel",
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 96,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 50,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            "pos_embed_max_size": 16,
            "time_step_dim": 32,
        },
        {"num_layers": 1, "rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}},
        _omnigen,
        "layers",
        full_size=Sizes((128, 128), text=128),
    ),
    "prx-dit": _entry(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "context_in_dim": 32,
            "hidden_size": 48,
            "num_heads": 3,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        {"depth": 1},
        _common("context_in_dim", 1.0, _mask("attention_mask")),
        "blocks",
        full_size=Sizes((128, 128), text=256),
    ),
    "ernie-image-dit": _entry(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_layers": 2,
            "ffn_hidden_size": 96,
            "in_channels": 8,
            "out_channels": 8,
            "text_in_dim": 32,
            "rope_axes_dim": (4, 6, 6),
        },
        {"num_layers": 1},
        _ernie,
        "layers",
        full_size=Sizes((64, 64), text=256),
    ),
    "joyimage-edit-dit": _entry(
        "JoyImageEditTransformer3DModel",
        {
            "in_channels": 4,
            "hidden_size": 48,
            "num_attention_heads": 3,
            "text_dim": 32,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
        {"num_layers": 1},
        _joyimage,
        "double_blocks",
    ),
    # A part of DreamLite's U-Net, without modulation: what a pass must leave alone.
    "dreamlite-dit": _entry(
        "DreamLiteTransformer2DModel",
        _HEADS
        | {"in_channels": 48, "num_layers": 2, "norm_num_groups": 4, "cross_attention_dim": 32, "qk_norm": "rms_norm"},
        {
            "in_channels": 640,
            "num_attention_heads": 10,
            "attention_head_dim": 64,
            "cross_attention_dim": 2048,
            "qk_norm": "rms_norm",
        },
        _dreamlite,
        full_size=Sizes((64, 64), text=128),
    ),
}
