"""Convolutions on a GPU that need not be there, and what the policy chooses for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pvae.options import parse_options
from pvae.passes.compute_device import ComputeDevice
from pvae.passes.conv_policy import FormChoice, decide
from pvae.passes.conv_problem import ConvProblem
from pvae.passes.rule import Context
from pvae.passes.tuning_store import DeviceTable, Measured, merge
from pvae.runtime.torch_compat import new_fake_mode
from pvae.testing import capture

NO_STORE = {"tuning_store": "off"}
X32, W32 = (1, 32, 2, 16, 16), (32, 32, 3, 3, 3)
TIMES = {"native": 2.0, "channels_last": 1.0, "unfold2d": 3.0, "taps": 4.0}


def on_gpu(*sizes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Tensors on a GPU that need not be there."""
    with new_fake_mode():
        return [torch.empty(*s, device="cuda", dtype=dtype) for s in sizes]


def choices(function: Any, *args: Tensor, **options: Any) -> list[FormChoice]:
    context = Context(parse_options({**NO_STORE, **options}, {}))
    return [choice for _, choice in decide(capture(function, *args).gm.graph, context).values()]


def conv(x: Tensor, w: Tensor) -> Tensor:
    return F.conv3d(x, w, padding=1) if x.dim() == 5 else F.conv2d(x, w, padding=1)


def measured(path: Path, device: str, times: dict[str, dict[str, float]], copy: float = 1e13) -> str:
    """A tuning store of this device with these times; the option's value."""
    table = {ConvProblem.parse(p): {f: Measured(ms) for f, ms in forms.items()} for p, forms in times.items()}
    merge(path, DeviceTable.of(ComputeDevice.of(torch.device(device), parse_options({}, {})), copy, table))
    return str(path)
