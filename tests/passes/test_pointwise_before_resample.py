"""pointwise_before_resample: what a pointwise convolution is moved in front of, what not and why; spatial norms as a whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pvae
from pvae.testing import agreement, assert_rewrites_to, refusals, relative_error, rewrite
from tests.passes.shard_case import assert_same, shard

aten = torch.ops.aten
PASSES = "canonicalize,pointwise_before_resample"
X, V = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 3, 5)
W, B, K = torch.randn(6, 4, 1, 1), torch.randn(6), torch.randn(6, 4, 1, 1, 1)
END = 9223372036854775807


def up(x: Tensor, *size: int, mode: str = "nearest") -> Tensor:
    return F.interpolate(x, size=size, mode=mode)


def count(function: Any, *args: Tensor, passes: str = PASSES) -> int:
    """How many convolutions are moved; what is computed stays."""
    gm, reports = rewrite(function, *args, passes=passes)
    torch.testing.assert_close(gm(*args)[0], function(*args), rtol=1e-4, atol=1e-5)
    return reports[1].counters["pointwise_before_resample"]


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_a_picture() -> None:
    assert_rewrites_to(
        lambda x, w, b: F.conv2d(up(x, 7, 10), w, b),
        lambda x, w, b: (aten.upsample_nearest2d.vec(aten.conv2d.default(x, w, b), [7, 10], None),),
        X, W, B, passes=PASSES,
    )  # fmt: skip


def test_the_parts_of_one_video_are_convolved_at_once() -> None:
    """CogVideoX's spatial norm: the first frame and the others are enlarged apart."""

    def expected(z: Tensor, k: Tensor) -> Any:
        y = aten.conv3d.default(z, k)
        first = aten.upsample_nearest3d.vec(aten.slice.Tensor(y, 2, 0, 1), [1, 6, 10], None)
        rest = aten.upsample_nearest3d.vec(aten.slice.Tensor(y, 2, 1, END), [4, 6, 10], None)
        return (aten.cat.default([first, rest], 2),)

    assert_rewrites_to(
        lambda z, k: F.conv3d(torch.cat([up(z[:, :, :1], 1, 6, 10), up(z[:, :, 1:], 4, 6, 10)], 2), k),
        expected, V, K, passes=PASSES,
    )  # fmt: skip


def test_different_activations_and_a_part_of_one_are_convolved_apart() -> None:
    def expected(z: Tensor, v: Tensor, k: Tensor) -> Any:
        part, other = aten.conv3d.default(aten.slice.Tensor(z, 2, 1, 2), k), aten.conv3d.default(v, k)
        first = aten.upsample_nearest3d.vec(part, [1, 6, 10], None)
        rest = aten.upsample_nearest3d.vec(other, [4, 6, 10], None)
        return (aten.cat.default([first, rest], 2),)

    assert_rewrites_to(
        lambda z, v, k: F.conv3d(torch.cat([up(z[:, :, 1:2], 1, 6, 10), up(v, 4, 6, 10)], 2), k),
        expected, V, V.clone(), K, passes=PASSES,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("enlarge", "moved"),
    [
        (lambda x: up(x, 6, 5), 1),
        (lambda x: up(x, 4, 6, mode="nearest-exact"), 1),
        (lambda x: F.interpolate(x, scale_factor=(1.7, 2.0)), 1),
        (lambda x: up(up(x, 6, 10), 12, 10), 1),
        (lambda x: x.repeat_interleave(3, 2).repeat_interleave(2, -1), 1),
        (lambda x: torch.cat([up(x, 6, 10), x.repeat(1, 1, 1, 2)], 2), 1),
        (lambda x: x.repeat_interleave(2, 1)[:, ::2], 0),
        (lambda x: F.silu(up(x, 6, 10)), 0),
        (lambda x: F.interpolate(x, size=(6, 10), mode="bilinear"), 0),
        (lambda x: torch.cat([up(x[:, :2], 6, 10), up(x[:, 2:], 6, 10)], 1), 0),
    ],
)
def test_what_copies_positions(enlarge: Any, moved: int) -> None:
    assert count(lambda x, w, b: F.conv2d(enlarge(x), w, b), X, W, B) == moved


