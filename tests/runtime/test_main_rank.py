"""What rank 0 sends: any value, its tensors with their strides; and what is refused before anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pvae.runtime.main_rank import FIRST, Parcel, elsewhere, receive, send
from pvae.runtime.mesh import make_mesh
from tests.ranks import on_threads


def sent(make: Callable[[], Any], world: int = 3) -> list[Any]:
    """What each rank has after rank 0 has sent `make()`."""

    def run(rank: int) -> Any:
        (group,) = make_mesh().groups
        assert group is not None
        if rank:
            return receive(group, {})
        value = make()
        send(Parcel.of(value), group, {})
        return value

    return on_threads(world, run)


X = torch.arange(24.0).reshape(2, 3, 4)
TENSORS = {
    "plain": X,
    "transposed": X.mT,
    "with gaps": X[:, ::2, 1:],
    "expanded": X[:, :1].expand(2, 5, 4),
    "channels last": X[None].contiguous(memory_format=torch.channels_last),
    "scalar": torch.tensor(3),
    "no rows": X[:0],
    "bool": X > 3,
    "conjugate": torch.complex(X, -X).conj(),
    "bfloat16": X.bfloat16(),
    "float8": X.to(torch.float8_e4m3fn),
    "parameter": nn.Parameter(X),
}


def test_tensors_arrive_with_their_strides() -> None:
    _, *others = sent(lambda: TENSORS)
    for got in others:
        for name, x in TENSORS.items():
            y = got[name]
            assert y.dtype == x.dtype and y.shape == x.shape and y.device == x.device, name
            assert torch.equal(y.double() if not y.is_complex() else y, x.double() if not x.is_complex() else x), name
            assert y.stride() == x.stride() or name in ("with gaps", "expanded"), name
            assert not y.requires_grad


@dataclass
class Point:
    x: Tensor
    name: str


def test_containers_and_plain_values() -> None:
    def make() -> Any:
        return [Point(X, "p"), {"again": X}, (None, 1.5, True, torch.Size([2])), torch.bfloat16, "long" * FIRST]

    _, *others = sent(make)
    for point, table, plain, dtype, long in others:
        assert type(point) is Point and torch.equal(point.x, X) and point.name == "p"
        assert table["again"] is point.x  # one tensor stays one
        assert plain == (None, 1.5, True, torch.Size([2])) and dtype is torch.bfloat16 and long == "long" * FIRST


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda: 0, "return tensors, plain values, and containers of them"),
        (X.to_sparse(), "is no plain tensor; return a dense one"),
        (torch.empty(2, device="meta"), "a meta tensor cannot travel"),
    ],
    ids=["function", "sparse", "meta"],
)
def test_what_cannot_travel_is_refused(value: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        Parcel.of({"result": [value]})


def test_results_of_another_rank_have_no_rows() -> None:
    (x, y) = elsewhere((((0, 3), torch.bfloat16, torch.device("cpu")), ((0,), torch.int64, torch.device("meta"))), X)
    assert (x.shape, x.dtype, x.device.type) == ((0, 3), torch.bfloat16, "cpu")
    assert (y.shape, y.dtype, y.device.type) == ((0,), torch.int64, "meta")
