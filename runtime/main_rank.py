"""What rank 0 computed, on every rank: any Python value, its tensors by broadcast over a process group of pvae's.

A parcel is the value with its tensors taken out. The header says what is left (pickled: containers, numbers, text) and, of
each tensor, dtype, sizes and strides, so sizes may depend on data; the tensors follow as bytes, one broadcast each. Like
`torch.distributed.broadcast_object_list` this is for ranks of one job, which run the same code and trust each other.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pvae.runtime.torch_compat import group_devices, process_group

__all__ = ["Parcel", "elsewhere", "receive", "send"]

FIRST = 4096  # bytes of the first message: eight of them say how long the header is, and most headers fit into the rest


class Facts(NamedTuple):
    """What a receiver has to know of a tensor to make room for it. `device` is the type alone: each rank has its own."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: str


@dataclass(frozen=True)
class Parcel:
    """A value ready to be sent: the header, and the tensors in its order, dense."""

    header: bytes
    tensors: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, value: Any) -> Parcel:
        """Raises TypeError for what cannot travel: tensors that are not plain and strided, objects that cannot be pickled."""
        body = io.BytesIO()
        packer = _Packer(body)
        try:
            packer.dump(value)
        except (pickle.PicklingError, AttributeError, RecursionError) as error:
            raise TypeError(f"{error}; return tensors, plain values, and containers of them") from error
        dense = tuple(map(_dense, packer.tensors))
        facts = [Facts(t.dtype, tuple(t.shape), tuple(t.stride()), t.device.type) for t in dense]
        return cls(pickle.dumps((facts, body.getvalue())), dense)


class _Packer(pickle.Pickler):
    """Leaves a number in the place of each tensor; one that comes twice has one number."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
            raise TypeError(f"{type(value).__name__}, {value.layout}, is no plain tensor; return a dense one")
        if value.is_quantized or value.is_meta:
            kind = "quantized" if value.is_quantized else "meta"
            raise TypeError(f"a {kind} tensor cannot travel to the other ranks; return one of values")
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)  # and so it lives, and nothing else gets its id
        return self._numbers[id(value)]


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: Any) -> torch.Tensor:
        return self._tensors[number]


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return tensor if torch.ops.aten.is_non_overlapping_and_dense(tensor) else tensor.contiguous()


Devices = Mapping[str, torch.device]


def _own(kind: str, devices: Devices) -> torch.device:
    """This process's device of that type: what `devices` says, else the current one."""
    if kind in devices or kind == "cpu":
        return devices.get(kind, torch.device("cpu"))
    return torch.device(kind, torch.accelerator.current_device_index())


def _wire(kind: str, group: dist.ProcessGroup, devices: Devices) -> torch.device:
    """The device on which a tensor of that type travels: NCCL takes none of the CPU's, for instance."""
    kinds = group_devices(group)
    return _own(kind if kind in kinds or not kinds else kinds[0], devices)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor as its bytes in the order of memory; a view."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def send(parcel: Parcel, group: str, devices: Devices) -> None:
    """Rank 0's part: send the parcel to all others of the group, each of whom calls `receive`."""
    pg = process_group(group)
    source, device = dist.get_global_rank(pg, 0), _wire("cpu", pg, devices)
    message = len(parcel.header).to_bytes(8, "little") + parcel.header
    message += bytes(max(0, FIRST - len(message)))
    flat = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(device)
    for part in (flat[:FIRST], flat[FIRST:]):
        if len(part):
            dist.broadcast(part, source, pg)
    for tensor in parcel.tensors:
        if tensor.numel():
            dist.broadcast(_bytes(tensor.to(_wire(tensor.device.type, pg, devices))), source, pg)


def receive(group: str, devices: Devices) -> Any:
    """The others' part: the value that rank 0 sent. Its tensors have the strides that they have there, and come to this
    process's device of the same type: the one in `devices`, by type, else the current one."""
    pg = process_group(group)
    source, device = dist.get_global_rank(pg, 0), _wire("cpu", pg, devices)
    flat = torch.empty(FIRST, dtype=torch.uint8, device=device)
    dist.broadcast(flat, source, pg)
    message = flat.cpu().numpy().tobytes()
    size = int.from_bytes(message[:8], "little")
    if size > FIRST - 8:
        flat = torch.empty(size - (FIRST - 8), dtype=torch.uint8, device=device)
        dist.broadcast(flat, source, pg)
        message += flat.cpu().numpy().tobytes()
    facts, body = pickle.loads(message[8 : 8 + size])
    tensors = [_received(f, source, pg, devices) for f in facts]
    return _Unpacker(io.BytesIO(body), tensors).load()


def _received(facts: Facts, source: int, group: dist.ProcessGroup, devices: Devices) -> torch.Tensor:
    """The next tensor, received in its own memory where the group can reach that."""
    wire = _wire(facts.device, group, devices)
    room = torch.empty_strided(facts.shape, facts.stride, dtype=facts.dtype, device=wire)
    if room.numel():
        dist.broadcast(_bytes(room), source, group)
    return room.to(_own(facts.device, devices))


def elsewhere(
    likes: Sequence[tuple[Sequence[int], torch.dtype, torch.device]], *after: Any
) -> tuple[torch.Tensor, ...]:
    """The results, without any rows, of what another rank computes: what this one passes to the `fetch` that brings them.

    `likes` has shape, dtype and device of each. `after` is not read: it is what every rank has to have done by then.
    """
    return tuple(torch.empty(list(shape), dtype=dtype, device=device) for shape, dtype, device in likes)
