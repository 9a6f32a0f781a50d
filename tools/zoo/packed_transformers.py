"""The zoo's picture transformers whose pipelines give them tokens: latents packed in patches, with their positions.

`full` has the published widths, `tiny` the same blocks with few channels.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from pvae.tools.zoo.transformer import Sizes, TransformerEntry, text, timestep, tokens

_HEADS = {"attention_head_dim": 16, "num_attention_heads": 3}
_TINY_SIZE = Sizes((8, 12), text=5, batch=2)
_FULL_SIZE = Sizes((128, 128), text=512)  # 1024 x 1024 pixels
_FLUX_BLOCKS = ("transformer_blocks", "single_transformer_blocks")
_TWO_KINDS = {"num_layers": 2, "num_single_layers": 2}
_ONE_OF_EACH = {"num_layers": 1, "num_single_layers": 1}
_TINY_FLUX = _HEADS | _TWO_KINDS | {"in_channels": 8, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)}


def _grid(sizes: Sizes, axes: int, patch: int = 2, first: int = 0) -> torch.Tensor:
    """`[L, axes]` integers: `first`, row, column, and zeros for further axes."""
    rows, columns = (extent // patch for extent in sizes.latent)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    place = (torch.full_like(row, first), row, column, torch.zeros_like(row))
    return torch.stack(place[:axes], dim=-1).flatten(0, 1)


def _positions(sizes: Sizes, axes: int, along: tuple[int, ...] = ()) -> torch.Tensor:
    """`[text tokens, axes]` integers: the token's number on the axes `along`, zero on the others."""
    numbers = torch.arange(sizes.text)
    return torch.stack([numbers if axis in along else torch.zeros_like(numbers) for axis in range(axes)], dim=-1)


def _packed(model: Any, sizes: Sizes) -> dict[str, object]:
    """What all of them take."""
    return {
        "hidden_states": tokens(model, sizes),
        "encoder_hidden_states": text(sizes, model.config.joint_attention_dim),
        "timestep": timestep(sizes, 1.0),
    }


def _placed(model: Any, sizes: Sizes) -> dict[str, object]:
    return _packed(model, sizes) | {"img_ids": _grid(sizes, 3), "txt_ids": _positions(sizes, 3)}


def _flux(model: Any, sizes: Sizes) -> Mapping[str, object]:
    pooled = torch.randn(sizes.batch, model.config.pooled_projection_dim)
    return _placed(model, sizes) | {"pooled_projections": pooled, "guidance": timestep(sizes, 8.0)}


def _flux2(model: Any, sizes: Sizes) -> Mapping[str, object]:
    ids = {"img_ids": _grid(sizes, 4), "txt_ids": _positions(sizes, 4, along=(3,))}
    return _packed(model, sizes) | ids | {"guidance": timestep(sizes, 8.0)}


def _flux3(model: Any, sizes: Sizes) -> Mapping[str, object]:
    ids = {"img_ids": _grid(sizes, 4), "txt_ids": _positions(sizes, 4, along=(3,))}
    reference = {"image_cond_hidden_states": tokens(model, sizes), "image_cond_ids": _grid(sizes, 4, first=10)}
    return _packed(model, sizes) | ids | reference


def _longcat(model: Any, sizes: Sizes) -> Mapping[str, object]:
    ids = {"img_ids": _grid(sizes, 3, first=1), "txt_ids": _positions(sizes, 3, along=(1, 2))}
    return _packed(model, sizes) | ids


def _bria(model: Any, sizes: Sizes) -> Mapping[str, object]:
    return _placed(model, sizes) | {"timestep": timestep(sizes)}


def _bria_fibo(model: Any, sizes: Sizes) -> Mapping[str, object]:
    layers = [text(sizes, model.config.text_encoder_dim) for _ in model.caption_projection]
    return _placed(model, sizes) | {"timestep": timestep(sizes), "text_encoder_layers": layers}


