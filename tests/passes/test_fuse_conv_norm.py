"""fuse_conv_norm: a norm joins its convolution, with what else reads either; near misses say why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import pvae
from pvae.kernels import conv_taps_launch as launch
from pvae.options import parse_options
from pvae.passes.pipeline import Pipeline, run_pipeline
from pvae.passes.rule import Context, Report
from pvae.testing import agreement, assert_rewrites_to, capture, refusals, rewrite

aten = torch.ops.aten
taps, norm = torch.ops.pvae.conv_taps.default, torch.ops.pvae.channel_norm_act.default
both, compact = torch.ops.pvae.conv_taps_norm.default, torch.ops.pvae.compact.default
PASS = "fuse_conv_norm{where=any}"
EVERYWHERE = str(Pipeline.default()).replace("fuse_conv_norm", PASS)
OPTIONS: dict[str, Any] = {"engine": "eager", "conv3d": "taps", "norm_act": "on", "passes": EVERYWHERE}
ONES, SAME = [1, 1, 1], [1, 1, 1, 1, 1, 1]
X, W, B, G = torch.randn(2, 4, 3, 6, 7), torch.randn(4, 4, 3, 3, 3), torch.randn(4), torch.randn(4)
FRAMES, W2 = torch.randn(6, 4, 6, 7), torch.randn(4, 4, 3, 3)
X, W, R = (t.to(memory_format=torch.channels_last_3d) for t in (X, W, torch.randn(2, 4, 3, 6, 7)))
FRAMES, W2 = (t.to(memory_format=torch.channels_last) for t in (FRAMES, W2))


def conv(x: Any, w: Any, residual: Any = None, activation: str = "none", config: Any = ()) -> Any:
    return taps(x, None, w, None, residual, ONES, SAME, ONES, False, activation, list(config))


def rms(y: Any, g: Any = None) -> Any:
    return norm(y, g, None, "rms", 1e-6, 2.0, "silu")


def joined(x: Any, w: Any, g: Any = None, keep: bool = False, tail: int = 0, residual: Any = None) -> Any:
    plain = (x, None, w, None, residual, ONES, SAME, ONES, False, [])
    return both(*plain, g, None, "rms", 1e-6, 2.0, "silu", keep, tail)


def added(results: Any, of_y: Callable[[Any], Any] = lambda y: y) -> Any:
    """z + of_y(y), in the order in which the pass writes them."""
    y, z = results[0], results[1]
    return aten.add.Tensor(z, of_y(y))


def check(before: Callable[..., Any], expected: Callable[..., Any], *args: Tensor) -> str:
    """The rewritten graph, its values, and the note."""
    (report,) = assert_rewrites_to(before, expected, *args, passes=PASS)
    wide = [a.double() for a in args]
    want = before(*wide)
    want = want if isinstance(want, tuple) else (want,)
    for got, exact in zip(rewrite(before, *wide, passes=PASS)[0](*wide), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    (match,) = report.matches
    return match.note


# --- what is joined --------------------------------------------------------------------------------------------------


def test_a_norm() -> None:
    note = check(
        lambda x, w, g: rms(conv(x, w), g).sum(), lambda x, w, g: (aten.sum.default(joined(x, w, g)[1]),), X, W, G
    )
    assert note == "rms norm + silu"


def test_what_else_reads_the_convolution_gets_it() -> None:
    note = check(
        lambda x, w, r: aten.add.Tensor(rms(y := conv(x, w, r)), y).sum(),
        lambda x, w, r: (aten.sum.default(added(joined(x, w, keep=True, residual=r))),),
        X, W, R,
    )  # fmt: skip
    assert note == "rms norm + silu + its argument"


def test_two_norms_of_one_convolution() -> None:
    """One joins it, the other reads what that writes."""
    check(
        lambda x, w, g: aten.add.Tensor(rms(y := conv(x, w), g), rms(y)).sum(),
        lambda x, w, g: (aten.sum.default(added(joined(x, w, g, keep=True), rms)),),
        X, W, G,
    )  # fmt: skip


def test_the_norms_weight_is_moved_up() -> None:
    check(
        lambda x, w, g: rms(conv(x, w), aten.mul.Tensor(aten.reshape.default(g, [-1]), 2.0)).sum(),
        lambda x, w, g: (aten.sum.default(joined(x, w, aten.mul.Tensor(aten.reshape.default(g, [-1]), 2.0))[1]),),
        X, W, G.reshape(4, 1),
    )  # fmt: skip


def as_video(frames: Any) -> Any:
    return aten.permute.default(aten.reshape.default(frames, [2, 3, 4, 6, 7]), [0, 2, 1, 3, 4])


def test_frames_that_are_seen_as_a_video() -> None:
    """Wan's upsamplers: the convolution is of pictures, the norm and the next residual of the video."""
    note = check(
        lambda x, w: aten.add.Tensor(
            rms(v := as_video(taps(x, None, w, None, None, [1, 1], [1] * 4, [1, 1], False, "none", []))), v
        ).sum(),
        lambda x, w: (
            aten.sum.default(
                added(
                    both(
                        as_video(x), None, aten.unsqueeze.default(w, 2), None, None, ONES, [0, 0, 1, 1, 1, 1], ONES,
                        False, [], None, None, "rms", 1e-6, 2.0, "silu", True, 0,
                    )
                )
            ),
        ),
        FRAMES, W2,
    )  # fmt: skip
    assert note == "rms norm + silu + its argument"


