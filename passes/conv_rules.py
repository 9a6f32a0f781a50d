"""What is chosen for a convolution where nobody measured it: rules, and the measurements that they come from."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from pvae.kernels import conv3d_unfold as unfold
from pvae.kernels.conv_taps_config import Work, hopper_clocks, hopper_configs, is_hopper
from pvae.passes.compute_device import ComputeDevice
from pvae.passes.conv_problem import ConvProblem, precision
from pvae.passes.ir import ConvNode, fake_mode_of, value
from pvae.passes.machine import Table, interpolate
from pvae.runtime.torch_compat import conv_backend

HALF = (torch.float16, torch.bfloat16)
SLOW_BACKENDS = ("Slow", "Overrideable", "Empty")


@dataclass(frozen=True)
class Rates:
    """What convolutions with kernels of 3x3 and 3x3x3 and stride 1 reach on Hopper, in FLOP/s.

    three, flat   by form in 3-D (kernels of more than one frame) and in 2-D, then by the fewer of the channels, in or out
    few_out       by form for up to 16 output channels, counted as 16, which they cost as much as
    clock         clocks/s that conv_taps reaches by the model of its kernel, `hopper_clocks`
    """

    three: Mapping[str, Table]
    flat: Mapping[str, Table]
    few_out: Mapping[str, float]
    clock: float


# By precision, H200 at its power limit, torch 2.11 with cuDNN 9.19 (docs/measurements.md; tools/bench_conv.py). By the clock
# 27 of 36 convolutions in half precision took what is said here within 7 %; seven of few outputs or small pictures up to a
# third less, two 15 % more. In tf32 ten of 13 within 13 %, three less. There cuDNN's contiguous form was measured nowhere as
# the fastest of the shapes with more than 16 channels.
RATES: dict[str, Rates] = {
    "half": Rates(
        three={
            "native": ((0, 0.0), (16, 64e12), (96, 205e12), (128, 515e12), (192, 443e12), (256, 600e12), (384, 484e12),
                       (512, 640e12)),
            "channels_last": ((0, 0.0), (16, 88e12), (48, 298e12), (96, 267e12), (128, 725e12), (192, 560e12),
                              (256, 735e12), (384, 573e12), (512, 729e12), (768, 693e12)),
            "unfold2d": ((0, 0.0), (16, 85e12), (48, 245e12), (96, 333e12), (128, 490e12), (192, 425e12),
                         (256, 595e12), (384, 600e12), (512, 642e12), (768, 451e12)),
        },
        flat={
            "native": ((0, 0.0), (16, 53e12), (96, 238e12), (128, 310e12), (192, 358e12), (256, 424e12), (384, 475e12),
                       (512, 500e12)),
            "channels_last": ((0, 0.0), (16, 91e12), (96, 459e12), (128, 653e12), (192, 584e12), (256, 675e12),
                              (512, 656e12)),
        },
        few_out={"native": 85e12, "channels_last": 130e12, "unfold2d": 80e12},
        clock=1.45e9,
    ),
    "tf32": Rates(
        three={
            "channels_last": ((0, 0.0), (16, 41e12), (96, 144e12), (128, 343e12), (192, 233e12), (384, 220e12),
                              (512, 416e12)),
            "unfold2d": ((0, 0.0), (16, 56e12), (96, 192e12), (128, 253e12), (192, 237e12), (384, 370e12), (512, 356e12)),
        },
        flat={"channels_last": ((0, 0.0), (16, 41e12), (96, 190e12), (128, 348e12), (192, 288e12), (256, 378e12))},
        few_out={"channels_last": 55e12, "unfold2d": 27e12},
        clock=1.6e9,
    ),
}  # fmt: skip
FEW_OUT = 16
FEWEST_CHANNELS = 16  # in; below that nothing was measured
START_MS = 0.004  # of a kernel: what 16 channels in, of whose arithmetic nothing is seen, take the longest part of
BLOCK_ROWS, BLOCK_COLUMNS = 128, 192
UNFOLD_FLOPS = 16e6  # on a CPU


def no_gain(weight: torch.Tensor) -> str | None:
    """Why channels_last is not chosen by itself for a convolution with this weight, or None.

    On CUDA in half precision it is the faster layout for every decoder measured (Wan 1744 -> 1028 ms, Qwen-Image 53.9 ->
    38.7). float32 only with rates of Hopper for it. What every rank of a sharded model knows alike: device and dtype.
    """
    if weight.device.type != "cuda":
        return f"no gain measured on {weight.device.type}"
    if weight.dtype in HALF or (precision(weight.dtype) in RATES and is_hopper(weight.device)):
        return None
    return f"no gain measured for {weight.dtype}"


def unfold_pays(conv: ConvNode) -> str | None:
    """None if the unfold is a faster form of `conv` than ATen's conv3d by what was measured, else why not.

    ROCm: always (MIOpen's conv3d; SGLang measured +3.6 % end to end, and an order of magnitude on single layers).
    CUDA, half precision: between 64 and 128 input channels, for which cuDNN has no good conv3d kernel. H200, TFLOP/s of
    conv3d channels_last_3d against the unfold: C=96 237 / 324, C=192 538 / 440, C=384 588 / 600 at two frames and
    395 / 346 at one; 96 -> 3 channels 23 / 16. At C=128 whole decoders lose by it (LTX-2 44.8 -> 59.0 ms, CogVideoX 170
    -> 190, 2026-11-21), so it stays with cuDNN.
    CPU: where ATen has no fast conv3d but a fast conv2d. EPYC, fp32, ms: C=16 18.3 / 0.8, C=64 22.4 / 2.6; where oneDNN
    takes the 3-D form (C >= 96, bf16) both are equal. Not below 16 MFLOP: the op takes 0.2 ms before it computes, and
    conv3d (one thread) is done sooner (0.88 MFLOP 0.07 / 0.29, 14.2 0.56 / 0.56, 42.5 2.92 / 1.30).
    """
    x, weight = value(conv.x), value(conv.weight)
    if x.device.type == "cuda":
        if torch.version.hip is not None:
            return None
        if x.dtype not in HALF:
            return f"cuDNN's conv3d is kept for {x.dtype}"
        if not 64 < conv.in_channels < 128 or conv.out_channels < 32:
            return (
                f"{conv.in_channels} -> {conv.out_channels} channels: cuDNN's conv3d is as fast (the unfold pays at 96)"
            )
        return None
    if x.device.type == "cpu":
        padding = [max(pair) for pair in conv.padding]
        native = conv_backend(x, weight, None, conv.stride, padding, conv.dilation, conv.groups)
        if not native.startswith(SLOW_BACKENDS):
            return f"ATen has a fast conv3d for this shape ({native})"
        with fake_mode_of(conv.node.graph) or nullcontext():
            frame, flat = x[:, :, 0].repeat(1, conv.kernel[0], 1, 1), unfold.unfold_weight(weight, conv.groups)
        two_d = conv_backend(frame, flat, None, conv.stride[1:], padding[1:], conv.dilation[1:], conv.groups)
        if two_d.startswith(SLOW_BACKENDS):
            return f"ATen has no fast conv2d for this shape either ({two_d})"
        if conv.flops is not None and conv.flops < UNFOLD_FLOPS:
            return f"{conv.flops / 1e6:.2g} MFLOP: conv3d is done sooner than the unfold has begun"
        return None
    return f"no measurement for device type {x.device.type!r}"


def rates(problem: ConvProblem, device: ComputeDevice) -> dict[str, float]:
    """ms of each form that has a rate: on Hopper GPUs, for 3x3 kernels of up to three frames with stride 1.

    A convolution of few tiles leaves multiprocessors idle in its last wave, whichever form it takes.
    """
    ones = (1,) * problem.ndim
    frames = problem.kernel[0] if problem.ndim == 3 else 1
    plain = problem.kernel[-2:] == (3, 3) and frames <= 3 and problem.stride == problem.dilation == ones
    known = RATES.get("half" if problem.precision in ("bfloat16", "float16") else problem.precision)
    if not device.hopper or known is None or not plain or problem.groups != 1 or problem.channels < FEWEST_CHANNELS:
        return {}
    few = problem.out_channels <= FEW_OUT
    fewer = FEW_OUT if few else min(problem.channels, problem.out_channels)
    found = dict[str, float]()
    flops = problem.flops * max(1.0, FEW_OUT / problem.out_channels)
    for form, table in (known.three if frames > 1 else known.flat).items():
        rate = known.few_out[form] if few and form in known.few_out else interpolate(table, fewer)
        found[form] = START_MS + 1e3 * flops / (rate * busy(problem, device.units))
    if problem.ndim == 3 and frames == 1:
        found = {"frames": found["channels_last"]}
    clocks = taps_clocks(problem, device.units)
    if clocks is not None:
        least = 0.0 if device.copy is None else problem.bytes / device.copy
        found["taps"] = START_MS + 1e3 * max(clocks / known.clock, least)
    return found


def busy(problem: ConvProblem, units: int) -> float:
    """The share of the multiprocessors' time that tiles of 128 rows and up to 192 columns keep them busy."""
    tiles = -(-problem.rows // BLOCK_ROWS) * -(-problem.out_channels // BLOCK_COLUMNS)
    waves = -(-tiles // units)
    return tiles / (waves * units) if tiles else 1.0


def taps_clocks(problem: ConvProblem, units: int) -> float | None:
    """Clocks of conv_taps by the model of its Hopper kernel; None where that kernel does not take the convolution."""
    dtype = getattr(torch, "float32" if problem.precision == "tf32" else problem.precision)
    strides, dilations = (problem.stride[-2], problem.stride[-1]), (problem.dilation[-2], problem.dilation[-1])
    if max(strides) > 2 or 1 not in dilations or problem.groups != 1 or problem.channels * dtype.itemsize % 16:
        return None
    *time, height, width = problem.out_sizes
    kernel_t = problem.kernel[0] if problem.ndim == 3 else 1
    kernel = (kernel_t, problem.kernel[-2], problem.kernel[-1])
    frames = problem.batch * math.prod(time)
    sizes = (problem.channels, problem.out_channels, kernel, frames, height, width)
    return _clocks(Work(*sizes, dtype, units, dilations, strides))


@functools.lru_cache(maxsize=4096)
def _clocks(work: Work) -> float | None:
    return min((hopper_clocks(work, config) for config in hopper_configs(work)), default=None)
