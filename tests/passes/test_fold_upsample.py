"""fold_upsample: every spelling of an enlargement, what may stand between it and the convolution, and why others are left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pvae
from pvae.passes.fold_upsample import FoldUpsample
from pvae.passes.ir import Builder
from pvae.passes.rule import Refusal
from pvae.runtime.fetch import fetch
from pvae.runtime.torch_compat import new_fake_mode
from pvae.testing import assert_equivalent, assert_rewrites_to, refusals, relative_error, rewrite
from tests.passes.shard_case import assert_same, shard

aten = torch.ops.aten
taps, phase_weight = torch.ops.pvae.conv_taps.default, torch.ops.pvae.phase_weight.default
FORCED = "fold_upsample{phases=on}"
ON = {"upsample_conv": "on", "conv3d": "native"}
X, W, B = torch.randn(2, 4, 5, 6), torch.randn(3, 4, 3, 3), torch.randn(3)
V, K = torch.randn(2, 4, 3, 5, 6), torch.randn(3, 4, 3, 3, 3)
FLAT, DEEP = torch.channels_last, torch.channels_last_3d


def up(x: Tensor, mode: str = "nearest", time: int = 1) -> Tensor:
    return F.interpolate(x, scale_factor=(2.0, 2.0) if x.dim() == 4 else (float(time), 2.0, 2.0), mode=mode)


def conv(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, padding=1)


def sums(function: Any) -> Any:
    """`function` reduced to a number, so that no output has to be laid out again."""
    return lambda *args: function(*args).sum()


def flat(x: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
    """The 2-D form, as the pass writes it."""
    x = aten.contiguous.default(x, memory_format=FLAT)
    return taps(x, None, phase_weight(w), b, None, [1, 1], [1, 1, 1, 1], [1, 1], True, "none", [])


def deep(x: Tensor, w: Tensor, b: Tensor | None = None, time: tuple[int, int] = (0, 0)) -> Any:
    x = aten.contiguous.default(x, memory_format=DEEP)
    return taps(x, None, phase_weight(w), b, None, [1, 1, 1], [*time, 1, 1, 1, 1], [1, 1, 1], True, "none", [])


def assert_folds(before: Any, expected: Any, *args: Tensor, passes: str = FORCED) -> None:
    """Both that the graph is the expected one and that it computes the same, in float64."""
    wanted = {
        2: lambda x, w: (aten.sum.default(expected(x, w)),),
        3: lambda x, w, b: (aten.sum.default(expected(x, w, b)),),
    }
    assert_rewrites_to(sums(before), wanted[len(args)], *args, passes=passes)
    assert_computes(before, *[a.double() for a in args], passes=passes)


def assert_computes(before: Any, *args: Tensor, passes: str = FORCED) -> None:
    gm, reports = rewrite(before, *args, passes=passes)
    assert reports[-1].counters["fold_upsample"] == 1
    torch.testing.assert_close(gm(*args)[0], before(*args), rtol=1e-12, atol=1e-12)


# --- spellings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "enlarge",
    [
        up,
        lambda x: up(x, "nearest-exact"),
        lambda x: F.interpolate(x, size=(10, 12)),
        lambda x: F.interpolate(x, size=(10, 12), mode="nearest-exact"),
        lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3),
        lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2),
    ],
)
def test_a_picture(enlarge: Callable[[Tensor], Tensor]) -> None:
    assert_folds(lambda x, w, b: F.conv2d(enlarge(x), w, b, padding=1), flat, X, W, B)


def test_a_video() -> None:
    def before(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv3d(up(x), w, b, padding=(0, 1, 1))

    assert_folds(before, deep, V, K, B)


def test_time_keeps_its_own_padding_stride_and_dilation() -> None:
    def before(x: Tensor, w: Tensor) -> Tensor:
        return F.conv3d(up(x), w, None, (2, 1, 1), (2, 1, 1), (2, 1, 1))

    def expected(x: Tensor, w: Tensor) -> Any:
        x = aten.contiguous.default(x, memory_format=DEEP)
        return taps(x, None, phase_weight(w), None, None, [2, 1, 1], [2, 2, 1, 1, 1, 1], [2, 1, 1], True, "none", [])

    assert_folds(before, expected, V, K)


@pytest.mark.parametrize("given_as", ["scales", "size"])
def test_enlargement_in_time_stays_on_the_small_picture(given_as: str) -> None:
    def before(x: Tensor, w: Tensor) -> Tensor:
        return F.conv3d(
            up(x, time=2) if given_as == "scales" else F.interpolate(x, size=(6, 10, 12)), w, padding=(0, 1, 1)
        )

    def expected(x: Tensor, w: Tensor) -> Any:
        where = (None, [2.0, 1.0, 1.0]) if given_as == "scales" else ([6, 5, 6], None)
        return deep(aten.upsample_nearest3d.vec(x, *where), w)

    assert_folds(before, expected, V, K)


# --- what may stand between -------------------------------------------------------------------------------------------


def test_a_cast_there_and_back_goes() -> None:
    """Wan's and Qwen-Image's spelling."""
    half = X.bfloat16(), W.bfloat16()
    before = sums(lambda x, w: F.conv2d(up(x.float(), "nearest-exact").type_as(x), w, padding=1))
    assert_rewrites_to(before, lambda x, w: (aten.sum.default(flat(x, w)),), *half, passes=f"canonicalize,{FORCED}")


@pytest.mark.parametrize(("dtype", "via"), [(torch.float32, torch.float16), (torch.float16, torch.bfloat16)])
def test_a_cast_that_rounds_stays(dtype: torch.dtype, via: torch.dtype) -> None:
    before = sums(lambda x, w: F.conv2d(up(x.to(via)).to(dtype), w, padding=1))

    def expected(x: Tensor, w: Tensor) -> Any:
        return (aten.sum.default(flat(aten.to.dtype(aten._to_copy.default(x, dtype=via), dtype), w)),)

    assert_rewrites_to(before, expected, X.to(dtype), W.to(dtype), passes=f"canonicalize,{FORCED}")


def test_views_between_video_and_frames() -> None:
    """CogVideoX: enlarged as a video, convolved as frames."""

    def before(x: Tensor, w: Tensor) -> Tensor:
        x = up(x, time=2).permute(0, 2, 1, 3, 4).reshape(12, 4, 10, 12)
        return F.conv2d(x, w, padding=1)

    def expected(x: Tensor, w: Tensor) -> Any:
        x = aten.upsample_nearest3d.vec(x, None, [2.0, 1.0, 1.0])
        x = aten.reshape.default(aten.permute.default(x, [0, 2, 1, 3, 4]), [12, 4, 5, 6])
        return flat(x, w)

    assert_folds(before, expected, V, W, passes=f"canonicalize,{FORCED}")


def test_frames_enlarged_apart_and_joined_with_a_repeated_border() -> None:
    """HunyuanVideo: the first frame is not doubled in time, and every border is replicated."""

    def before(x: Tensor, w: Tensor) -> Tensor:
        x = torch.cat([up(x[:, :, :1].squeeze(2)).unsqueeze(2), up(x[:, :, 1:], time=2)], 2)
        return F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"), w)

    def expected(x: Tensor, w: Tensor) -> Any:
        first = aten.squeeze.dim(aten.slice.Tensor(x, 2, 0, 1), 2)
        rest = aten.slice.Tensor(x, 2, 1, 2**63 - 1)
        first = aten.unsqueeze.default(first, 2)
        rest = aten.upsample_nearest3d.vec(rest, None, [2.0, 1.0, 1.0])
        x = aten.pad.default(aten.cat.default([first, rest], 2), [1, 1, 1, 1, 2, 0], "replicate", None)
        y = deep(x, w)
        return aten.slice.Tensor(aten.slice.Tensor(y, 3, 2, -2), 4, 2, -2)

    assert_folds(before, expected, V, K)


def test_a_time_pad_and_one_sided_zeros() -> None:
    def before(x: Tensor, w: Tensor) -> Tensor:
        return F.conv3d(F.pad(up(x), (0, 1, 2, 3, 2, 0)), w)

    def expected(x: Tensor, w: Tensor) -> Any:
        y = deep(aten.pad.default(x, [0, 1, 1, 2, 2, 0], "constant", 0.0), w)
        return aten.slice.Tensor(aten.slice.Tensor(y, 3, 1, -2), 4, 1, -2)

    assert_folds(before, expected, V, K)


def test_no_padding_is_cut() -> None:
    def expected(x: Tensor, w: Tensor) -> Any:
        return aten.slice.Tensor(aten.slice.Tensor(flat(x, w), 2, 1, -1), 3, 1, -1)

    assert_folds(lambda x, w: F.conv2d(up(x), w), expected, X, W)


def test_a_pad_is_folded_before() -> None:
    assert_folds(lambda x, w: F.conv2d(F.pad(up(x), (1, 1, 1, 1)), w), flat, X, W, passes=f"fold_pad,{FORCED}")


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x[1:],
        lambda x: x.select(0, 1).unsqueeze(0),
        lambda x: x.permute(1, 0, -2, -1).reshape(2, 4, 10, 12),
        lambda x: F.pad(x, (2, 4, 0, 0)),
        lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1)),
        lambda x: x.float().double(),
    ],
)
def test_other_steps(between: Callable[[Tensor], Tensor]) -> None:
    assert_computes(lambda x, w: conv(between(up(x)), w), X.double(), W.double(), passes=f"canonicalize,{FORCED}")


# --- what is left alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (lambda x, w: (lambda u: conv(u, w).sum() + u.sum())(up(x)), "the enlarged activation has 2 readers"),
        (
            lambda x, w: conv(F.interpolate(x, scale_factor=3.0), w),
            "enlarges rows and columns 3 and 3 times, not twice",
        ),
        (lambda x, w: conv(F.interpolate(x, size=(10, 6)), w), "enlarges rows and columns 2 and 1 times, not twice"),
        (
            lambda x, w: conv(F.interpolate(x, scale_factor=(2.0, 2.1)), w),
            "enlarges 5x6 to 10x12, not rows and columns by whole numbers up to 40",
        ),
        (
            lambda x, w: conv(x.repeat_interleave(3, 2).repeat_interleave(2, 3), w),
            "enlarges rows and columns 3 and 2 times, not twice",
        ),
        (
            lambda x, w: (lambda u: conv(u.repeat_interleave(2, 3), w).sum() + u.sum())(x.repeat_interleave(2, 2)),
            "the enlarged activation has 2 readers",
        ),
        (lambda x, w: F.conv2d(up(x), w, stride=2, padding=1), "stride (2, 2) and dilation (1, 1), not 1"),
        (lambda x, w: F.conv2d(up(x), w, padding=2, dilation=2), "stride (1, 1) and dilation (2, 2), not 1"),
        (lambda x, w: F.conv2d(up(x), w[:2, :2], padding=1, groups=2), "2 groups"),
        (lambda x, w: F.conv2d(up(x), w, padding=2), "padding (2, 2) of rows or columns, not 1 or none"),
        (
            lambda x, w: conv(F.pad(up(x), (1, 1, 1, 1), mode="replicate"), w),
            "padding (1, 1) of rows or columns that are padded already",
        ),
        (lambda x, w: conv(F.pad(up(x), (1, 1, 1, 1), mode="reflect"), w), "pads the enlarged activation reflect"),
        (lambda x, w: conv(F.pad(up(x), (1, 1, 1, 1), value=2.0), w), "pads the enlarged activation by 2"),
        (lambda x, w: conv(F.pad(up(x), (-1, 1, 0, 0)), w), "the pad crops (negative width)"),
        (
            lambda x, w: F.conv2d(F.pad(F.pad(up(x), (1, 0, 0, 0), mode="replicate"), (1, 1)), w),
            "the enlarged activation is padded twice",
        ),
        (lambda x, w: conv(up(x).permute(0, 1, 3, 2), w), "rows or columns of the enlarged activation change places"),
        (lambda x, w: conv(up(x)[:, :, 1:], w), "takes apart rows or columns of the enlarged activation"),
        (lambda x, w: conv(up(x).reshape(2, 4, 20, 6), w), "rows and columns of the enlarged activation are reshaped"),
        (lambda x, w: conv(torch.cat([up(x), up(x)], 2), w), "joined along rows or columns of the enlarged activation"),
        (lambda x, w: conv(torch.cat([up(x), x.repeat(1, 1, 2, 2)]), w), "joined with what is not enlarged"),
        (
            lambda x, w: F.conv2d(torch.cat([F.pad(up(x), (1, 0)), F.pad(up(x), (0, 1))]), w),
            "the joined activations are padded differently",
        ),
        (lambda x, w: conv(F.silu(up(x)), w), None),
        (lambda x, w: conv(x, w), None),
        (lambda x, w: F.conv2d(up(x), w[..., :1, :1]), None),
        (lambda x, w: conv(F.interpolate(x, size=(5, 6)), w), None),
    ],
)
def test_refusals(before: Any, reason: str | None) -> None:
    _, reports = rewrite(before, X, W, passes=FORCED)
    folded = reports[0].counters["fold_upsample"]
    assert refusals(reports) == ([] if reason is None else [reason])
    assert reason is None or not folded


# --- the rule that chooses --------------------------------------------------------------------------------------------


def chosen(channels: int, device: str, dtype: torch.dtype, passes: str = "fold_upsample", **options: str) -> list[str]:
    """Why a convolution is left alone, on a device that need not be there."""
    with new_fake_mode():
        x = torch.empty(1, channels, 8, 8, device=device, dtype=dtype)
        w = torch.empty(8, channels, 3, 3, device=device, dtype=dtype)
    _, reports = rewrite(sums(lambda x, w: conv(up(x), w)), x, w, passes=passes, options=options)
    assert len(reports[0].matches) + len(refusals(reports)) <= 1
    return [m.note for m in reports[0].matches] + refusals(reports)


@pytest.mark.parametrize(
    ("channels", "device", "dtype", "said"),
    [
        (64, "cuda", torch.bfloat16, "64 -> 8 channels"),
        (96, "cuda", torch.float16, "96 -> 8 channels"),
        (32, "cuda", torch.float16, "32 channels: no gain measured below 64"),
        (64, "cuda", torch.float32, "no gain measured for torch.float32"),
        (64, "cpu", torch.bfloat16, "no gain measured on cpu"),
    ],
)
def test_auto(channels: int, device: str, dtype: torch.dtype, said: str) -> None:
    assert chosen(channels, device, dtype) == [said]
    assert chosen(channels, device, dtype, upsample_conv="on") == [f"{channels} -> 8 channels"]
    assert chosen(channels, device, dtype, upsample_conv="off") == []
    assert chosen(channels, device, dtype, "fold_upsample{phases=auto}", upsample_conv="off") == [said]


# --- numbers ----------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Two levels of a decoder; as video or as pictures, with Wan's or diffusers' enlargement."""

    def __init__(self, video: bool, channels: int, padding: int, exact: bool, bias: bool) -> None:
        super().__init__()
        make: Any = nn.Conv3d if video else nn.Conv2d
        pads = (0, padding, padding) if video else padding
        self.exact = exact
        self.convs = nn.ModuleList(
            [make(channels, channels, (1, 3, 3) if video else 3, 1, pads, bias=bias) for _ in "ab"]
        )
        self.norm = nn.GroupNorm(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        for one in self.convs:
            y = (
                up(self.norm(x).float(), "nearest-exact").type_as(x)
                if self.exact and x.dim() == 4
                else up(self.norm(x))
            )
            x = F.silu(one(y))
        return x


@st.composite
def decoders(draw: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    video, channels = draw(st.booleans()), draw(st.integers(1, 5))
    model = Decoder(video, channels, draw(st.integers(0, 1)), draw(st.booleans()), draw(st.booleans()))
    size = [draw(st.integers(1, 3)), channels, *([draw(st.integers(1, 3))] if video else [])]
    x = torch.randn(*size, draw(st.integers(2, 6)), draw(st.integers(2, 6)))
    return model.eval(), x.contiguous(memory_format=DEEP if video else FLAT) if draw(st.booleans()) else x


@given(decoders())
def test_property(drawn: tuple[nn.Module, Tensor]) -> None:
    """In half precision a model of two such convolutions and little else errs 1.4 times as much: see `Pass.exact`."""
    model, x = drawn
    assert_equivalent(model, (x,), dtypes=(torch.float64,), options=ON)
    assert pvae.report(None).graphs[-1].matches("fold_upsample") == 2
    pvae.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("video", [False, True])
def test_narrow_dtypes(video: bool, dtype: torch.dtype) -> None:
    model = Decoder(video, 16, 1, True, True).to(dtype)
    x = torch.randn(1, 16, *([2] if video else []), 8, 9).to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        eager = relative_error(model(x), exact)
        ours = relative_error(pvae.compile(copy.deepcopy(model), engine="eager", **ON)(x), exact)
    assert 0 < ours < 1.6 * eager


@pytest.mark.parametrize("video", [False, True])
def test_symbolic_sizes(video: bool) -> None:
    model = Decoder(video, 4, 1, True, True)
    compiled = torch.compile(model, backend="pvae", dynamic=True, options={"engine": "eager", **ON})
    with torch.no_grad():
        for n, t, h, w in [(2, 3, 5, 6), (3, 4, 7, 9), (5, 2, 4, 8)]:
            x = torch.randn(n, 4, *([t] if video else []), h, w)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(pvae.report(model).graphs) == 1 and pvae.report(model).matches("fold_upsample") == 2


@pytest.mark.parametrize("weights", ["live", "frozen"])
def test_two_instances_compile_once(weights: str) -> None:
    """Phase weights are computed from the instance's own weights, as they are at the call."""
    models = [Decoder(False, 4, 1, True, True) for _ in range(2)]
    x, options = torch.randn(1, 4, 5, 6), {"engine": "eager", "weights": weights, **ON}
    compiled = [torch.compile(m, backend="pvae", options=options, dynamic=False) for m in models]
    with torch.no_grad():
        for _ in range(2):
            for model, function in zip(models, compiled, strict=True):
                torch.testing.assert_close(function(x), model(x), rtol=1e-4, atol=1e-5)
                for one in model.convs:
                    one.weight += 0.1
    assert len(pvae.report(None).graphs) == 1


# --- sharded ----------------------------------------------------------------------------------------------------------

SHARDED = "fold_pad,shard," + FORCED


def counted(found: Any, rule: str) -> list[int]:
    return [sum(r.counters[rule] for r in reports) for reports in found.reports]


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
@pytest.mark.parametrize("rows", [9, 7])
def test_halo_rows_are_fetched_of_the_small_picture(rows: int, mode: str) -> None:
    w = torch.randn(2, 2, 3, 3, dtype=torch.float64)

    def before(x: Tensor, w: Tensor) -> Tensor:
        if mode == "replicate":
            return F.conv2d(F.pad(up(x), (1, 1, 1, 1), mode=mode), w)
        return conv(conv(up(x), w), w)

    args = torch.randn(1, 2, rows, 4, dtype=torch.float64), w
    found = shard(before, *args, weights=1, passes=SHARDED)
    assert counted(found, "fold_upsample") == [1, 1, 1]
    assert_same(found, before, *args)
    first = next(n for n in found.graphs[1].graph.nodes if n.target is fetch and len(n.args[3]) == 3)
    bounds = first.args[2]
    assert bounds[-1] == rows and first.args[3] == tuple((a - 1, b + 1) for a, b in pairwise(bounds))


def test_rows_and_columns_over_a_mesh() -> None:
    w = torch.randn(2, 2, 3, 3, 3, dtype=torch.float64)

    def before(x: Tensor, w: Tensor) -> Tensor:
        return F.conv3d(F.pad(up(x), (1, 1, 1, 1, 2, 0)), w)

    args = torch.randn(1, 2, 3, 5, 6, dtype=torch.float64), w
    found = shard(before, *args, mesh=(2, 2), weights=1, passes=SHARDED, shard_dims="hw")
    assert counted(found, "fold_upsample") == [1] * 4
    assert_same(found, before, *args)


def test_ranks_without_rows_are_left_alone() -> None:
    w = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    args = torch.randn(1, 2, 2, 4, dtype=torch.float64), w
    found = shard(lambda x, w: conv(up(x), w), *args, weights=1, passes=SHARDED)
    assert counted(found, "fold_upsample") == [0, 0, 0]
    assert_same(found, lambda x, w: conv(up(x), w), *args)


@pytest.mark.parametrize(
    ("have", "need", "fill", "reason"),
    [
        ((0, 10, 13), ((-1, 11), (9, 14)), "zeros", "the ranks hold rows (0, 10, 13) of the enlarged activation: not whole ones of the small one, or none"),
        ((0, 10, 10), ((-1, 6), (4, 11)), "zeros", "the ranks hold rows (0, 10, 10) of the enlarged activation: not whole ones of the small one, or none"),
        ((0, 10, 20), ((-1, 11), (8, 21)), "zeros", "the ranks fetch rows ((-1, 11), (8, 21)) of the enlarged activation, not all alike"),
        ((0, 10, 20), ((-1, 11), (9, 21)), "reflect", "fetches reflect beyond the border of the enlarged activation"),
        ((0, 10), ((1, 8),), "zeros", "cuts the enlarged activation for this rank alone"),
    ],
)  # fmt: skip
def test_fetches_that_are_left_alone(have: Any, need: Any, fill: str, reason: str) -> None:
    graph = torch.fx.Graph()
    with new_fake_mode():
        x, w = torch.empty(1, 2, 5, 4), torch.empty(2, 2, 3, 3)
    nodes = [graph.placeholder("x"), graph.placeholder("w")]
    for node, fake in zip(nodes, (x, w), strict=True):
        node.meta["val"] = fake
    output = graph.output((nodes[0],))
    build = Builder(output)
    big = build(aten.upsample_nearest2d.vec, nodes[0], None, [2.0, 2.0])
    got = build(aten.conv2d.default, build(fetch, big, 2, have, need, 0, fill, "lockstep:0,1"), nodes[1])
    found = FoldUpsample(forced=True).match(got)
    assert isinstance(found, Refusal) and found.reason == reason
