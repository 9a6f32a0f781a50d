"""What is chosen for a convolution where nobody measured it: rules, and the measurements that they come from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch

from pvae.kernels import conv3d_unfold as unfold
from pvae.passes.compute_device import ComputeDevice
from pvae.passes.conv_problem import ConvProblem
from pvae.passes.ir import ConvNode, fake_mode_of, value
from pvae.passes.machine import Table, interpolate
from pvae.runtime.torch_compat import conv_backend

HALF = (torch.float16, torch.bfloat16)
SLOW_BACKENDS = ("Slow", "Overrideable", "Empty")

# H200, half precision, 3x3 and 3x3x3 kernels of stride 1, large pictures: FLOP/s by the fewer of the channels, in or out.
# cuDNN's forms are of torch 2.11 with cuDNN 9.19; C = 128 in 3-D from whole decodes of LTX-2 and CogVideoX; `taps` from
# the bench of conv_taps (docs/measurements.md).
_RATES_3D: Mapping[str, Table] = {
    "native": ((0, 0.0), (96, 207e12), (192, 442e12), (384, 504e12)),
    "channels_last": ((0, 0.0), (96, 256e12), (128, 471e12), (192, 538e12), (384, 579e12)),
    "unfold2d": ((0, 0.0), (96, 330e12)),
    "taps": ((0, 0.0), (96, 744e12), (192, 769e12), (384, 690e12)),
}
_RATES_2D: Mapping[str, Table] = {
    "channels_last": ((0, 0.0), (96, 300e12), (128, 391e12), (256, 533e12), (512, 642e12)),
    "taps": ((0, 0.0), (96, 640e12), (128, 727e12), (256, 764e12), (512, 800e12)),
}
# Of up to 16 output channels, which cost as much as 16: FLOP/s as if there were 16 (96 -> 3 and 128 -> 3 channels).
FEW_OUT = 16
_RATES_FEW_OUT: Mapping[str, float] = {"channels_last": 117e12, "taps": 250e12}
FEWEST_CHANNELS = 64  # in; below that nothing was measured for `taps`
BLOCK_ROWS, BLOCK_COLUMNS = 128, 192


def no_gain(weight: torch.Tensor) -> str | None:
    """Why channels_last is not chosen by itself for a convolution with this weight, or None.

    On CUDA in half precision it is the faster layout for every decoder measured (Wan 1744 -> 1028 ms, Qwen-Image 53.9 ->
    38.7). What every rank of a sharded model knows alike: the type of device and dtype.
    """
    if weight.device.type != "cuda":
        return f"no gain measured on {weight.device.type}"
    if weight.dtype not in HALF:
        return f"no gain measured for {weight.dtype}"
    return None


def unfold_pays(conv: ConvNode) -> str | None:
    """None if the unfold is a faster form of `conv` than ATen's conv3d by what was measured, else why not.

    ROCm: always (MIOpen's conv3d; SGLang measured +3.6 % end to end, and an order of magnitude on single layers).
    CUDA, half precision: between 64 and 128 input channels, for which cuDNN has no good conv3d kernel. H200, TFLOP/s of
    conv3d channels_last_3d against the unfold: C=96 237 / 324, C=192 538 / 440, C=384 588 / 600 at two frames and
    395 / 346 at one; 96 -> 3 channels 23 / 16. At C=128 whole decoders lose by it (LTX-2 44.8 -> 59.0 ms, CogVideoX 170
    -> 190, 2026-11-21), so it stays with cuDNN.
    CPU: where ATen has no fast conv3d but a fast conv2d. EPYC, fp32, ms: C=16 18.3 / 0.8, C=64 22.4 / 2.6; where oneDNN
    takes the 3-D form (C >= 96, bf16) both are equal.
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
        return None
    return f"no measurement for device type {x.device.type!r}"


def rates(problem: ConvProblem, device: ComputeDevice) -> dict[str, float]:
    """ms of each form that has a rate: on Hopper GPUs in half precision, for 3x3 kernels of up to three frames, stride 1.

    A convolution of few tiles leaves multiprocessors idle in its last wave, whichever form it takes.
    """
    ones = (1,) * problem.ndim
    frames = problem.kernel[0] if problem.ndim == 3 else 1
    plain = problem.kernel[-2:] == (3, 3) and frames <= 3 and problem.stride == problem.dilation == ones
    if not device.hopper or problem.precision not in ("bfloat16", "float16") or not plain or problem.groups != 1:
        return {}
    few = problem.out_channels <= FEW_OUT
    fewer, found = min(problem.channels, problem.out_channels), dict[str, float]()
    for form, table in (_RATES_3D if frames > 1 else _RATES_2D).items():
        if problem.channels < FEWEST_CHANNELS and (few or form == "taps"):
            continue
        name = "frames" if form == "channels_last" and problem.ndim == 3 and frames == 1 else form
        if not few:
            found[name] = 1e3 * problem.flops / (interpolate(table, fewer) * busy(problem, device.units))
        elif form in _RATES_FEW_OUT:
            found[name] = 1e3 * problem.flops * FEW_OUT / problem.out_channels / _RATES_FEW_OUT[form]
    return found


def busy(problem: ConvProblem, units: int) -> float:
    """The share of the multiprocessors' time that tiles of 128 rows and up to 192 columns keep them busy."""
    tiles = -(-problem.rows // BLOCK_ROWS) * -(-problem.out_channels // BLOCK_COLUMNS)
    waves = -(-tiles // units)
    return tiles / (waves * units) if tiles else 1.0
