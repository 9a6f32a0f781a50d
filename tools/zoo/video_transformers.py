"""The zoo's video transformers.

`full` has the published widths and resolutions, `tiny` the same blocks with few channels. Sizes are those of the
latents: (frames, height, width) after the autoencoder.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from pvae.tools.zoo.transformer import Sizes, TransformerEntry, latents, text, timestep, tokens
from pvae.tools.zoo.video_inputs import (
    HEADS,
    THREE_HEADS,
    cast_for,
    combined,
    common,
    entry,
    known_first_frame,
    many,
    mask,
    masked,
    rotary,
    video,
    with_sound,
)

# HunyuanVideo and its kin


def _pooled(model: Any, sizes: Sizes) -> Mapping[str, object]:
    return {"pooled_projections": torch.randn(sizes.batch, model.config.pooled_projection_dim)}


def _guided(model: Any, sizes: Sizes) -> Mapping[str, object]:
    return {"guidance": timestep(sizes, 8000.0)}


_hunyuan = combined(common("text_embed_dim"), masked, _pooled)


def _hunyuan15(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """The second text is the glyphs', by ByT5; the picture is SigLIP's 729 tokens."""
    config, glyphs = model.config, max(2, sizes.text // 4)
    return {
        "encoder_hidden_states_2": torch.randn(sizes.batch, glyphs, config.text_embed_2_dim),
        "encoder_attention_mask_2": mask(sizes, glyphs),
        "image_embeds": torch.randn(sizes.batch, many(sizes, 729), config.image_embed_dim),
    }


def _framepack(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """Two clean frames, two in patches of twice the side and sixteen in patches of four times, before those to make."""
    channels, taken, start = model.config.in_channels, {}, 0
    for name, frames in (("history_4x", 16), ("history_2x", 2), ("clean", 2)):
        taken[f"latents_{name}"] = video(channels, sizes, frames)
        taken[f"indices_latents_{name}"] = torch.arange(start, start + frames)
        start += frames
    indices = torch.arange(start, start + sizes.latent[0])
    picture = torch.randn(sizes.batch, many(sizes, 729), model.config.image_proj_dim)
    return taken | {"indices_latents": indices, "image_embeds": picture}


def _motif(model: Any, sizes: Sizes) -> Mapping[str, object]:
    return {"image_embeds": torch.randn(sizes.batch, many(sizes, 729), model.config.image_embed_dim)}


# LTX and its kin


def _ltx(model: Any, sizes: Sizes) -> Mapping[str, object]:
    frames, height, width = sizes.latent
    return {
        "hidden_states": tokens(model, sizes, 1),
        "encoder_hidden_states": text(sizes, model.config.caption_channels),
        "timestep": timestep(sizes),
        "encoder_attention_mask": mask(sizes),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def _each_token(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """A time for each token, that of the first frame smaller."""
    _, height, width = sizes.latent
    first = torch.arange(math.prod(sizes.latent)) < height * width
    return {"timestep": timestep(sizes)[:, None] * torch.where(first, 0.25, 1.0)}


def _ltx2(model: Any, sizes: Sizes) -> Mapping[str, object]:
    sound = many(sizes, 126)
    return {
        "audio_hidden_states": torch.randn(sizes.batch, sound, model.config.audio_in_channels),
        "audio_encoder_hidden_states": text(sizes, model.config.caption_channels),
        "audio_encoder_attention_mask": mask(sizes),
        "audio_num_frames": sound,
    }


# CogVideoX and its kin: frames before channels


def _frames_first(model: Any, sizes: Sizes) -> Mapping[str, object]:
    return {"hidden_states": latents(model, sizes).transpose(1, 2)}


_cogvideox = combined(common("text_embed_dim"), _frames_first)


def _cogvideox_rotary(model: Any, sizes: Sizes) -> Mapping[str, object]:
    head, patch = model.config.attention_head_dim, model.config.patch_size
    frames, height, width = sizes.latent
    extents = (frames // (model.config.get("patch_size_t") or 1), height // patch, width // patch)
    return {"image_rotary_emb": rotary(extents, (head // 4, head // 8 * 3, head // 8 * 3))}


def _ofs(model: Any, sizes: Sizes) -> Mapping[str, object]:
    return {"ofs": torch.full((1,), 2.0)}


def _consisid(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """A face, as a vector and as a vision transformer's tokens at five depths."""
    config, seen = model.config, many(sizes, 577)
    return {
        "id_cond": torch.randn(sizes.batch, config.LFE_id_dim),
        "id_vit_hidden": [torch.randn(sizes.batch, seen, config.LFE_vit_dim) for _ in range(config.LFE_num_scale)],
    }


