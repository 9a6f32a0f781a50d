"""What the video transformers of the zoo share: sizes, and the pieces that their inputs are made of."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pvae.tools.zoo.case import Call, forward
from pvae.tools.zoo.transformer import Inputs, Sizes, TransformerEntry, latents, text, timestep

HEADS: dict[str, object] = {"num_attention_heads": 4, "attention_head_dim": 12}
THREE_HEADS: dict[str, object] = {"num_attention_heads": 3, "attention_head_dim": 16}
TINY_SIZE = Sizes((3, 4, 6), text=5, batch=2)
FULL_SIZE = Sizes((21, 60, 104), text=512)  # 81 frames of 480 x 832


def video(channels: int, sizes: Sizes, frames: int | None = None) -> torch.Tensor:
    """`[B, channels, T, H, W]`, of `frames` frames if given."""
    first, *rest = sizes.latent
    return torch.randn(sizes.batch, channels, first if frames is None else frames, *rest)


def mask(sizes: Sizes, length: int | None = None) -> torch.Tensor:
    """`[B, text tokens]` of bool, the last one padding."""
    length = sizes.text if length is None else length
    return (torch.arange(length) < length - 1).expand(sizes.batch, -1)


def many(sizes: Sizes, count: int) -> int:
    """`count`, but 7 beside a short text, which is a tiny case."""
    return count if sizes.text > 50 else 7


def rotary(extents: tuple[int, ...], channels: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[L, sum(channels)]` of rotary angles, `channels[i]` of them for the place on axis i."""
    axes = torch.meshgrid(*(torch.arange(extent, dtype=torch.float32) for extent in extents), indexing="ij")
    rates = [10000 ** -(torch.arange(0, count, 2) / count) for count in channels]
    angles = torch.cat([axis.reshape(-1, 1) * rate for axis, rate in zip(axes, rates, strict=True)], dim=-1)
    angles = angles.repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def combined(*parts: Inputs) -> Inputs:
    """What all of `parts` give, a later one in place of an earlier."""

    def inputs(model: Any, sizes: Sizes) -> Mapping[str, object]:
        taken: dict[str, object] = {}
        for part in parts:
            taken |= part(model, sizes)
        return taken

    return inputs


def common(text_channels: str, scale: float = 1000.0) -> Inputs:
    """Latents, a text of the width that the configuration calls `text_channels` and a time up to `scale`."""
    return lambda model, sizes: {
        "hidden_states": latents(model, sizes),
        "encoder_hidden_states": text(sizes, model.config[text_channels]),
        "timestep": timestep(sizes, scale),
    }


def masked(model: Any, sizes: Sizes) -> Mapping[str, object]:
    return {"encoder_attention_mask": mask(sizes)}


def cast_for(path: str) -> Inputs:
    """No inputs: what the submodule `path` is given takes the dtype of its weights.

    It is the time's sines, which the class makes in float32 and gives to weights that diffusers keeps in float32 when
    it loads them (Kandinsky), or casts for half precision but not for double (Motif).
    """

    def inputs(model: Any, sizes: Sizes) -> Mapping[str, object]:
        def cast(module: nn.Linear, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            return (args[0].to(module.weight.dtype),)

        model.get_submodule(path).register_forward_pre_hook(cast)
        return {}

    return inputs


def with_sound(model: Any, inputs: Sequence[torch.Tensor], kwargs: Mapping[str, object]) -> torch.Tensor:
    """The picture and the sound, `[B, numbers of both]`."""
    return torch.cat([part.flatten(1) for part in model(*inputs, **kwargs, return_dict=False)], dim=1)


def known_first_frame(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """A time for each token, 0 in the first frame, as Wan's pipelines make with `expand_timesteps`."""
    frame = sizes.latent[1] * sizes.latent[2] // 4
    known = torch.arange(sizes.latent[0] * frame) < frame
    return {"timestep": timestep(sizes)[:, None].where(~known, 0.0)}


def entry(
    cls: str,
    tiny: Mapping[str, object],
    full: Mapping[str, object],
    inputs: Inputs,
    *blocks: str,
    full_size: Sizes = FULL_SIZE,
    tiny_size: Sizes = TINY_SIZE,
    call: Call = forward,
) -> TransformerEntry:
    return TransformerEntry(cls, tiny, full, inputs, tiny_size, full_size, blocks or ("transformer_blocks",), call)