@pytest.mark.parametrize(
    ("config", "kept"),
    [((8, 16, 64, 32, 32, 4, 2), False), ((4, 64, 64, 32, 32, 9, 4), False), ((4, 64, 16, 0, 32, 9, 4), True)],
)
def test_a_config_stays_if_a_program_holds_all_channels(config: tuple[int, ...], kept: bool) -> None:
    w = torch.randn(16, 4, 3, 3, 3).to(memory_format=torch.channels_last_3d)
    gm, _ = rewrite(lambda x, w: rms(conv(x, w, config=config)), X, w, passes=PASS)
    (node,) = [n for n in gm.graph.nodes if n.target is both]
    assert node.args[9] == (list(config) if kept else [])


# --- the causal cache ------------------------------------------------------------------------------------------------


def cached(function: Any, *args: Tensor) -> tuple[GraphModule, Report]:
    """Rewritten as within a model, where the second output is a cache whose memory is ours to lay out."""
    captured = capture(function, *args)
    context = Context(parse_options({}, {}), free_strides=frozenset({1}))
    reports = run_pipeline(captured.gm, Pipeline.parse("canonicalize," + PASS), context)
    for got, want in zip(captured.gm(*args), function(*args), strict=True):
        torch.testing.assert_close(got, want)
    return captured.gm, reports[-1]


@pytest.mark.parametrize(
    ("last", "frames"),
    [
        (lambda z: z[:, :, -2:].clone(), 2),
        (lambda z: z[:, :, -1:, :, :].clone(), 1),
        (lambda z: z[:, :, 1:3].clone(), 2),
        (lambda z: z[:, :, 1:], 2),
        (lambda z: z.clone(), 3),
        (lambda z: z[:, :, -5:].clone(), 3),
    ],
)
def test_a_cache_is_written_by_the_kernel(last: Any, frames: int) -> None:
    gm, report = cached(lambda x, w: ((z := rms(conv(x, w))).sum(), last(z)), X, W)
    (node,) = [n for n in gm.graph.nodes if n.target is both]
    assert node.args[-1] == frames and report.matches[0].note.endswith(f"{frames} frames of cache")
    assert not {aten.clone.default, aten.slice.Tensor, compact} & {n.target for n in gm.graph.nodes}
    _, cache = gm(X, W)
    assert cache.is_contiguous(memory_format=torch.channels_last_3d)
    assert cache.untyped_storage().nbytes() == cache.numel() * 4