# Others


def _allegro(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """Cosines and sines of each axis, and each token's place on it."""
    frames, height, width = sizes.latent
    extents = (frames, height // 2, width // 2)
    axes = [torch.arange(extent) for extent in extents]
    places = torch.cartesian_prod(*axes).T.reshape(3, 1, -1)
    angles = tuple(rotary((extent,), (model.config.attention_head_dim // 3,)) for extent in extents)
    return {"encoder_attention_mask": mask(sizes), "image_rotary_emb": (angles, tuple(places))}


def _cosmos(model: Any, sizes: Sizes) -> Mapping[str, object]:
    return {"fps": 24}


def _cosmos_conditioned(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """A mask as one more channel, and a time for each frame."""
    frames = sizes.latent[0]
    rest = 0.5 ** torch.arange(frames).flip(0).clamp(max=4)
    return {
        "hidden_states": video(model.config.in_channels - 1, sizes),
        "condition_mask": torch.randn(sizes.batch, 1, *sizes.latent),
        "timestep": timestep(sizes, 1.0).reshape(-1, 1, 1, 1, 1) * rest.reshape(-1, 1, 1),
    }


def _kandinsky(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """Channels last: the noise's, a condition's and its mask."""
    config, (frames, height, width) = model.config, sizes.latent
    return {
        "hidden_states": torch.randn(sizes.batch, *sizes.latent, 2 * config.in_visual_dim + 1),
        "encoder_hidden_states": text(sizes, config.in_text_dim),
        "pooled_projections": torch.randn(sizes.batch, config.in_text_dim2),
        "timestep": timestep(sizes),
        "visual_rope_pos": [torch.arange(extent) for extent in (frames, height // 2, width // 2)],
    }


def _kandinsky5(model: Any, sizes: Sizes) -> Mapping[str, object]:
    return {"text_rope_pos": torch.arange(sizes.text)}


def _kandinsky6(model: Any, sizes: Sizes) -> Mapping[str, object]:
    sound = many(sizes, 126)
    return {
        "audio_hidden_states": torch.randn(sizes.batch, sound, model.config.in_audio_dim),
        "encoder_attention_mask": mask(sizes),
    }


def _minimax(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """Text, picture and sound in one sequence; the first frame is known, so it has another time than the rest."""
    config, (frames, height, width) = model.config, sizes.latent
    rows, columns, sound = height // 2, width // 2, many(sizes, 126)
    counts = (sizes.text, frames * rows * columns, sound)
    indices = torch.arange(sum(counts)).split(counts)
    video = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns))
    place = torch.cat([indices[0][:, None].repeat(1, 3), video + sizes.text, indices[2][:, None].repeat(1, 3)])
    tags = torch.cat([torch.full_like(part, tag) for part, tag in zip(indices, (1, 0, 2), strict=True)])
    known = (torch.arange(sum(counts)) - sizes.text).clamp(min=-1)
    return {
        "hidden_states": torch.randn(sizes.batch, counts[1], config.in_channels * 4),
        "audio_hidden_states": torch.randn(sizes.batch, sound, config.audio_in_channels),
        "encoder_hidden_states": text(sizes, config.text_dim),
        "timestep": torch.tensor([0.5, 0.0625]),
        "timestep_indices": ((known >= 0) & (known < rows * columns)).long(),
        "token_tags": tags,
        "position_ids": place,
        "text_indices": indices[0],
        "video_indices": indices[1],
        "audio_indices": indices[2],
    }


def _sana_wm(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """A time for each frame, 0 for the first. Without `camera_conditions`, which the class takes in float32 on the CPU."""
    times = timestep(sizes)[:, None, None] * (torch.arange(sizes.latent[0]) > 0)
    return {
        "timestep": times.long(),
        "encoder_hidden_states": text(sizes, model.config.caption_channels)[:, None],
        "chunk_plucker": video(model.config.chunk_plucker_channels, sizes),
    }


_TINY_HUNYUAN = (
    HEADS
    | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2}
    | {"text_embed_dim": 32, "pooled_projection_dim": 24, "rope_axes_dim": (4, 4, 4)}
)
_FULL_HUNYUAN: dict[str, object] = {"num_layers": 1, "num_single_layers": 1}
_HUNYUAN_BLOCKS = ("transformer_blocks", "single_transformer_blocks")
_HUNYUAN_SIZE = Sizes((33, 90, 160), text=256)  # 129 frames of 720 x 1280
_TINY_LTX = (
    HEADS | {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 48} | {"caption_channels": 32, "num_layers": 2}
)
_TINY_LTX2 = (
    _TINY_LTX
    | {"audio_num_attention_heads": 4, "audio_attention_head_dim": 6}
    | {"audio_cross_attention_dim": 24, "audio_in_channels": 6, "audio_out_channels": 6}
)
_LTX_SIZE = Sizes((16, 16, 22), text=128)  # 121 frames of 512 x 704
_LTX2_SIZE = Sizes((16, 16, 24), text=1024)  # 121 frames of 512 x 768
_TINY_COGVIDEOX = (
    THREE_HEADS
    | {"in_channels": 4, "out_channels": 4, "time_embed_dim": 24, "text_embed_dim": 32, "num_layers": 2}
    | {"sample_width": 6, "sample_height": 4, "sample_frames": 9, "max_text_seq_length": 5}
)
_COGVIDEOX_SIZE = Sizes((13, 60, 90), text=226)  # 49 frames of 480 x 720
_COGVIDEOX15_SIZE = Sizes((22, 96, 170), text=224)  # 81 frames (and the one that makes them even) of 768 x 1360
_ROTARY: dict[str, object] = {"use_rotary_positional_embeddings": True}
_COGVIDEOX15: dict[str, object] = _ROTARY | {"patch_size_t": 2, "patch_bias": False}
# Version 1 adds learned positions, whose norm torch does not compute in float64 as the class asks. The padding mask,
# one more input channel, needs torchvision.
_COSMOS2: dict[str, object] = {"extra_pos_embed_type": None, "concat_padding_mask": False} | {
    "rope_scale": (1.0, 4.0, 4.0)
}
_TINY_COSMOS = (
    HEADS
    | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 32}
    | {"adaln_lora_dim": 8, "max_size": (4, 8, 8)}
)
_TINY_KANDINSKY: dict[str, object] = (
    {"in_text_dim": 32, "in_text_dim2": 24, "time_dim": 24, "model_dim": 48, "ff_dim": 96}
    | {"num_text_blocks": 2, "num_visual_blocks": 2, "axes_dims": (4, 4, 4)}
    | {"visual_cond": True}
)
_KANDINSKY_BLOCKS = ("text_transformer_blocks", "visual_transformer_blocks")
_LATTE: dict[str, object] = (
    {"in_channels": 4, "out_channels": 8, "num_layers": 2, "patch_size": 2, "attention_bias": True}
    | {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_single"}
    | {"norm_elementwise_affine": False, "norm_eps": 1e-6}
)
_TINY_SANA = (
    HEADS
    | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 4}
    | {"cross_attention_head_dim": 12, "cross_attention_dim": 48, "caption_channels": 32}
    | {"sample_size": 6}
)
_SANA_SIZE = Sizes((21, 60, 104), text=300)  # 81 frames of 480 x 832
_sana = combined(common("caption_channels"), masked)

VIDEO_TRANSFORMERS: dict[str, TransformerEntry] = {
    "hunyuan-video-dit": entry(
        "HunyuanVideoTransformer3DModel",
        _TINY_HUNYUAN,
        _FULL_HUNYUAN,
        combined(_hunyuan, _guided),
        *_HUNYUAN_BLOCKS,
        full_size=_HUNYUAN_SIZE,
    ),
    # Image to video: the first frame is known and has scale, shift and gate of its own.
    "hunyuan-video-i2v-dit": entry(
        "HunyuanVideoTransformer3DModel",
        _TINY_HUNYUAN | {"image_condition_type": "token_replace", "guidance_embeds": True},
        _FULL_HUNYUAN | {"image_condition_type": "token_replace", "guidance_embeds": True},
        combined(_hunyuan, _guided),
        *_HUNYUAN_BLOCKS,
        full_size=_HUNYUAN_SIZE,
    ),
    "hunyuan-video-framepack-dit": entry(
        "HunyuanVideoFramepackTransformer3DModel",
        _TINY_HUNYUAN | {"has_image_proj": True, "image_proj_dim": 20, "has_clean_x_embedder": True},
        _FULL_HUNYUAN | {"has_image_proj": True, "has_clean_x_embedder": True},
        combined(_hunyuan, _guided, _framepack),
        *_HUNYUAN_BLOCKS,
        tiny_size=Sizes((3, 8, 16), text=5, batch=2),
        full_size=Sizes((9, 88, 68), text=256),
    ),
    "hunyuan-video1.5-dit": entry(
        "HunyuanVideo15Transformer3DModel",
        HEADS
        | {"in_channels": 9, "out_channels": 4, "num_layers": 2, "text_embed_dim": 32}
        | {"text_embed_2_dim": 24, "image_embed_dim": 20, "rope_axes_dim": (4, 4, 4)},
        {"num_layers": 1},
        combined(common("text_embed_dim"), masked, _hunyuan15),
        full_size=Sizes((31, 45, 80), text=1000),  # 121 frames of 720 x 1280
    ),
    "motif-video-dit": entry(
        "MotifVideoTransformer3DModel",
        HEADS
        | {"in_channels": 9, "out_channels": 4, "num_layers": 2, "num_single_layers": 4}
        | {"num_decoder_layers": 2, "text_embed_dim": 32, "image_embed_dim": 20}
        | {"rope_axes_dim": (4, 4, 4), "enable_text_cross_attention_dual": True}
        | {"enable_text_cross_attention_single": True},
        {"num_layers": 1, "num_single_layers": 2, "num_decoder_layers": 1}
        | {"image_embed_dim": 1152, "enable_text_cross_attention_dual": True}
        | {"enable_text_cross_attention_single": True},
        combined(common("text_embed_dim"), masked, _motif, cast_for("time_text_embed.timestep_embedder.linear_1")),
        *_HUNYUAN_BLOCKS,
        full_size=Sizes((31, 92, 160), text=512),
    ),
    "ltx-dit": entry("LTXVideoTransformer3DModel", _TINY_LTX, {"num_layers": 1}, _ltx, full_size=_LTX_SIZE),
    # 13B, as its pipeline with conditions runs it.
    "ltx-condition-dit": entry(
        "LTXVideoTransformer3DModel",
        _TINY_LTX,
        {"num_layers": 1, "attention_head_dim": 128, "cross_attention_dim": 4096},
        combined(_ltx, _each_token),
        full_size=_LTX_SIZE,
    ),
    "ltx2-dit": entry(
        "LTX2VideoTransformer3DModel",
        _TINY_LTX2,
        {"num_layers": 1},
        combined(_ltx, _ltx2),
        full_size=_LTX2_SIZE,
        call=with_sound,
    ),
    "cogvideox-dit": entry(
        "CogVideoXTransformer3DModel",
        _TINY_COGVIDEOX,
        {"num_layers": 1},
        _cogvideox,
        full_size=_COGVIDEOX_SIZE,
    ),
    "cogvideox-5b-dit": entry(
        "CogVideoXTransformer3DModel",
        _TINY_COGVIDEOX | _ROTARY,
        {"num_layers": 1, "num_attention_heads": 48} | _ROTARY,
        combined(_cogvideox, _cogvideox_rotary),
        full_size=_COGVIDEOX_SIZE,
    ),
    "cogvideox1.5-dit": entry(
        "CogVideoXTransformer3DModel",
        _TINY_COGVIDEOX | _COGVIDEOX15 | {"ofs_embed_dim": 24},
        {"num_layers": 1, "num_attention_heads": 48, "in_channels": 32, "ofs_embed_dim": 512} | _COGVIDEOX15,
        combined(_cogvideox, _cogvideox_rotary, _ofs),
        tiny_size=Sizes((4, 4, 6), text=5, batch=2),
        full_size=_COGVIDEOX15_SIZE,
    ),
    "consisid-dit": entry(
        "ConsisIDTransformer3DModel",
        _TINY_COGVIDEOX
        | _ROTARY
        | {"is_train_face": True, "cross_attn_dim_head": 8, "cross_attn_num_heads": 2}
        | {"LFE_id_dim": 20, "LFE_vit_dim": 16, "LFE_depth": 5, "LFE_dim_head": 8}
        | {"LFE_num_heads": 2, "LFE_num_id_token": 2, "LFE_num_querie": 3, "LFE_output_dim": 32},
        {"num_layers": 2, "num_attention_heads": 48, "in_channels": 32, "is_train_face": True} | _ROTARY,
        combined(_cogvideox, _cogvideox_rotary, _consisid),
        full_size=_COGVIDEOX_SIZE,
    ),
    # Its last block gives no text.
    "mochi-dit": entry(
        "MochiTransformer3DModel",
        HEADS
        | {"in_channels": 4, "num_layers": 3, "pooled_projection_dim": 24, "text_embed_dim": 32}
        | {"time_embed_dim": 16, "max_sequence_length": 5},
        {"num_layers": 2},
        combined(common("text_embed_dim"), masked),
        full_size=Sizes((28, 60, 106), text=256),  # 163 frames of 480 x 848
    ),
    "allegro-dit": entry(
        "AllegroTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2}
        | {"cross_attention_dim": 48, "sample_height": 4, "sample_width": 6, "sample_frames": 3}
        | {"caption_channels": 32},
        {"num_layers": 1},
        combined(common("caption_channels"), _allegro),
        full_size=Sizes((22, 90, 160), text=512),  # 88 frames of 720 x 1280
    ),
    "cosmos2-dit": entry(
        "CosmosTransformer3DModel",
        _TINY_COSMOS | _COSMOS2,
        {"num_layers": 1, "num_attention_heads": 16} | _COSMOS2,
        combined(common("text_embed_dim", 1.0), _cosmos),
        full_size=Sizes((1, 96, 170), text=512),  # a picture of 768 x 1360
    ),
    "cosmos2-video2world-dit": entry(
        "CosmosTransformer3DModel",
        _TINY_COSMOS | _COSMOS2 | {"in_channels": 5},
        {"num_layers": 1, "num_attention_heads": 40, "in_channels": 17} | _COSMOS2,
        combined(common("text_embed_dim", 1.0), _cosmos, _cosmos_conditioned),
        full_size=Sizes((24, 88, 160), text=512),  # 93 frames of 704 x 1280
    ),
    "easyanimate-dit": entry(
        "EasyAnimateTransformer3DModel",
        THREE_HEADS
        | {"in_channels": 4, "out_channels": 4, "patch_size": 2, "num_layers": 2, "mmdit_layers": 2}
        | {"time_embed_dim": 24, "add_norm_text_encoder": True, "text_embed_dim": 32},
        {"in_channels": 16, "out_channels": 16, "patch_size": 2, "num_layers": 1}
        | {"mmdit_layers": 1, "add_norm_text_encoder": True},
        common("text_embed_dim"),
        full_size=Sizes((13, 64, 64), text=256),  # 49 frames of 512 x 512
    ),
    # 2B, lite
    "kandinsky5-dit": entry(
        "Kandinsky5Transformer3DModel",
        _TINY_KANDINSKY | {"in_visual_dim": 4, "out_visual_dim": 4},
        {"in_visual_dim": 16, "out_visual_dim": 16, "model_dim": 1792, "ff_dim": 7168}
        | {"num_text_blocks": 1, "num_visual_blocks": 1, "visual_cond": True},
        combined(_kandinsky, _kandinsky5, cast_for("time_embeddings.in_layer")),
        *_KANDINSKY_BLOCKS,
        # Queries and keys are rounded to bfloat16 in any dtype, so float64 is far from float32 where a rounding flips:
        # the fewer tokens, the rarer.
        tiny_size=Sizes((2, 4, 4), text=5, batch=2),
        full_size=Sizes((31, 64, 96), text=256),  # 121 frames of 512 x 768
    ),
    "kandinsky6-dit": entry(
        "Kandinsky6Transformer3DModel",
        _TINY_KANDINSKY
        | {"in_visual_dim": 4, "out_visual_dim": 4, "in_audio_dim": 6, "out_audio_dim": 6}
        | {"ca_rope": True, "cross_gates": True, "fix_modulation": True},
        {"num_text_blocks": 1, "num_visual_blocks": 1, "ca_rope": True, "cross_gates": True, "fix_modulation": True},
        combined(_kandinsky, _kandinsky6),
        "video_text_transformer_blocks",
        "audio_text_transformer_blocks",
        "visual_transformer_blocks",
        full_size=Sizes((31, 64, 96), text=256),
        call=with_sound,
    ),
    "latte-dit": entry(
        "LatteTransformer3DModel",
        HEADS | _LATTE | {"cross_attention_dim": 48, "caption_channels": 32, "sample_size": 6, "video_length": 3},
        _LATTE | {"num_layers": 1, "attention_head_dim": 72, "cross_attention_dim": 1152, "caption_channels": 4096},
        common("caption_channels"),
        "transformer_blocks",
        "temporal_transformer_blocks",
        full_size=Sizes((16, 64, 64), text=120),
    ),
    "sana-video-dit": entry("SanaVideoTransformer3DModel", _TINY_SANA, {"num_layers": 1}, _sana, full_size=_SANA_SIZE),
    "sana-video-i2v-dit": entry(
        "SanaVideoTransformer3DModel",
        _TINY_SANA,
        {"num_layers": 1},
        combined(_sana, known_first_frame),
        full_size=_SANA_SIZE,
    ),
    # Scale, shift and gate of each frame. One block in four attends by softmax, in bfloat16 if given float32: none here.
    "sana-wm-dit": entry(
        "SanaWMTransformer3DModel",
        {"in_channels": 4, "num_layers": 2, "hidden_size": 48, "num_attention_heads": 2}
        | {"softmax_every_n": 0, "linear_head_dim": 24, "chunk_plucker_channels": 6, "caption_channels": 32},
        {"num_layers": 2, "softmax_every_n": 2},
        combined(_sana, _sana_wm),
        "blocks",
        full_size=Sizes((21, 22, 40), text=300),  # 161 frames of 704 x 1280
    ),
    # Text, picture and sound in one sequence, each token's scale, shift and gate picked from a table by index.
    "minimax-h3-dit": entry(
        "MiniMaxH3Transformer3DModel",
        HEADS
        | {"hidden_size": 48, "num_layers": 2, "ffn_dim": 96, "in_channels": 4}
        | {"audio_in_channels": 6, "text_dim": 32, "freq_dim": 16, "time_embed_hidden_dim": 32}
        | {"time_embed_dim": 24, "rope_freq_dim": 2},
        {"num_layers": 1, "num_refiner_layers": 1},
        _minimax,
        "transformer_blocks",
        "token_refiner.refiner_blocks",
        full_size=Sizes((16, 48, 80), text=256),
        call=with_sound,
    ),
}
