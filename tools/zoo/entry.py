"""What the zoo's table says of a model, and how a size in pixels becomes input shapes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from pvae.tools.zoo.case import CALLS, Call


class Unsupported(NotImplementedError):
    """Torch itself cannot run this part in this dtype on this device."""


@dataclass(frozen=True)
class Preset:
    """A configuration of a class (what differs from its defaults) and a size in pixels to run it at.

    `size` is (frames, height, width), or (height, width) for one picture.
    """

    config: Mapping[str, object]
    size: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A diffusers autoencoder.

    `spatial` and `temporal` are pixels a latent; `temporal` is None for 4-D (picture) models. `first_alone`: the first
    latent frame stands for one frame and each later one for `temporal` (frames = temporal * k + 1), otherwise every
    latent frame stands for `temporal` frames. `channels` are the pixels'. `decode_kwargs` are numbers that decode takes
    as tensors of one element. `gain` multiplies the convolutions' initial weights: torch's default takes a factor of
    sqrt(6) from a signal at each ReLU convolution, which a model without norms never gives back. `cpu_gaps` names, by
    part and dtype, the op that torch lacks on the CPU.
    """

    cls: str
    spatial: int
    tiny: Preset
    full: Preset
    temporal: int | None = None
    first_alone: bool = True
    channels: int = 3
    decode_kwargs: Mapping[str, float] = field(default_factory=dict)
    calls: Mapping[str, Call] = field(default_factory=lambda: CALLS)
    gain: float = 1.0
    cpu_gaps: Mapping[tuple[str, torch.dtype], str] = field(default_factory=dict)

    def preset(self, name: str) -> Preset:
        return {"tiny": self.tiny, "full": self.full}[name]

    def extents(self, name: str, size: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The extents of pixels and of latents, without batch and channels, for `size` pixels.

        Two numbers for a video model mean one frame. Raises ValueError that names the sizes which fit.
        """
        pixels = (1, *size) if self.temporal is not None and len(size) == 2 else size
        fits = len(pixels) == (2 if self.temporal is None else 3) and min(pixels) > 0
        if not fits or pixels[-1] % self.spatial or pixels[-2] % self.spatial:
            raise self._misfit(name, size)
        latents = (pixels[-2] // self.spatial, pixels[-1] // self.spatial)
        if self.temporal is None:
            return pixels, latents
        frames = -(-pixels[0] // self.temporal)
        if pixels[0] != self._frames(frames):
            raise self._misfit(name, size)
        return pixels, (frames, *latents)

    def _frames(self, latent: int) -> int:
        """Frames that `latent` latent frames stand for."""
        assert self.temporal is not None
        return self.temporal * (latent - 1) + 1 if self.first_alone else self.temporal * latent

    def _misfit(self, name: str, size: tuple[int, ...]) -> ValueError:
        valid = f"height and width in multiples of {self.spatial}"
        if self.temporal is None:
            valid = f"(height, width) with {valid}"
        else:
            rule = f"{self.temporal}k+1" if self.first_alone else f"{self.temporal}k"
            counts = ", ".join(str(self._frames(latent)) for latent in (1, 2, 3))
            one = " or (height, width) for one frame" if self.first_alone else ""
            valid = f"(frames, height, width){one}, with {rule} frames ({counts}, ...) and {valid}"
        return ValueError(f"size {size} does not fit {name}: it takes {valid}")