@pytest.mark.parametrize(
    "last",
    [
        lambda z: z[:, :, :2].clone(),
        lambda z: z[:, :, -2::2].clone(),
        lambda z: z[:, :, -2:, 1:].clone(),
        lambda z: z[:, 1:].clone(),
        lambda z: z[:, :, -2:] * 2,
        lambda z: torch.cat([z[:, :, -1:], z[:, :, -1:]], 2),
    ],
)
def test_what_is_no_cache_is_read_from_the_result(last: Any) -> None:
    gm, report = cached(lambda x, w: ((z := rms(conv(x, w))).sum(), last(z)), X, W)
    (node,) = [n for n in gm.graph.nodes if n.target is both]
    assert node.args[-1] == 0 and "cache" not in report.matches[0].note


def test_the_caller_gets_eagers_layout_of_it() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        z = rms(conv(x, w).contiguous())
        return z.sum(), z.contiguous()[:, :, -2:].clone()

    gm, _ = rewrite(function, X, W, passes="canonicalize," + PASS)
    assert gm(X, W)[1].stride() == function(X, W)[1].stride()


# --- what is left ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (lambda x, w: norm(conv(x, w), None, None, "layer", 1e-6), "layer norm: it has a kernel of its own"),
        (lambda x, w: rms(conv(x, w, activation="silu")), "the convolution has an activation (silu)"),
        (
            lambda x, w: norm(conv(x, w), None, None, "rms", 1e-6, 1.0, "none", [1, 1, 0, 0, 0, 0], "replicate"),
            "it has a border, scale or shift",
        ),
        (
            lambda x, w: norm(conv(x, w), None, None, "rms", 1e-6, shift=torch.ones_like(x)),
            "it has a border, scale or shift",
        ),
        (lambda x, w: rms(y := conv(x, w), y[0, :, 0, 0, 0]), "its weight depends on the convolution"),
    ],
)
def test_near_misses_say_why(before: Callable[..., Any], reason: str) -> None:
    _, reports = rewrite(before, X, W, passes=PASS)
    assert refusals(reports) == [reason] and not reports[0].matches


@pytest.mark.parametrize(
    "before",
    [
        lambda x, w: rms(x),
        lambda x, w: rms(conv(x, w) * 2),
        lambda x, w: rms(conv(x, w).transpose(3, 4)),
        lambda x, w: rms(conv(x, w).permute(0, 2, 1, 3, 4).contiguous(), None),
    ],
)
def test_a_norm_of_something_else(before: Callable[..., Any]) -> None:
    _, reports = rewrite(before, X, W, passes=PASS)
    assert not refusals(reports) and not reports[0].matches


def test_frames_that_others_read_as_frames_stay() -> None:
    def before(x: Tensor, w: Tensor) -> Tensor:
        y = taps(x, None, w, None, None, [1, 1], [1] * 4, [1, 1], False, "none", [])
        return rms(as_video(y)).sum() + y.sum()

    assert not rewrite(before, FRAMES, W2, passes=PASS)[1][0].matches


def test_auto_asks_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it runs: Hopper, half precision, all channels in one program."""

    def auto(out: int, dtype: torch.dtype) -> list[str]:
        x = torch.randn(1, 32, 3, 6, 7, dtype=dtype).to(memory_format=torch.channels_last_3d)
        w = torch.randn(out, 32, 3, 3, 3, dtype=dtype).to(memory_format=torch.channels_last_3d)
        reports = rewrite(lambda x, w: rms(conv(x, w)).sum(), x, w, passes="fuse_conv_norm")[1]
        return refusals(reports) or [m.note for m in reports[0].matches]

    assert auto(96, torch.bfloat16) == ["cpu is no Hopper GPU"]
    monkeypatch.setattr(launch, "is_hopper", lambda device: True)
    monkeypatch.setattr(launch, "_processors", lambda device: 132)
    assert auto(96, torch.bfloat16) == auto(192, torch.float16) == ["rms norm + silu"]
    assert auto(384, torch.bfloat16) == ["a program does not hold all 384 channels"]
    assert auto(96, torch.float32)[0].startswith("a norm follows, but x is torch.float32")


# --- models ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Wan's residual block over a stream of frames: the first norm's argument is the residual, both results are cached."""

    def __init__(self, channels: int = 4, kernel: int = 3, enlarge: bool = False) -> None:
        super().__init__()
        self.enlarge = enlarge
        self.first = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.convs = nn.ModuleList(nn.Conv3d(channels, channels, 3, padding=(0, 1, 1)) for _ in range(2))
        self.gammas = nn.ParameterList(torch.randn(channels, 1, 1, 1) for _ in range(3))

    def norm(self, x: Tensor, i: int) -> Tensor:
        return F.silu(F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gammas[i])

    def forward(self, x: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        b, c, t, h, w = x.shape
        y = x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)
        if self.enlarge:
            y = F.interpolate(y, scale_factor=2.0, mode="nearest")
        y = self.first(y)
        x = y.view(b, t, c, y.shape[-2], y.shape[-1]).permute(0, 2, 1, 3, 4)
        residual, kept = x, []
        for i, conv in enumerate(self.convs):
            x = self.norm(x, i)
            kept.append(x[:, :, -2:].clone())
            x = conv(torch.cat([caches[i], x], 2))
        x = x + residual
        return self.norm(x, 2) + x, kept


