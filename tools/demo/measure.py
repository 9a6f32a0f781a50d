"""One operation (encode or decode) on both sides of the demo: times, errors against float64, reconstructions."""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pvae.tools.demo.quality import psnr, relative_error

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One line of the demo's table. Times are medians in milliseconds; errors are relative L2 against float64."""

    subject: str  # "photograph" or "clip"
    operation: str  # "encode" or "decode"
    eager_ms: float
    pvae_ms: float
    speedup: float
    eager_error: float
    pvae_error: float
    compile_s: float  # the compiled side's first call less a later one
    psnr_eager_db: float | None  # of the reconstruction against the input; decode only
    psnr_pvae_db: float | None


@dataclass(frozen=True)
class Sides:
    """The same weights three times."""

    eager: AutoencoderKLWan
    compiled: AutoencoderKLWan
    exact: AutoencoderKLWan  # float64


def exact_copy(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The same weights in float64. diffusers' WanUpsample goes through float32 whatever the dtype; here it does not."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample

    exact = torch.nn.Module.double(copy.deepcopy(vae))
    for module in exact.modules():
        if isinstance(module, torch.nn.Sequential) and isinstance(module[0], WanUpsample):
            module[0] = torch.nn.Upsample(scale_factor=module[0].scale_factor, mode=module[0].mode)
    return exact


def device_name(device: str) -> str:
    """What the figures were measured on: the GPU's name, or the CPU's kind and threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def encode(vae: AutoencoderKLWan, pixels: torch.Tensor) -> torch.Tensor:
    """The latent mean, `[N,z,t,h,w]`."""
    return vae.encode(pixels).latent_dist.mode()


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Pixels, `[N,3,T,H,W]`."""
    return vae.decode(latents).sample


def _call(
    run: Callable[[AutoencoderKLWan, torch.Tensor], torch.Tensor], vae: AutoencoderKLWan, x: torch.Tensor
) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run(vae, x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    sides: Sides, subject: str, pixels: torch.Tensor, repeats: int, say: Say
) -> tuple[list[Row], list[torch.Tensor]]:
    """Encodes `pixels` `[1,3,T,H,W]` and decodes the eager side's latents, on all three sides.

    Returns a row for each operation and the reconstructions [eager, pvae]. The two sides' timed calls alternate, so
    that whatever else the machine does falls on both. `say` is told each stage before it begins (four an operation).
    """
    rows, value = [], pixels
    for operation in (encode, decode):
        name = f"{subject} {operation.__name__}"
        say(f"{name}: eager")
        theirs = operation(sides.eager, value)
        say(f"{name}: compiling")
        first = _call(operation, sides.compiled, value)
        say(f"{name}: timing")
        ours = operation(sides.compiled, value)
        eager_times, pvae_times = [], []
        for _ in range(repeats):
            eager_times.append(_call(operation, sides.eager, value))
            pvae_times.append(_call(operation, sides.compiled, value))
        say(f"{name}: float64")
        truth = operation(sides.exact, value.double())
        eager_s, pvae_s = statistics.median(eager_times), statistics.median(pvae_times)
        decoded = operation is decode
        rows.append(
            Row(
                subject=subject,
                operation=operation.__name__,
                eager_ms=1e3 * eager_s,
                pvae_ms=1e3 * pvae_s,
                speedup=eager_s / pvae_s,
                eager_error=relative_error(theirs, truth),
                pvae_error=relative_error(ours, truth),
                compile_s=max(0.0, first - pvae_s),
                psnr_eager_db=psnr(theirs, pixels) if decoded else None,
                psnr_pvae_db=psnr(ours, pixels) if decoded else None,
            )
        )
        value = theirs
    return rows, [theirs, ours]
