"""pvae::conv3d_unfold against conv3d: every geometry, dtype, layout and chunking; its fake; the memory it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import pvae
from pvae.kernels import conv3d_unfold as kernel
from pvae.testing import relative_error

op = torch.ops.pvae.conv3d_unfold.default
LAYOUTS = ("contiguous", "channels_last", "frames_first", "sliced")


@dataclass(frozen=True)
class Geometry:
    x: tuple[int, ...]
    weight: tuple[int, ...]
    bias: bool
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    layout: str

    def make(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        x = torch.randn(self.x, dtype=torch.float64).to(dtype)
        if self.layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last_3d)
        elif self.layout == "frames_first":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif self.layout == "sliced":
            x = torch.cat([x, x], 4)[..., : self.x[4]]
        weight = torch.randn(self.weight, dtype=torch.float64).to(dtype)
        return x, weight, torch.randn(self.weight[0], dtype=torch.float64).to(dtype) if self.bias else None

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, channels_last: bool) -> Tensor:
        flat = kernel.unfold_weight(weight, self.groups)
        return op(x, flat, bias, self.weight[2], self.stride, self.padding, self.dilation, self.groups, channels_last)

    def reference(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return kernel.reference(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


@st.composite
def geometries(draw: st.DrawFn, stride_or_dilation: bool = False) -> Geometry:
    """Any convolution that has an output; `stride_or_dilation`: not both above 1 (see `pvae.testing.video_models`)."""
    three = lambda low, high: [draw(st.integers(low, high)) for _ in range(3)]  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 3))
    kernel_size, stride, dilation = three(1, 4), three(1, 3), three(1, 3)
    if stride_or_dilation and max(stride) > 1:
        dilation = [1, 1, 1]
    padding = [draw(st.integers(0, 4)) for _ in range(6)]
    sizes = three(1, 9)
    for i in range(3):
        assume(sizes[i] + padding[2 * i] + padding[2 * i + 1] > dilation[i] * (kernel_size[i] - 1))
    return Geometry(
        (draw(st.integers(1, 2)), channels, *sizes),
        (groups * draw(st.integers(1, 3)), channels // groups, *kernel_size),
        draw(st.booleans()),
        stride,
        padding,
        dilation,
        groups,
        draw(st.sampled_from(LAYOUTS)),
    )


@given(geometries(), st.booleans(), st.sampled_from([None, 0, 200, 2000, 20000]))
def test_equals_conv3d(geometry: Geometry, channels_last: bool, budget: int | None) -> None:
    """In float64 to the last bits, whole or in chunks of frames and rows; laid out as its fake says."""
    args = geometry.make(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        if budget is not None:
            patch.setattr(kernel, "EXTRA_BYTES", budget)
            patch.setattr(kernel, "EXTRA_RATIO", 0.0)
        y = geometry.run(*args, channels_last)
    assert relative_error(y, geometry.reference(*args)) < 1e-14
    with FakeTensorMode() as mode:
        fake = geometry.run(*[mode.from_tensor(a) if a is not None else None for a in args], channels_last)
    assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype)


@given(
    geometries(stride_or_dilation=True), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
)
def test_other_dtypes(geometry: Geometry, channels_last: bool, dtype: torch.dtype) -> None:
    args = geometry.make(dtype)
    y, exact = geometry.run(*args, channels_last), geometry.reference(*[a if a is None else a.double() for a in args])
    assert y.dtype == dtype and y.isfinite().all()
    if exact.numel() >= 32:
        assert relative_error(y, exact) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("frames", [0, 3])
def test_nothing_in_nothing_out(frames: int) -> None:
    x, weight = torch.randn(0 if frames else 1, 2, frames, 4, 4), torch.randn(3, 4, 3, 3)
    y = op(x, weight, None, 2, [1, 1, 1], [1, 0, 1, 1, 1, 1], [1, 1, 1], 1, False)
    assert y.shape == (x.shape[0], 3, frames, 4, 4) and not y.numel()


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last: bool) -> None:
    x, weight, bias = torch.randn(2, 4, 5, 6, 7), torch.randn(6, 6, 3, 3), torch.randn(6)
    args = (x, weight, bias, 3, [1, 2, 1], [2, 0, 1, 1, 1, 0], [1, 1, 2], 2, channels_last)
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


# --- memory ----------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at once, by their storages."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.inputs = {x.untyped_storage()._cdata for x in inputs}
        self.alive: dict[int, torch.UntypedStorage] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.inputs:
                    self.alive.setdefault(storage._cdata, storage)
        # A storage that only this table holds is dead: its use count is one for the table and one for the call.
        self.alive = {key: s for key, s in self.alive.items() if torch._C._storage_Use_Count(s._cdata) > 1}
        self.peak = max(self.peak, sum(s.nbytes() for s in self.alive.values()))
        return out


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 9, 64, 64), (2, 8, 3, 96, 64), (1, 3, 1, 256, 64)])
def test_memory_bound(monkeypatch: pytest.MonkeyPatch, shape: Sequence[int], channels_last: bool) -> None:
    """No more than half of input and output, plus a constant, beside the output itself."""
    monkeypatch.setattr(kernel, "EXTRA_BYTES", 64 * 2**10)
    x, weight = torch.randn(*shape), torch.randn(8, 3 * shape[1], 3, 3)
    with Allocations(x, weight) as allocations:
        y = kernel.conv3d_unfold._init_fn(x, weight, None, 3, [1] * 3, [2, 0, 1, 1, 1, 1], [1] * 3, 1, channels_last)
    allowed = 0.5 * 4 * (x.numel() + y.numel()) + 64 * 2**10
    assert 0.2 * allowed < allocations.peak - 4 * y.numel() <= allowed


@given(
    st.integers(1, 2),
    st.integers(1, 1024),
    st.integers(1, 1024),
    st.integers(1, 128),
    st.integers(1, 4096),
    st.integers(1, 4096),
    st.integers(2, 5),
)
def test_chunks_of_large_videos(n: int, c: int, o: int, t: int, h: int, w: int, kernel_time: int) -> None:
    """What a chunk unfolds and computes fits the budget, for any size, as far as whole rows allow."""
    with FakeTensorMode():
        x = torch.empty(n, c, t, h, w, dtype=torch.bfloat16, device="meta")
        y = torch.empty(n, o, t, h, w, dtype=torch.bfloat16, device="meta")
        frames, rows = kernel._chunks(x, y, kernel_time, h)
    assert frames >= 1 and 1 <= rows <= h
    budget = 0.5 * (x.numel() + y.numel()) * 2 + 256 * 2**20
    row = 2 * n * w * (kernel_time * c + o)
    if rows > 1:
        assert min(frames, t) * rows * row <= budget
    if min(frames, t) * rows < t * h:
        assert 4 * (frames + 1) * (rows + 1) * row >= budget, "smaller chunks than needed"


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dynamic_time_compiles_a_few_times() -> None:
    """Any number of frames: one static compile, one dynamic, and one more for a single frame."""
    conv = nn.Conv3d(4, 6, 3, padding=1)
    options = {"conv3d": "unfold2d", "disable": "drop_zero_taps"}
    compiled = torch.compile(conv, backend="pvae", dynamic=True, options=options)
    with torch.no_grad():
        for frames in (5, 3, 8, 2, 13, 1):
            x = torch.randn(1, 4, frames, 6, 6)
            torch.testing.assert_close(compiled(x), conv(x), rtol=1e-4, atol=1e-5)
    graphs = pvae.report(conv).graphs
    assert len(graphs) <= 3 and all(g.matches("conv3d_unfold") == 1 for g in graphs)
