"""fuse_modulation in numbers: random chains against float64, symbolic sizes, shared compiles, strides, memory of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pvae
from pvae.testing import agreement, assert_equivalent

EAGER = {"modulation": "on", "engine": "eager"}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# How a scale, shift or gate lies beside x [B, L, C]; "piece" is a strided slice of one modulation tensor [B, 1, 3C].
FORMS = ("[C]", "[B, C]", "[B, 1, C]", "[B, L, C]", "[1, L, C]", "[L, C]", "piece")


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Shape:
    """A chain: which operands there are and in which form, and how it is written."""

    norm: str  # layer, rms, by hand
    weight: bool
    bias: bool
    constant: float
    forms: dict[str, str]  # of gate, scale, shift; those left out are not there
    chosen: bool  # operands are two sets, chosen by an index
    residual: bool
    product_first: bool
    addcmul: bool
    wide: str  # what is computed in fp32: nothing, the norm, all


class Chain(nn.Module):
    def __init__(self, shape: Shape, channels: int) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.randn(channels)) if shape.weight else None
        self.bias = nn.Parameter(torch.randn(channels)) if shape.bias and shape.norm == "layer" else None

    def norm(self, x: Tensor) -> Tensor:
        wide = [None if p is None else p.to(x.dtype) for p in (self.weight, self.bias)]
        if self.shape.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], wide[0], wide[1], 1e-5)
        if self.shape.norm == "rms":
            return F.rms_norm(x, x.shape[-1:], wide[0], 1e-5)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        return y if wide[0] is None else y * wide[0]

    def operand(self, name: str, given: dict[str, Tensor], index: Tensor) -> Tensor | None:
        found = [self.shaped(given[key], self.shape.forms[name]) for key in (name, name + "1") if key in given]
        return torch.where(index.unsqueeze(-1) == 0, *found) if len(found) == 2 else found[0] if found else None

    @staticmethod
    def shaped(operand: Tensor, form: str) -> Tensor:
        if form == "piece":
            return operand.chunk(3, -1)[1]
        return operand.unsqueeze(1) if form == "[B, C]" else operand

    def forward(self, x: Tensor, y: Tensor, index: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        shape, dtype = self.shape, x.dtype
        up = torch.promote_types(dtype, torch.float32)
        gate, scale, shift = (self.operand(name, given, index) for name in ("gate", "scale", "shift"))
        h = x
        if shape.residual:
            product = y if gate is None else y * gate
            if shape.wide == "all":
                h = (x.to(up) + product.to(up)).to(dtype)
            elif gate is not None and shape.addcmul:
                h = torch.addcmul(x, gate, y)
            else:
                h = product + x if shape.product_first else x + product
        n = self.norm(h.to(up)) if shape.wide != "nothing" else self.norm(h)
        if shape.wide == "norm":
            n = n.to(dtype)
        if scale is not None:
            scale = shape.constant + scale if shape.constant else scale
        if scale is not None and shift is not None and shape.addcmul and n.dtype == dtype:
            n = torch.addcmul(shift, n, scale)
        else:
            n = n if scale is None else scale * n if shape.product_first else n * scale
            n = n if shift is None else n + shift
        return h, n.to(dtype)


operands = st.fixed_dictionaries({}, optional={name: st.sampled_from(FORMS) for name in ("gate", "scale", "shift")})
shapes = st.builds(
    Shape,
    norm=st.sampled_from(("layer", "rms", "by hand")),
    weight=st.booleans(),
    bias=st.booleans(),
    constant=st.sampled_from((1.0, 1.0, 0.0, 0.5)),
    forms=operands,
    chosen=st.booleans(),
    residual=st.booleans(),
    product_first=st.booleans(),
    addcmul=st.booleans(),
    wide=st.sampled_from(("nothing", "norm", "all")),
)


def made(form: str, batch: int, length: int, channels: int) -> Tensor:
    sizes = {
        "[C]": (channels,),
        "[B, C]": (batch, channels),
        "[B, 1, C]": (batch, 1, channels),
        "[B, L, C]": (batch, length, channels),
        "[1, L, C]": (1, length, channels),
        "[L, C]": (length, channels),
        "piece": (batch, 1, 3 * channels),
    }
    return torch.randn(sizes[form])


def inputs(shape: Shape, batch: int, length: int, channels: int) -> tuple[Any, ...]:
    given = {name: made(form, batch, length, channels) for name, form in shape.forms.items()}
    if shape.chosen:
        given |= {f"{name}1": made(form, batch, length, channels) for name, form in shape.forms.items()}
    x, y = (torch.randn(batch, length, channels) for _ in range(2))
    return x + 3, y, torch.randint(0, 2, (batch, length)), given


@given(shapes, st.integers(1, 3), st.integers(1, 7), st.sampled_from([1, 2, 5, 8, 13, 64, 97]), st.sampled_from(DTYPES))
def test_property_chains(shape: Shape, batch: int, length: int, channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(batch + 10 * length)
    model = Chain(shape, channels)
    # A scale is a chain unless it looks like the gate of a GLU; a gate before a norm is where there is one value for
    # several rows, or two sets.
    certain = ("[C]", "[L, C]", "piece")
    scaled = shape.constant or shape.chosen or "shift" in shape.forms or shape.forms.get("scale") in certain
    narrow = (shape.chosen or shape.forms.get("gate") in ("[C]", "[L, C]")) and shape.residual and "gate" in shape.forms
    expect = {"fuse_modulation": 1} if ("scale" in shape.forms and scaled) or narrow else {}
    assert_equivalent(
        model, inputs(shape, batch, length, channels), dtypes=(dtype,), options={"modulation": "on", "expect": expect}
    )


# --- a block as models write it ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """Norms before and after a gated residual, modulated by chunks of one linear of `temb`."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.modulation = nn.Linear(channels, 6 * channels)
        self.attention, self.feed_forward = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.second = nn.RMSNorm(channels, eps=1e-6)

    def forward(self, x: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(temb).unsqueeze(1).chunk(6, -1)
        x = x + gate * self.attention(self.norm(x) * (1 + scale) + shift)
        y = self.second(x) * (1 + scale2) + shift2
        return x + gate2 * self.feed_forward(y), y


def blocks(count: int) -> list[Block]:
    return [Block().eval().requires_grad_(False) for _ in range(count)]


def assert_right(got: Any, block: nn.Module, *args: Any) -> None:
    want, wide = type(block).forward(block, *args), copy.deepcopy(block).double()
    reference = type(block).forward(wide, *[a.double() if a.is_floating_point() else a for a in args])
    found = agreement(got(*args), want, reference)
    assert found.ok, str(found)


def fused(model: nn.Module | None) -> list[tuple[int, int]]:
    """Matches of the two passes, graph by graph."""
    return [(g.matches("fuse_modulation"), g.matches("fuse_residual_gate")) for g in pvae.report(model).graphs]


class Frames(nn.Module):
    """Per frame modulation [B, F, 1, C] and a two-way select by token, over a reshape with symbolic sizes."""

    def forward(self, x: Tensor, frame: Tensor, index: Tensor, first: Tensor, second: Tensor) -> Tensor:
        n = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        n = (n.unflatten(1, (frame.shape[1], -1)) * (1 + frame) + frame).flatten(1, 2)
        scale = torch.where(index.unsqueeze(-1) == 0, first, second)
        return F.rms_norm(n, n.shape[-1:], eps=1e-6) * (1 + scale)


@pytest.mark.parametrize("engine", ["eager", "inductor"])
def test_symbolic_sizes(engine: str) -> None:
    """Any number of samples and tokens after one compile."""
    (block,) = blocks(1)
    compiled = torch.compile(block, backend="pvae", dynamic=True, options=EAGER | {"engine": engine})
    counts = []
    for batch, length in ((2, 6), (3, 10), (4, 17), (2, 5)):
        assert_right(compiled, block, torch.randn(batch, length, 8), torch.randn(batch, 8))
        counts.append(len(fused(block)))
    assert counts == counts[:1] * 4 and set(fused(block)) == {(2, 1)}  # Dynamo may start the first compile again


def test_symbolic_sizes_per_frame_and_by_index() -> None:
    model = Frames()
    compiled = torch.compile(model, backend="pvae", dynamic=True, options=EAGER)
    for batch, frames, tokens in ((2, 3, 4), (3, 2, 5), (2, 5, 7)):
        length = frames * tokens
        frame, x = torch.randn(batch, frames, 1, 8), torch.randn(batch, length, 8)
        index = torch.randint(0, 2, (batch, length))
        assert_right(compiled, model, x, frame, index, torch.randn(batch, 1, 8), torch.randn(batch, 1, 8))
    assert fused(model) == [(2, 0)]


@pytest.mark.parametrize("engine", ["eager", "inductor"])
def test_instances_share_one_compile(engine: str) -> None:
    first, second = blocks(2)
    for block in (first, second):
        pvae.compile(block, modulation="on", engine=engine)
    for _ in range(2):
        for block in (first, second):
            assert_right(block, block, torch.randn(2, 6, 8), torch.randn(2, 8))
    assert [g.shared_with for g in pvae.report(None).graphs] == [None, 0]
    assert fused(first) == fused(second) == [(2, 1)]


def test_a_block_in_every_dtype() -> None:
    args = torch.randn(2, 6, 8), torch.randn(2, 8)
    expect = {"fuse_modulation": 2, "fuse_residual_gate": 1}
    assert_equivalent(blocks(1)[0], args, dtypes=DTYPES, options={"modulation": "on", "expect": expect})


def test_what_comes_back_has_memory_of_its_own() -> None:
    """h and y outlive whatever the caller does to what went in, and to each other."""

    class Model(nn.Module):
        def forward(self, x: Tensor, y: Tensor, m: Tensor) -> tuple[Tensor, ...]:
            gate, scale, shift = m.chunk(3, -1)
            h = x + gate * y
            n = F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift
            x.add_(1)  # after its last use
            y.mul_(2)
            return h, n, h[:, 1:], n.transpose(1, 2), x

    model = Model()
    args = [torch.randn(2, 6, 8), torch.randn(2, 6, 8), torch.randn(2, 1, 24)]
    mine, theirs = ([a.clone() for a in args] for _ in range(2))
    want = model(*theirs)
    pvae.compile(model, **EAGER)
    got = model(*mine)
    assert fused(None) == [(1, 0)]
    torch.testing.assert_close((*got, *mine), (*want, *theirs))

    def memory(tensors: Any) -> list[int]:
        pointers = [t.untyped_storage().data_ptr() for t in tensors]
        return [pointers.index(p) for p in pointers]

    assert memory((*got, *mine)) == memory((*want, *theirs)), (
        "two outputs share memory where eager's do, and only there"
    )
    kept = [t.clone() for t in got[:4]]
    for tensor in mine:
        tensor.zero_()
    torch.testing.assert_close(list(got[:4]), kept, rtol=0, atol=0)
    again = [a.clone() for a in args]
    torch.testing.assert_close(model(*again)[:4], want[:4])  # nothing was kept from the call before


@pytest.mark.parametrize("inplace", [False, True])
def test_writes_before_the_chain_are_seen(inplace: bool) -> None:
    """A scale written in place between its making and its use is used as written."""

    class Model(nn.Module):
        def forward(self, x: Tensor, m: Tensor) -> Tensor:
            m = m if inplace else m.clone()
            scale, shift = m.chunk(2, -1)
            n = F.layer_norm(x, x.shape[-1:], eps=1e-6)
            m.add_(1)
            return n * (1 + scale) + shift

    model = Model()
    x, m = torch.randn(2, 6, 8), torch.randn(2, 1, 16)
    written = m.clone()
    want = model(x, written)
    pvae.compile(model, **EAGER)
    mine = m.clone()
    torch.testing.assert_close(model(x, mine), want)
    torch.testing.assert_close(mine, written)
    assert fused(None) == [(1, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_and_infinity_stay_in_their_rows(dtype: torch.dtype) -> None:
    (block,) = blocks(1)
    block.to(dtype)
    x, temb = torch.randn(2, 6, 8, dtype=dtype), torch.randn(2, 8, dtype=dtype)
    x[0, 1, 2], x[1, 3, 4] = torch.nan, torch.inf
    want = block(x, temb)
    pvae.compile(block, **EAGER)
    for ours, theirs in zip(block(x, temb), want, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
