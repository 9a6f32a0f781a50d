"""An `Entry` for a diffusers autoencoder that the zoo's table does not have, read off its default configuration."""

import inspect
from typing import Any

import torch
from torch import nn

from pvae.tools.zoo.entry import Entry, Preset

_LATENT_CHANNELS = ("latent_channels", "z_dim", "z_channels")


def latent_channels(model: Any) -> int:
    """Channels of the latents, by any of the names that diffusers' configurations use."""
    found = [model.config[key] for key in _LATENT_CHANNELS if isinstance(model.config.get(key), int)]
    if not found:
        raise _missing(type(model), " or ".join(_LATENT_CHANNELS) + " in its configuration")
    return found[0]


def derive_entry(cls: Any) -> Entry:
    """The entry of a class with `encode` and `decode`, checked by running both on the meta device.

    Raises ValueError that says what is missing, or what goes wrong with the inputs derived.
    """
    if needed := _required(cls.__init__):
        raise _missing(cls, f"defaults of its constructor's {needed}")
    with torch.device("meta"):
        model = cls()
    if not (hasattr(model, "encoder") and hasattr(model, "decoder")):
        raise _missing(cls, "submodules named encoder and decoder")
    for call in (cls.decode, cls.encode):
        if needed := _required(call, given=1):
            raise _missing(cls, f"values for {needed} of {call.__name__}")
    spatial = _ratio(model, "spatial_compression_ratio")
    if spatial is None and "block_out_channels" in model.config:
        spatial = 2 ** (len(model.config.block_out_channels) - 1)  # as diffusers' pipelines do
    if spatial is None:
        raise _missing(cls, "spatial_compression_ratio or block_out_channels")
    first = next((m for m in model.decoder.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    if first is None:
        raise _missing(cls, "a convolution in its decoder, to tell whether it takes pictures or video")
    temporal = _ratio(model, "temporal_compression_ratio") if isinstance(first, nn.Conv3d) else None
    if isinstance(first, nn.Conv3d) and temporal is None:
        raise _missing(cls, "temporal_compression_ratio")
    frames = () if temporal is None else (2 * temporal + 1,)
    entry = Entry(
        cls.__name__,
        spatial=spatial,
        temporal=temporal,
        channels=model.config.in_channels,
        tiny=Preset({}, (*frames, 4 * spatial, 6 * spatial)),
        full=Preset({}, (*frames, 64 * spatial, 64 * spatial)),
    )
    _check_runs(entry, model.eval())
    return entry


def _required(function: Any, given: int = 0) -> str:
    """Names of the arguments without a default, after self and the `given` first ones."""
    parameters = list(inspect.signature(function).parameters.values())[1 + given :]
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return ", ".join(p.name for p in parameters if p.default is p.empty and p.kind not in optional)


def _ratio(model: Any, name: str) -> int | None:
    value = getattr(model, name, None) or model.config.get(name)
    return None if value is None else int(value)


def _check_runs(entry: Entry, model: Any) -> None:
    pixels, latents = entry.extents(entry.cls, entry.tiny.size)
    shapes = {"decode": (latent_channels(model), *latents), "encode": (entry.channels, *pixels)}
    for part, wanted in (("decode", pixels), ("encode", latents)):
        shape = (1, *shapes[part])
        try:
            with torch.no_grad():
                got = tuple(entry.calls[part](model, (torch.empty(shape, device="meta"),), {}).shape[2:])
        except Exception as error:  # whatever a foreign model raises is the answer to "do these inputs fit"
            raise _missing(type(model), f"inputs that fit; {part} of {shape} fails with {error}") from error
        if got != wanted:
            raise _missing(type(model), f"inputs that fit; {part} of {shape} gives {got} where {wanted} was expected")


def _missing(cls: type, what: str) -> ValueError:
    return ValueError(
        f"no inputs can be derived for diffusers:{cls.__name__}: missing {what}; give a package.module:factory for it"
    )
