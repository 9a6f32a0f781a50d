"""canonicalize: each spelling becomes the one that later rules match, and nothing that a caller can tell is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pvae
from pvae.testing import assert_equivalent, assert_rewrites_to, refusals, rewrite, structure, tensors, video_models

aten = torch.ops.aten
X = torch.randn(2, 4, 6, 6)


def only_relu(x: Tensor) -> Any:
    return (aten.sum.default(aten.relu.default(x)),)


NO_OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda x: x.clone(),
    "clone_channels_last": lambda x: x.clone(memory_format=torch.channels_last),
    "contiguous": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2).contiguous(),
    "alias": lambda x: x[:, :],
    "detach": lambda x: x.detach(),
    "type_as": lambda x: x.type_as(x),
    "to_same": lambda x: aten.to.dtype(x, x.dtype),
    "to_copy_same": lambda x: x.to(x.dtype, copy=True),
    "expand": lambda x: x.expand(-1, x.shape[1], *x.shape[2:]),
    "slice": lambda x: x[:, 0:100],
    "dropout_eval": lambda x: F.dropout(x, 0.5, training=False),
    "dropout_zero": lambda x: F.dropout(x, 0.0, training=True),
    "dropout2d_eval": lambda x: F.dropout2d(x, 0.5, training=False),
    "pad_nothing": lambda x: F.pad(x, (0, 0, 0, 0)),
    "product_with_one": lambda x: x * 1,
    "quotient_by_one": lambda x: x / 1.0,
    "copy": lambda x: torch.zeros_like(x).copy_(x),
}


@pytest.mark.parametrize("name", sorted(NO_OPS.keys() - {"contiguous"}))
def test_no_ops_are_removed(name: str) -> None:
    assert_rewrites_to(lambda x: NO_OPS[name](x).relu().sum(), only_relu, X, passes="canonicalize")


def test_copies_between_transposes_are_removed() -> None:
    def expected(x: Tensor) -> Any:
        return only_relu(aten.transpose.int(aten.transpose.int(x, 1, 2), 1, 2))

    assert_rewrites_to(lambda x: NO_OPS["contiguous"](x).relu().sum(), expected, X, passes="canonicalize")


@pytest.mark.parametrize("name", sorted(NO_OPS))
def test_a_returned_copy_stays_a_copy(name: str) -> None:
    """What eager gives memory of its own keeps it, whatever views come after the copy."""

    class Model(nn.Module):
        def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.view = view

        def forward(self, x: Tensor) -> Tensor:
            return self.view(NO_OPS[name](x))

    views: list[Callable[[Tensor], Any]] = [
        lambda y: y,
        lambda y: y.split(2, 1)[1],
        lambda y: y.unbind(0)[1],
        lambda y: y.diagonal(0, 2, 3),
        lambda y: torch.as_strided(y, (2, 2), (1, 1)),
        lambda y: y.view(torch.int32),
        lambda y: y.type_as(y),
        lambda y: F.dropout(y, 0.5, False),
        lambda y: y.transpose(0, 1).flatten(1).unsqueeze(0),
    ]
    if name == "copy":
        del views[5]  # torch cannot trace a view as another dtype after a write
    for view in views:
        model = Model(view)
        x = X.clone()
        expected = model(x)
        shares = expected.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        pvae.compile(model, engine="eager")
        got = model(x)
        assert torch.equal(got, expected)
        if not shares:
            assert got.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_what_does_something_stays() -> None:
    for function in (
        lambda x: F.dropout(x, 0.5, training=True).relu(),
        lambda x: x.to(torch.float64).relu(),
        lambda x: x[:, :3].relu(),
        lambda x: x[:1].expand(2, 4, 6, 6).relu(),
        lambda x: F.pad(x, (0, 1)).relu(),
        lambda x: torch.zeros(2, 4, 6, 6, dtype=torch.float64).copy_(x).relu(),
        lambda x: torch.zeros(2, 4, 6, 6).copy_(x[:1]).relu(),
    ):
        gm, reports = rewrite(function, X, passes="canonicalize")
        assert not reports[0].matches, structure(gm)


def test_type_as_is_spelled_to() -> None:
    def expected(x: Tensor, y: Tensor) -> Any:
        return (aten.relu.default(aten.to.dtype(x, torch.float64)),)

    assert_rewrites_to(lambda x, y: x.type_as(y).relu(), expected, X, X.double(), passes="canonicalize")


def test_views_are_captured_as_reshapes() -> None:
    """A pass may change strides, with canonicalize or without."""

    def expected(x: Tensor) -> Any:
        return (aten.relu.default(aten.reshape.default(x, [2, 144])),)

    assert_rewrites_to(lambda x: x.view(2, 144).relu(), expected, X, passes="")


@pytest.mark.parametrize("spell", ["chunk", "split", "sizes", "tensor_split"])
def test_pieces_are_slices(spell: str) -> None:
    def before(x: Tensor) -> Tensor:
        a, b = {
            "chunk": lambda: x.chunk(2, 1),
            "split": lambda: x.split(2, dim=1),
            "sizes": lambda: torch.split(x, [2, 2], -3),
            "tensor_split": lambda: x.tensor_split(2, 1),
        }[spell]()
        return a.relu() + b

    def expected(x: Tensor) -> Any:
        a, b = aten.slice.Tensor(x, 1, 0, 2), aten.slice.Tensor(x, 1, 2, 4)
        return (aten.add.Tensor(aten.relu.default(a), b),)

    if spell == "tensor_split":  # already slices, with other defaults
        gm, _ = rewrite(before, X, passes="canonicalize")
        assert sum("aten.slice" in line for line in structure(gm)) == 2
        return
    assert_rewrites_to(before, expected, X, passes="canonicalize")


def test_uneven_pieces_and_unbind() -> None:
    def before(x: Tensor) -> tuple[Tensor, ...]:
        first, _, last = x.split([1, 2, 1], 1)
        first, last = first.relu(), last.relu()
        return first, last, x.split(4, 2)[1].relu(), x.unbind(-1)[5].relu()

    def expected(x: Tensor) -> Any:
        first, last = aten.slice.Tensor(x, 1, 0, 1), aten.slice.Tensor(x, 1, 3, 4)
        relu = aten.relu.default
        return relu(first), relu(last), relu(aten.slice.Tensor(x, 2, 4, 6)), relu(aten.select.int(x, 3, 5))

    assert_rewrites_to(before, expected, X, passes="canonicalize")


def test_pieces_of_symbolic_size_are_refused() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.split([x.shape[1] - 1, 1], 1)
            return a.relu() + b

    model = Model()
    compiled = torch.compile(model, backend="pvae", dynamic=True, options={"engine": "eager"})
    assert torch.equal(compiled(X), model(X))
    assert torch.equal(compiled(X[:, :3]), model(X[:, :3]))
    graph = pvae.report(None).graphs[-1]
    assert "the pieces have symbolic sizes" in refusals(graph.passes)


def test_convolution_gets_a_batch() -> None:
    weight = torch.randn(3, 4, 3, 3)

    def expected(x: Tensor, w: Tensor) -> Any:
        return (aten.select.int(aten.conv2d.default(aten.unsqueeze.default(x, 0), w), 0, 0),)

    assert_rewrites_to(F.conv2d, expected, X[0], weight, passes="canonicalize")


@given(
    tensors(st.tuples(*[st.integers(1, 5)] * 4)),
    st.lists(st.sampled_from(sorted(NO_OPS)), max_size=4),
    st.integers(-4, 3),
)
def test_property_chains_are_bitwise(x: Tensor, names: list[str], dim: int) -> None:
    """Chains of spellings, on any layout and dtype, keep every bit, the dtype and the order of dimensions in memory."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = x
            for n in names:
                y = NO_OPS[n](y)
            pieces = y.split(2, dim)
            return y, pieces[-1], y.unbind(dim)[0], y.chunk(3, dim)[0] * 2

    model = Model()
    expected = model(x)
    got = pvae.compile(model, engine="eager", passes="canonicalize")(x)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()


@given(video_models())
def test_property_models(drawn: tuple[nn.Module, Tensor]) -> None:
    model, x = drawn
    assert_equivalent(model, (x,), dtypes=(torch.float64, torch.float32), options={"passes": "canonicalize"})