def test_groups_and_padding_by_name_and_one_dimension() -> None:
    w = torch.randn(6, 2, 1, 1)
    assert count(lambda x, w: F.conv2d(up(x, 6, 10), w, padding="same", groups=2), X, w) == 1
    assert count(lambda x, w: F.conv1d(F.interpolate(x, size=12), w), X[:, :, 0], W[..., 0]) == 1


def test_those_who_read_the_enlarged_activation_keep_it() -> None:
    def before(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        large = up(x, 6, 10)
        return F.conv2d(large, w, b) * F.conv2d(large, w) + large.sum()

    assert count(before, X, W, B) == 2


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (lambda x, w: F.conv2d(up(x, 6, 10), w, stride=2), "stride (2, 2) and padding ((0, 0), (0, 0)), not 1 and none"),
        (lambda x, w: F.conv2d(up(x, 6, 10), w, padding=(0, 1)), "stride (1, 1) and padding ((0, 0), (1, 1)), not 1 and none"),
        (lambda x, w: F.conv2d(up(x, 2, 20), w), "the resampling may make fewer positions"),
        (lambda x, w: F.conv2d(up(x, 3, 5), w), "the resampling makes no more positions"),
        (lambda x, w: F.conv2d(up(x, 6, 10), w.expand(6, 4, 3, 1)), None),
        (lambda x, w: F.conv2d(x, w), None),
    ],
)  # fmt: skip
def test_refusals(before: Any, reason: str | None) -> None:
    _, reports = rewrite(before, X, W, passes=PASSES)
    assert not reports[1].matches and refusals(reports) == ([] if reason is None else [reason])


# --- numbers ----------------------------------------------------------------------------------------------------------


