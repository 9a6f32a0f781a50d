"""Measured times of convolutions, on disk: what `pvae tune` writes and the policy reads.

One JSON file, by device with its libraries' versions, then by convolution (`ConvProblem`), then by form:

    {"format": 1, "devices": {"NVIDIA H200, 9.0, torch 2.11.0, ...": {
        "name": "NVIDIA H200", "capability": "9.0", "units": 132, "copy": 4.26e12,
        "convolutions": {"bfloat16 1x96x4x480x832 > 96 kernel 3x3x3 ...": {
            "channels_last": {"ms": 3.05}, "taps": {"ms": 1.46, "config": [16, 16, 64, 32, 32, 4, 4]},
            "unfold2d": {"why_not": "..."}}}}}}

A file is read whole and replaced whole, by a rename, with a lock while it is changed: several ranks may write at once, and
a reader never sees half of one. The tables that pvae brings (`conv_table_*.json`) are such files. What a file says can
change which graph is made, never what is made of a graph, so caches of compiled code need not know it.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pvae.passes.compute_device import ComputeDevice
from pvae.passes.conv_problem import ConvProblem

FORMAT = 1
OFF = "off"  # of the option `tuning_store`: none is read
SHIPPED = Path(__file__).parent


class TuningStoreError(ValueError):
    """A tuning store that cannot be read; the message names the file and says what is wrong."""


@dataclass(frozen=True)
class Measured:
    """One form of one convolution: its time in ms with the kernel's config, or why it has none."""

    ms: float | None
    why_not: str | None = None
    config: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        if self.ms is None:
            return {"why_not": self.why_not}
        return {"ms": self.ms, "config": list(self.config)} if self.config else {"ms": self.ms}


Forms = Mapping[str, Measured]


@dataclass(frozen=True)
class DeviceTable:
    """Everything measured on one device with one set of versions. `copy` is bytes/s, read and written together."""

    key: str
    name: str
    capability: str
    units: int
    copy: float
    convolutions: Mapping[ConvProblem, Forms] = field(default_factory=dict)

    @classmethod
    def of(cls, device: ComputeDevice, copy: float, convolutions: Mapping[ConvProblem, Forms]) -> DeviceTable:
        return cls(device.key, device.name, device.capability, device.units, copy, convolutions)

    def to_text(self) -> str:
        """As JSON, a convolution a line."""
        facts = {"name": self.name, "capability": self.capability, "units": self.units, "copy": self.copy}
        lines = sorted(
            f"{json.dumps(str(problem))}: {json.dumps({name: form.to_json() for name, form in forms.items()})}"
            for problem, forms in self.convolutions.items()
        )
        return json.dumps(facts)[:-1] + ', "convolutions": {\n' + ",\n".join(lines) + "\n}}"


def default_path() -> Path:
    """`$XDG_CACHE_HOME/pvae/tuning.json`, or `~/.cache/pvae/tuning.json`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "pvae" / "tuning.json"


def store_path(option: str) -> Path | None:
    """The file that the option `tuning_store` means; None: no store is read."""
    if option == OFF:
        return None
    return Path(option).expanduser() if option else default_path()


def read(path: Path) -> Mapping[str, DeviceTable]:
    """The tables of a file by device key; none if there is no file. Raises TuningStoreError."""
    try:
        now = path.stat()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise TuningStoreError(f"the tuning store {path} cannot be read: {error.strerror}") from error
    return _read(path, now.st_mtime_ns, now.st_size, now.st_ino)


@functools.lru_cache(maxsize=8)
def _read(path: Path, changed: int, size: int, inode: int) -> Mapping[str, DeviceTable]:
    """As long as the file stays what it was it is read once."""
    try:
        return _tables(json.loads(path.read_text()))
    except OSError as error:
        raise TuningStoreError(f"the tuning store {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise TuningStoreError(
            f"the tuning store {path} is damaged: {what}; delete it, or name another by the option tuning_store "
            f"(tuning_store={OFF} reads none)"
        ) from error


def _tables(data: Any) -> dict[str, DeviceTable]:
    if data["format"] != FORMAT:
        raise ValueError(f"it is of format {data['format']}, this pvae reads {FORMAT}")
    return {str(key): _table(str(key), table) for key, table in data["devices"].items()}


def _table(key: str, table: Any) -> DeviceTable:
    found = {
        ConvProblem.parse(text): {str(name): _measured(form) for name, form in forms.items()}
        for text, forms in table["convolutions"].items()
    }
    return DeviceTable(
        key, str(table["name"]), str(table["capability"]), int(table["units"]), _positive(table["copy"]), found
    )


def _measured(form: Any) -> Measured:
    if "why_not" in form:
        return Measured(None, str(form["why_not"]))
    return Measured(_positive(form["ms"]), None, tuple(int(n) for n in form.get("config", ())))


def _positive(number: Any) -> float:
    if not isinstance(number, (int, float)) or not 0 < number < float("inf"):
        raise ValueError(f"{number!r} is no positive number")
    return float(number)


def merge(path: Path, new: DeviceTable) -> None:
    """Add what was measured to the file, over older figures of the same convolutions. Raises TuningStoreError or OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tables = dict(read(path))
        old = tables.get(new.key)
        both = {**(old.convolutions if old is not None else {}), **new.convolutions}
        tables[new.key] = DeviceTable(new.key, new.name, new.capability, new.units, new.copy, both)
        devices = ",\n".join(f"{json.dumps(key)}: {table.to_text()}" for key, table in sorted(tables.items()))
        _replace(path, f'{{"format": {FORMAT}, "devices": {{\n{devices}\n}}}}\n')


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".new", dir=path.parent)
    try:
        with open(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@functools.cache
def shipped() -> tuple[DeviceTable, ...]:
    """The tables that pvae brings, whatever versions they were measured with."""
    files = sorted(SHIPPED.glob("conv_table_*.json"))
    return tuple(table for path in files for table in read(path).values())
