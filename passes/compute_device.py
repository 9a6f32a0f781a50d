"""Which device a graph is for, as far as the choice of kernels goes: what figures were measured on, or hold for."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pvae.passes.machine import MACHINES, machine_named

# What `--device cuda` means where there is no GPU: the device that the option `machine` names.
_CAPABILITIES = {"h200": "9.0", "h100": "9.0", "a100": "8.0"}


@dataclass(frozen=True)
class Libraries:
    """Versions that the time of a kernel depends on; empty where there is none."""

    torch: str = ""
    triton: str = ""
    cudnn: str = ""

    @classmethod
    def here(cls) -> Libraries:
        try:
            triton = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            triton = ""
        cudnn = torch.backends.cudnn.version()
        return cls(torch.__version__, triton, "" if cudnn is None else str(cudnn))


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
    libraries: Libraries = Libraries()

    @property
    def key(self) -> str:
        """The device and all that its figures depend on."""
        versions = [f"{name} {version}" for name, version in vars(self.libraries).items() if version]
        return ", ".join([part for part in (self.name, self.capability) if part] + versions)

    @property
    def hopper(self) -> bool:
        return self.kind == "cuda" and self.capability == "9.0"

    @classmethod
    def of(cls, device: torch.device, options: Any) -> ComputeDevice:
        """The device itself if it is here, else for `cuda` the one that the option `machine` names."""
        if device.type == "cpu":
            return cls(
                "cpu", f"{_cpu_name()}, {torch.get_num_threads()} threads", libraries=Libraries(torch.__version__)
            )
        if device.type != "cuda":
            return cls(device.type, device.type)
        if torch.cuda.is_available():
            return _gpu(torch.cuda.current_device() if device.index is None else device.index)
        return _named(options.machine)


@functools.cache
def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def _gpu(index: int) -> ComputeDevice:
    found = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    capability = found.gcnArchName.split(":")[0] if hip else f"{found.major}.{found.minor}"
    machine = next((m for name, m in MACHINES.items() if name in found.name.lower()), None)
    copy = None if machine is None else machine.memory
    kind = "hip" if hip else "cuda"
    return ComputeDevice(kind, found.name, capability, found.multi_processor_count, copy, Libraries.here())


def _named(text: str) -> ComputeDevice:
    """A GPU that is not here."""
    if torch.version.hip is not None:
        return ComputeDevice("hip", "an AMD GPU", libraries=Libraries.here())
    machine = machine_named(text)
    name, capability = f"NVIDIA {machine.name.upper()}", _CAPABILITIES[machine.name]
    return ComputeDevice("cuda", name, capability, int(machine.units), machine.memory, Libraries.here())