@given(
    video=st.booleans(), sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), min_size=3, max_size=3),
    channels=st.integers(1, 5), mode=st.sampled_from(("nearest", "nearest-exact")), cut=st.integers(0, 3),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)), layout=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_property(
    video: bool, sizes: Any, channels: int, mode: str, cut: int, dtype: torch.dtype, layout: bool
) -> None:
    """Any enlargement, of a video and of the parts of one; float64 to 1e-12, others within 1.25 times eager's error."""
    sizes = sizes if video else sizes[1:]
    x = torch.randn(2, channels, *[n for n, _ in sizes])
    w, b = torch.randn(3, channels, *[1] * len(sizes)), torch.randn(3)
    large = [n + more for n, more in sizes]
    cut = min(cut, sizes[0][0])

    def before(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = up(x, *large, mode=mode)
        if 0 < cut < x.shape[2]:
            z = torch.cat([up(x[:, :, :cut], *large, mode=mode), up(x[:, :, cut:], *large, mode=mode)], 2)
        return (F.conv3d if video else F.conv2d)(z, w, b)

    args = [a.to(dtype) for a in (x, w, b)]
    if layout:
        args[0] = args[0].contiguous(memory_format=torch.channels_last_3d if video else torch.channels_last)
    gm, reports = rewrite(before, *args, passes=PASSES)
    assert reports[1].matches or not any(more for _, more in sizes)
    found = agreement(gm(*args)[0], before(*args), before(*[a.double() for a in args]))
    assert found.ok, str(found)


class SpatialNorm(nn.Module):
    """`group_norm(f) * conv(z) + conv(z)`, z enlarged to f: MoVQ's of pictures; CogVideoX's, the first frame apart."""

    def __init__(self, video: bool, channels: int, latents: int) -> None:
        super().__init__()
        kind = nn.Conv3d if video else nn.Conv2d
        self.norm = nn.GroupNorm(2, channels)
        self.scale, self.shift = kind(latents, channels, 1), kind(latents, channels, 1)
        self.video = video

    def forward(self, f: Tensor, z: Tensor) -> Tensor:
        size = f.shape[2:]
        if self.video and f.shape[2] > 1:
            parts = (
                F.interpolate(z[:, :, :1], size=(1, *size[1:])),
                F.interpolate(z[:, :, 1:], size=(size[0] - 1, *size[1:])),
            )
            z = torch.cat(parts, 2)
        else:
            z = F.interpolate(z, size=size)
        return F.silu(self.norm(f) * self.scale(z) + self.shift(z))


class Decoder(nn.Module):
    """A level of a decoder with spatial norms: enlarged, normalised, convolved."""

    def __init__(self, video: bool, channels: int = 4, latents: int = 3) -> None:
        super().__init__()
        kind = nn.Conv3d if video else nn.Conv2d
        self.first, self.last = kind(latents, channels, 3, padding=1), kind(channels, channels, 3, padding=1)
        self.norms = nn.ModuleList(SpatialNorm(video, channels, latents) for _ in range(2))
        self.video = video

    def forward(self, z: Tensor) -> Tensor:
        f = self.norms[0](self.first(z), z)
        f = F.interpolate(f, scale_factor=(1.0, 4.0, 2.0) if self.video else (4.0, 2.0))
        return self.last(self.norms[1](f, z))


def latents(video: bool, frames: int = 3, height: int = 3, width: int = 4) -> Tensor:
    return torch.randn(1, 3, *([frames] if video else []), height, width)


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_spatial_norms_read_scale_and_shift_from_the_small_picture(video: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, z = Decoder(video).to(dtype), latents(video).to(dtype)
    compiled = pvae.compile(copy.deepcopy(model), engine="eager", norm_act="on", strict="on")
    with torch.no_grad():
        found = agreement(compiled(z), model(z), copy.deepcopy(model).double()(z.double()))
    assert found.ok, str(found)
    (graph,) = pvae.report(compiled).graphs
    assert graph.matches("pointwise_before_resample") == 2  # of the second norm: the first makes nothing larger
    (fused,) = [p for p in graph.passes if p.name == "fuse_norm_act"]
    assert [m.note for m in fused.matches] == [
        "group norm + scale + shift + silu", "group norm + enlarged scale + enlarged shift + silu"
    ]  # fmt: skip


@pytest.mark.parametrize("video", [False, True])
def test_sizes_that_change(video: bool) -> None:
    model = Decoder(video)
    options = {"engine": "eager", "norm_act": "on"}
    compiled = torch.compile(model, backend="pvae", dynamic=True, options=options)
    with torch.no_grad():
        for size in ((3, 5, 6), (3, 7, 9), (3, 4, 8)):
            z = latents(video, *size)
            torch.testing.assert_close(compiled(z), model(z), rtol=1e-4, atol=1e-5)
    (graph,) = pvae.report(model).graphs
    assert graph.matches("pointwise_before_resample") == 2 and graph.matches("fuse_norm_act") == 2


def test_two_instances_compile_once() -> None:
    models = [Decoder(True) for _ in range(2)]
    z, options = latents(True), {"engine": "eager", "norm_act": "on"}
    compiled = [torch.compile(m, backend="pvae", options=options, dynamic=False) for m in models]
    with torch.no_grad():
        for model, function in zip(models, compiled, strict=True):
            torch.testing.assert_close(function(z), model(z), rtol=1e-4, atol=1e-5)
    assert len(pvae.report(None).graphs) == 1


@pytest.mark.parametrize("rows", [6, 7])
def test_sharded(rows: int) -> None:
    """Moved before sharding, so that every rank convolves the rows of the small picture that it needs."""
    x, w = torch.randn(1, 2, rows, 4, dtype=torch.float64), torch.randn(3, 2, 1, 1, dtype=torch.float64)
    k = torch.randn(3, 3, 3, 3, dtype=torch.float64)

    def before(x: Tensor, w: Tensor, k: Tensor) -> Tensor:
        large = F.interpolate(x, scale_factor=2.0)
        return F.conv2d(F.group_norm(F.conv2d(large, w), 3) * F.conv2d(large, w) + F.conv2d(large, w), k, padding=1)

    found = shard(before, x, w, k, weights=2, passes="pointwise_before_resample,shard,fuse_norm_act{when=on}")
    assert_same(found, before, x, w, k)
    for reports in found.reports:
        assert reports[0].counters["pointwise_before_resample"] == 3
        assert [m.note for m in reports[-1].matches] in ([], ["group norm + enlarged scale + enlarged shift"])


def test_inductor_computes_the_same() -> None:
    model, z = Decoder(True), latents(True)
    compiled = pvae.compile(copy.deepcopy(model), norm_act="on")
    with torch.no_grad():
        assert relative_error(compiled(z), model(z)) < 1e-5