def inputs(model: Block, frames: int, height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(frames)
    twice = 2 if model.enlarge else 1
    channels = model.first.in_channels
    x = torch.randn(1, channels, frames, height, width, generator=generator).to(dtype)
    caches = [torch.randn(1, channels, 2, twice * height, twice * width, generator=generator).to(dtype) for _ in "ab"]
    return x, caches


@given(
    enlarge=st.booleans(),
    kernel=st.sampled_from((1, 3)),
    sizes=st.tuples(st.integers(2, 4), st.integers(2, 6), st.integers(2, 6)),
    dtype=st.sampled_from((torch.float64, torch.bfloat16)),
    limit=st.none() | st.integers(0, 9),
)
def test_property_blocks(enlarge: bool, kernel: int, sizes: Any, dtype: torch.dtype, limit: int | None) -> None:
    """Whole, and with any number of rewrites: stopping anywhere leaves a right graph."""
    torch.manual_seed(0)
    model = Block(4, kernel, enlarge).to(dtype)
    x, caches = inputs(model, *sizes, dtype)
    options = {**OPTIONS, "rewrite_limit": limit, "upsample_conv": "on"}
    options = {k: v for k, v in options.items() if v is not None}
    compiled = pvae.compile(copy.deepcopy(model), **options)
    with torch.no_grad():
        got, want = compiled(x, caches), model(x, caches)
        exact = model.double()(x.double(), [c.double() for c in caches])
    found = agreement(got, want, exact)
    assert found.ok, str(found)
    if limit is None:
        assert pvae.report(compiled).matches("fuse_conv_norm") == 3


def test_two_instances_compile_once() -> None:
    models = [Block() for _ in range(2)]
    compiled = [torch.compile(m, backend="pvae", options=OPTIONS, dynamic=False) for m in models]
    given = inputs(models[0], 3, 4, 5, torch.float32)
    with torch.no_grad():
        for _ in range(2):
            for model, function in zip(models, compiled, strict=True):
                torch.testing.assert_close(function(*given), model(*given), rtol=1e-4, atol=1e-5)
                model.gammas[0] += 0.1
    assert len(pvae.report(None).graphs) == 1


def test_symbolic_sizes() -> None:
    """Joined whatever the sizes; a cache of an unknown number of frames is copied."""
    model = Block()
    compiled = torch.compile(model, backend="pvae", dynamic=True, options=OPTIONS)
    with torch.no_grad():
        for sizes in ((3, 4, 5), (4, 6, 7), (5, 8, 6)):
            given = inputs(model, *sizes, torch.float32)
            torch.testing.assert_close(compiled(*given), model(*given), rtol=1e-4, atol=1e-5)
    (graph,) = pvae.report(model).graphs
    (report,) = [p for p in graph.passes if p.name == "fuse_conv_norm"]
    assert len(report.matches) == 3


def test_through_inductor() -> None:
    model = Block()
    compiled = torch.compile(model, backend="pvae", options={**OPTIONS, "engine": "inductor"}, dynamic=False)
    given = inputs(model, 3, 4, 5, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), model(*given), rtol=1e-4, atol=1e-5)
    assert pvae.report(model).matches("fuse_conv_norm") == 3