def _shapes(sizes: Sizes, patch: int = 2, pictures: int = 1) -> list[list[tuple[int, int, int]]]:
    rows, columns = (extent // patch for extent in sizes.latent)
    return [[(1, rows, columns)] * pictures] * sizes.batch


def _qwen(model: Any, sizes: Sizes) -> Mapping[str, object]:
    return _packed(model, sizes) | {"img_shapes": _shapes(sizes)}


def _qwen_edit(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """The picture and one to edit, whose tokens are modulated as at time 0."""
    both = torch.cat([tokens(model, sizes), tokens(model, sizes)], dim=1)
    return _packed(model, sizes) | {"hidden_states": both, "img_shapes": _shapes(sizes, pictures=2)}


def _qwen21(model: Any, sizes: Sizes) -> Mapping[str, object]:
    slots = math.prod(sizes.latent) // 4  # each stands for four tokens
    return {
        "hidden_states": tokens(model, sizes, patch=1),
        "encoder_hidden_states": text(sizes, model.config.context_in_dim),
        "timestep": timestep(sizes, 1.0),
        "img_shapes": _shapes(sizes, patch=1),
        "img_mask": (torch.arange(sizes.text + slots) >= sizes.text).expand(sizes.batch, -1),
    }


def _krea2(model: Any, sizes: Sizes) -> Mapping[str, object]:
    layers = torch.randn(sizes.batch, sizes.text, model.config.num_text_layers, model.config.text_hidden_dim)
    return {
        "hidden_states": tokens(model, sizes),
        "encoder_hidden_states": layers,
        "timestep": timestep(sizes, 1.0),
        "position_ids": torch.cat([_positions(sizes, 3), _grid(sizes, 3)]),
    }


def _ideogram4(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """Text, then picture, in one sequence; each input covers all of it."""
    places = torch.cat([_positions(sizes, 3, along=(0, 1, 2)), _grid(sizes, 3, first=sizes.text)])
    length, batch = len(places), sizes.batch
    return {
        "hidden_states": torch.randn(batch, length, model.config.in_channels),
        "encoder_hidden_states": torch.randn(batch, length, model.config.llm_features_dim),
        "timestep": timestep(sizes, 1.0),
        "position_ids": places.expand(batch, -1, -1),
        "segment_ids": torch.zeros(batch, length, dtype=torch.long),
        "indicator": torch.where(torch.arange(length) < sizes.text, 3, 2).expand(batch, -1),  # text, picture
    }


def _joyimage_plus(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """Two pictures a sample, in patches."""
    (shape,) = set(_shapes(sizes)[0])
    patches = torch.randn(sizes.batch, 2 * math.prod(shape), model.config.in_channels, *model.config.patch_size)
    return {
        "hidden_states": patches,
        "encoder_hidden_states": text(sizes, model.config.text_dim),
        "timestep": timestep(sizes),
        "shape_list": [[shape, shape]] * sizes.batch,
    }


_TINY_QWEN = _HEADS | {
    "in_channels": 8,
    "out_channels": 2,
    "num_layers": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}

PACKED_TRANSFORMERS: dict[str, TransformerEntry] = {
    "flux-dit": TransformerEntry(
        "FluxTransformer2DModel",
        tiny=_TINY_FLUX | {"pooled_projection_dim": 24, "guidance_embeds": True},
        full=_ONE_OF_EACH | {"guidance_embeds": True},
        inputs=_flux,
        tiny_size=_TINY_SIZE,
        full_size=_FULL_SIZE,
        blocks=_FLUX_BLOCKS,
    ),
    "flux2-dit": TransformerEntry(
        "Flux2Transformer2DModel",
        tiny=_TINY_FLUX | {"axes_dims_rope": (4, 4, 4, 4)},
        full=_ONE_OF_EACH,
        inputs=_flux2,
        tiny_size=_TINY_SIZE,
        full_size=_FULL_SIZE,
        blocks=_FLUX_BLOCKS,
    ),
    "flux3-dit": TransformerEntry(
        "Flux3Transformer2DModel",
        tiny=_TINY_FLUX | {"cond_in_channels": 8, "axes_dims_rope": (4, 4, 4, 4)},
        full=_ONE_OF_EACH,
        inputs=_flux3,
        tiny_size=_TINY_SIZE,
        full_size=_FULL_SIZE,
        blocks=("mode_blocks.image", "mode_blocks.image_cond", "txt_mode_blocks", "single_transformer_blocks"),
    ),
    "chroma-dit": TransformerEntry(
        "ChromaTransformer2DModel",
        tiny=_TINY_FLUX | {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 2},
        full=_ONE_OF_EACH,
        inputs=_placed,
        tiny_size=_TINY_SIZE,
        full_size=_FULL_SIZE,
        blocks=_FLUX_BLOCKS,
    ),
    "longcat-image-dit": TransformerEntry(
        "LongCatImageTransformer2DModel",
        tiny=_TINY_FLUX,
        full=_ONE_OF_EACH,
        inputs=_longcat,
        tiny_size=_TINY_SIZE,
        full_size=_FULL_SIZE,
        blocks=_FLUX_BLOCKS,
    ),
    "ovis-image-dit": TransformerEntry(
        "OvisImageTransformer2DModel",
        tiny=_TINY_FLUX | {"out_channels": 8},
        full=_ONE_OF_EACH,
        inputs=_placed,
        tiny_size=_TINY_SIZE,
        full_size=Sizes((128, 128), text=256),
        blocks=_FLUX_BLOCKS,
    ),
    "bria-dit": TransformerEntry(
        "BriaTransformer2DModel",
        tiny=_TINY_FLUX,
        full=_ONE_OF_EACH,
        inputs=_bria,
        tiny_size=_TINY_SIZE,
        full_size=Sizes((128, 128), text=128),
        blocks=_FLUX_BLOCKS,
    ),
    "bria-fibo-dit": TransformerEntry(
        "BriaFiboTransformer2DModel",
        tiny=_TINY_FLUX | {"text_encoder_dim": 20},
        full=_ONE_OF_EACH,
        inputs=_bria_fibo,
        tiny_size=_TINY_SIZE,
        full_size=Sizes((128, 128), text=1024),
        blocks=_FLUX_BLOCKS,
    ),
    "qwen-image-dit": TransformerEntry(
        "QwenImageTransformer2DModel",
        tiny=_TINY_QWEN,
        full={"num_layers": 1},
        inputs=_qwen,
        tiny_size=_TINY_SIZE,
        full_size=Sizes((166, 166), text=256),  # 1328 x 1328 pixels
        blocks=("transformer_blocks",),
    ),
    # Qwen-Image-Edit-2511: scale, shift and gate of the picture are selected by an index at each token.
    "qwen-image-edit-dit": TransformerEntry(
        "QwenImageTransformer2DModel",
        tiny=_TINY_QWEN | {"zero_cond_t": True},
        full={"num_layers": 1, "zero_cond_t": True},
        inputs=_qwen_edit,
        tiny_size=_TINY_SIZE,
        full_size=_FULL_SIZE,
        blocks=("transformer_blocks",),
    ),
    "qwen-image-2.1-dit": TransformerEntry(
        "QwenImage21Transformer2DModel",
        tiny=_HEADS
        | {"in_channels": 8, "out_channels": 8, "num_layers": 2, "context_in_dim": 32, "axes_dims_rope": (4, 6, 6)},
        full={"num_layers": 1},
        inputs=_qwen21,
        tiny_size=_TINY_SIZE,
        full_size=Sizes((64, 64), text=512),
        blocks=("transformer_blocks",),
    ),
    # The first three blocks and the last are dense, those between are mixtures.
    "nucleus-moe-image-dit": TransformerEntry(
        "NucleusMoEImageTransformer2DModel",
        tiny=_TINY_QWEN | {"num_layers": 6, "num_experts": 4, "moe_intermediate_dim": 24, "capacity_factors": 2.0},
        full={"num_layers": 5},
        inputs=_qwen,
        tiny_size=_TINY_SIZE,
        full_size=_FULL_SIZE,
        blocks=("transformer_blocks",),
    ),
    "krea2-dit": TransformerEntry(
        "Krea2Transformer2DModel",
        tiny={
            "in_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "timestep_embed_dim": 32,
            "text_hidden_dim": 32,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 48,
            "axes_dims_rope": (4, 6, 6),
        },
        full={"num_layers": 1, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1},
        inputs=_krea2,
        tiny_size=_TINY_SIZE,
        full_size=_FULL_SIZE,
        blocks=("transformer_blocks",),
    ),
    "ideogram4-dit": TransformerEntry(
        "Ideogram4Transformer2DModel",
        tiny={
            "in_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "intermediate_size": 96,
            "adaln_dim": 32,
            "llm_features_dim": 40,
            "mrope_section": (4, 2, 2),
        },
        full={"num_layers": 1},
        inputs=_ideogram4,
        tiny_size=_TINY_SIZE,
        full_size=_FULL_SIZE,
        blocks=("layers",),
    ),
    "joyimage-edit-plus-dit": TransformerEntry(
        "JoyImageEditPlusTransformer3DModel",
        tiny={
            "in_channels": 4,
            "hidden_size": 48,
            "num_attention_heads": 3,
            "text_dim": 32,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
        full={"num_layers": 1},
        inputs=_joyimage_plus,
        tiny_size=_TINY_SIZE,
        full_size=_FULL_SIZE,
        blocks=("double_blocks",),
    ),
}
