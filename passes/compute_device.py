"""Which device a graph is for, as far as the choice of kernels goes: what figures were measured on, or hold for."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pvae.passes.machine import MACHINES, Machine, machine_named

# What `--device cuda` means where there is no GPU: the device that the option `machine` names.
_CAPABILITIES = {"h200": "9.0", "h100": "9.0", "a100": "8.0"}


@dataclass(frozen=True)
class ComputeDevice:
    """A device and the libraries that run on it.

    kind         cpu, cuda, hip, or torch's name of another
    capability   `9.0` of an NVIDIA GPU, `gfx942` of an AMD one, empty for others
    units        multiprocessors
    copy         bytes/s of a large copy, read and written together; None where nobody knows
    """

    kind: str
    name: str
    capability: str = ""
    units: int = 1
    copy: float | None = None
    torch: str = ""
    triton: str = ""
    cudnn: str = ""

    @property
    def key(self) -> str:
        """The device and all that its figures depend on."""
        parts = [self.name, self.capability, f"torch {self.torch}", f"triton {self.triton}", f"cudnn {self.cudnn}"]
        return ", ".join(part for part in parts if part and not part.endswith(" "))

    @property
    def hopper(self) -> bool:
        return self.kind == "cuda" and self.capability == "9.0"

    @classmethod
    def of(cls, device: torch.device, options: Any) -> ComputeDevice:
        """The device itself if it is here, else for `cuda` the one that the option `machine` names."""
        if device.type == "cpu":
            return _cpu(torch.get_num_threads())
        if device.type != "cuda":
            return cls(device.type, device.type)
        if torch.cuda.is_available():
            return _gpu(torch.cuda.current_device() if device.index is None else device.index)
        return _named(options.machine)


def _versions() -> dict[str, str]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    cudnn = torch.backends.cudnn.version()
    return {"torch": torch.__version__, "triton": triton, "cudnn": "" if cudnn is None else str(cudnn)}


def _machine_like(name: str) -> Machine | None:
    """The preset of the machine with that device name: `NVIDIA H200` is h200."""
    return next((m for key, m in MACHINES.items() if key in name.lower()), None)


@functools.cache
def _cpu(threads: int) -> ComputeDevice:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if (info.exists())
        else []
    )
    name = names[0] if names else platform.processor() or platform.machine()
    return ComputeDevice("cpu", f"{name}, {threads} threads", "", threads, None, torch.__version__)


@functools.cache
def _gpu(index: int) -> ComputeDevice:
    found = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    capability = found.gcnArchName.split(":")[0] if hip else f"{found.major}.{found.minor}"
    machine = None if hip else _machine_like(found.name)
    copy = None if machine is None else machine.memory
    return ComputeDevice(
        "hip" if hip else "cuda", found.name, capability, found.multi_processor_count, copy, **_versions()
    )


def _named(text: str) -> ComputeDevice:
    if torch.version.hip is not None:
        return ComputeDevice("hip", "an AMD GPU", **_versions())
    machine = machine_named(text)
    name = f"NVIDIA {machine.name.upper()}"
    return ComputeDevice("cuda", name, _CAPABILITIES[machine.name], int(machine.units), machine.memory, **_versions())
