"""conv_taps: what it takes in around a convolution, what must stay outside, and that models compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pvae
from pvae.runtime.torch_compat import new_fake_mode
from pvae.testing import assert_equivalent, assert_rewrites_to, refusals, rewrite, video_models

aten = torch.ops.aten
taps, lay = torch.ops.pvae.conv_taps.default, torch.ops.pvae.channels_last.default
FORCED: dict[str, Any] = {"passes": "conv_taps", "options": {"conv3d": "taps"}}
TAPS = {"conv3d": "taps"}
X, W, B = torch.randn(1, 4, 3, 6, 7), torch.randn(4, 4, 3, 3, 3), torch.randn(4)
CACHE, R = torch.randn(1, 4, 2, 6, 7), torch.randn(1, 4, 3, 6, 7)
ONES, SAME, CAUSAL = [1, 1, 1], [1, 1, 1, 1, 1, 1], [2, 0, 1, 1, 1, 1]


def sums(function: Any) -> Any:
    """`function` reduced to a number, so that no output has to be laid out again."""
    return lambda *args: function(*args).sum()


def conv(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return F.conv3d(x, w, b, padding=1)


def op(
    x: Any, before: Any, w: Any, b: Any, residual: Any, padding: list[int] = SAME, activation: str = "none"
) -> tuple[Any]:
    """The graph that has nothing but the op."""
    return (aten.sum.default(taps(x, before, lay(w), b, residual, ONES, padding, ONES, False, activation, [])),)


def taken(before: Any, *args: Tensor) -> Any:
    """The one op in the rewritten graph, whose results are compared in float64 as well."""
    gm, (report,) = rewrite(before, *args, **FORCED)
    wide = [a.double() if a.is_floating_point() else a for a in args]
    torch.testing.assert_close(rewrite(before, *wide, **FORCED)[0](*wide)[0], before(*wide), rtol=1e-12, atol=1e-12)
    assert report.counters["taps"] == 1
    (node,) = [n for n in gm.graph.nodes if n.target is taps]
    return node


# --- taken in --------------------------------------------------------------------------------------------------------


def test_a_plain_convolution() -> None:
    def expected(x: Tensor, w: Tensor, b: Tensor) -> Any:
        y = taps(x, None, lay(w), b, None, [1, 2, 1], [1, 1, 0, 0, 2, 2], [1, 1, 2], False, "none", [])
        return (aten.sum.default(y),)

    before = sums(lambda x, w, b: F.conv3d(x, w, b, (1, 2, 1), (1, 0, 2), (1, 1, 2)))
    (report,) = assert_rewrites_to(before, expected, X, W, B, **FORCED)
    assert [(m.rule, m.note) for m in report.matches] == [("taps", "4 -> 4 channels")]


def test_a_picture_whose_weight_is_laid_out_already() -> None:
    def expected(x: Tensor, w: Tensor) -> Any:
        y = taps(x, None, w, None, None, [1, 1], [1, 1, 1, 1], [1, 1], False, "none", [])
        return (aten.sum.default(y),)

    w = W[:, :, 0].contiguous(memory_format=torch.channels_last)
    assert_rewrites_to(sums(lambda x, w: F.conv2d(x, w, padding=1)), expected, X[:, :, 0], w, **FORCED)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_padding_same_of_an_even_kernel() -> None:
    node = taken(sums(lambda x, w: F.conv3d(x, w, padding="same")), X, W[..., :2, :2])
    assert node.args[6] == [1, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("pad", "own", "padding"),
    [
        ((1, 1, 1, 1, 2, 0), 0, CAUSAL),
        ((0, 1, 2, 3), (0, 1, 2), [0, 0, 3, 4, 2, 3]),
        ((1, 0), 1, [1, 1, 1, 1, 2, 1]),
    ],
)
def test_zero_pads(pad: tuple[int, ...], own: Any, padding: list[int]) -> None:
    def expected(x: Tensor, w: Tensor) -> Any:
        return op(x, None, w, None, None, padding)

    for value in (None, 0.0):
        before = sums(lambda x, w, value=value: F.conv3d(F.pad(x, pad, value=value), w, padding=own))
        assert_rewrites_to(before, expected, X, W, **FORCED)


@pytest.mark.parametrize("dim", [2, -3])
def test_a_causal_cache(dim: int) -> None:
    def before(x: Tensor, cache: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv3d(F.pad(torch.cat([cache, x], dim), (1, 1, 1, 1)), w, b).sum()

    def expected(x: Tensor, cache: Tensor, w: Tensor, b: Tensor) -> Any:
        return op(x, cache, w, b, None, [0, 0, 1, 1, 1, 1])

    (report,) = assert_rewrites_to(before, expected, X, CACHE, W, B, **FORCED)
    assert report.matches[0].note == "4 -> 4 channels, cache"


@pytest.mark.parametrize("activation", ["none", "silu", "relu"])
@pytest.mark.parametrize("first", [False, True])
def test_the_residual_on_either_side_and_the_activation(first: bool, activation: str) -> None:
    act = {"none": lambda y: y, "silu": F.silu, "relu": F.relu}[activation]

    def before(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        y = conv(x, w, b)
        return act(r + y if first else y + r).sum()

    def expected(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Any:
        return op(x, None, w, b, r, activation=activation)

    (report,) = assert_rewrites_to(before, expected, X, W, B, R, **FORCED)
    assert report.matches[0].note == "4 -> 4 channels, residual" + (f", {activation}" if activation != "none" else "")


def test_an_activation_before_the_residual_keeps_that_outside() -> None:
    node = taken(lambda x, w, r: (F.silu(conv(x, w)) + r).sum(), X, W, R)
    assert node.args[4] is None and node.args[9] == "silu" and next(iter(node.users)).target is aten.add.Tensor


def test_of_two_activations_the_first() -> None:
    node = taken(lambda x, w: F.silu(F.relu(conv(x, w))).sum(), X, W)
    assert node.args[9] == "relu" and next(iter(node.users)).target is aten.silu.default


def test_a_residual_that_is_computed_after_the_convolution() -> None:
    def before(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
        y = conv(x, w)
        return (y + r.exp()).sum()

    assert taken(before, X, W, R).args[4].target is aten.exp.default


def test_the_sum_of_two_convolutions_is_one_epilogue() -> None:
    """A block's shortcut: the second adds the first, whichever is written first."""

    def before(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return (conv(x, w) + conv(x, v)).sum()

    args = [t.double() for t in (X, W, 2 * W)]
    gm, (report,) = rewrite(before, *args, **FORCED)
    assert report.counters["taps"] == 2 and [m.note for m in report.matches].count("4 -> 4 channels, residual") == 1
    assert not [n for n in gm.graph.nodes if n.target is aten.add.Tensor]
    torch.testing.assert_close(gm(*args)[0], before(*args), rtol=1e-12, atol=1e-12)


def test_what_others_read_too_stays_for_them() -> None:
    def before(x: Tensor, cache: Tensor, w: Tensor) -> Tensor:
        joined = torch.cat([cache, x], 2)
        return F.conv3d(joined, w).sum() + joined[:, :, -2:].sum()

    node = taken(before, X, CACHE, W)
    assert node.args[1] is not None and any(n.target is aten.cat.default for n in node.graph.nodes)


# --- not taken in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pad",
    [
        lambda x: F.pad(x, SAME, value=2.0),
        lambda x: F.pad(x, SAME, mode="reflect"),
        lambda x: F.pad(x, SAME, mode="replicate"),
        lambda x: F.pad(x, SAME, mode="circular"),
        lambda x: F.pad(x, (-1, 1, 0, 0, 1, 1)),
        lambda x: F.pad(x[:, :3], (1, 1, 1, 1, 1, 1, 0, 1)),
    ],
)
def test_other_pads_stay_in_front(pad: Any) -> None:
    node = taken(sums(lambda x, w: F.conv3d(pad(x), w)), X, W)
    assert node.args[0].target is aten.pad.default and node.args[6] == [0] * 6


@pytest.mark.parametrize(
    "join",
    [
        lambda x, c: torch.cat([c[:, :1], x[:, 1:, :2]], 1),
        lambda x, c: torch.cat([c, x[:, :, :2]], 3),
        lambda x, c: torch.cat([c, x, c], 2),
        lambda x, c: torch.cat([x, x], 2),
        lambda x, c: torch.cat([c.repeat(2, 1, 1, 1, 1), x.repeat(2, 1, 1, 1, 1)], 2),
        lambda x, c: torch.cat([c.half(), x], 2),
        lambda x, c: torch.cat([c[:, :, :0], x], 2),
        lambda x, c: torch.cat([c.new_empty(0), x], 2),
    ],
)
def test_other_cats_stay_in_front(join: Any) -> None:
    node = taken(sums(lambda x, c, w: conv(join(x, c), w)), X, CACHE, W)
    assert node.args[0].target is aten.cat.default and node.args[1] is None


@pytest.mark.parametrize(
    ("after", "kept"),
    [
        (lambda y, r: y + r[:, :, :1], aten.add.Tensor),
        (lambda y, r: y + r[:, :1, :1, :1, :1], aten.add.Tensor),
        (lambda y, r: y[:, :, :1] + r, aten.slice.Tensor),
        (lambda y, r: y + r[0], aten.add.Tensor),
        (lambda y, r: y + r.repeat(2, 1, 1, 1, 1), aten.add.Tensor),
        (lambda y, r: y + (r > 0), aten.add.Tensor),
        (lambda y, r: torch.add(y, r, alpha=2), aten.add.Tensor),
        (lambda y, r: y + 1.0, aten.add.Tensor),
        (lambda y, r: y - r, aten.sub.Tensor),
        (lambda y, r: y + y, aten.add.Tensor),
        (lambda y, r: F.gelu(y), aten.gelu.default),
    ],
)
def test_other_epilogues_stay_behind(after: Any, kept: Any) -> None:
    node = taken(sums(lambda x, w, r: after(conv(x, w), r)), X, W, R)
    assert node.args[4] is None and node.args[9] == "none" and {u.target for u in node.users} == {kept}


def test_a_residual_of_another_dtype_stays_behind() -> None:
    """Its sum is not rounded to the convolution's dtype."""
    gm, (report,) = rewrite(sums(lambda x, w, r: conv(x, w) + r), X.half(), W.half(), R, **FORCED)
    (node,) = [n for n in gm.graph.nodes if n.target is taps]
    assert node.args[4] is None and report.matches[0].note == "4 -> 4 channels"


@pytest.mark.parametrize("after", [lambda y, r: (y + r) * y, lambda y, r: F.silu(y) + y, lambda y, r: y.relu() + y + r])
def test_a_convolution_with_two_users_keeps_its_result(after: Any) -> None:
    node = taken(sums(lambda x, w, r: after(conv(x, w), r)), X, W, R)
    assert node.args[4] is None and node.args[9] == "none" and len(node.users) == 2


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "args", "reason"),
    [
        (lambda x, w: F.conv3d(x, w, groups=2), (X, W[:, :2]), "2 groups"),
        (F.conv3d, (X.int(), W.int()), "torch.int32 is not a floating-point type"),
        (F.conv3d, (X[0], W), "no batch dimension"),
    ],
)
def test_refusals(before: Any, args: tuple[Tensor, ...], reason: str) -> None:
    _, (report,) = rewrite(before, *args, **FORCED)
    assert not report.matches and refusals([report]) == [reason]


def test_other_convolutions_are_not_its_business() -> None:
    for args in ((F.conv1d, X[:, :, 0, 0], W[:, :, 0, 0]), (F.conv_transpose3d, X, W)):
        _, (report,) = rewrite(*args, **FORCED)
        assert not report.matches and not report.refusals


@pytest.mark.parametrize(
    "options", [{"conv3d": f} for f in ("native", "channels_last", "unfold2d")] + [{"conv3d": "auto"}]
)
def test_left_alone_unless_chosen(options: dict[str, str]) -> None:
    """By itself never on the CPU, where the kernel does not run."""
    _, (report,) = rewrite(conv, X, W, passes="conv_taps", options=options)
    assert not report.matches


@pytest.mark.parametrize(
    ("channels", "dtype", "taken"),
    [(96, torch.bfloat16, True), (192, torch.float16, True), (96, torch.float32, False), (3, torch.bfloat16, False)],
)
def test_auto_on_a_gpu_that_need_not_be_there(
    monkeypatch: pytest.MonkeyPatch, channels: int, dtype: torch.dtype, taken: bool
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", None)
    with new_fake_mode():
        x = torch.empty(1, channels, 4, 480, 832, device="cuda", dtype=dtype)
        w = torch.empty(channels, channels, 3, 3, 3, device="cuda", dtype=dtype)
    _, (report,) = rewrite(sums(conv), x, w, passes="conv_taps")
    assert bool(report.matches) == taken and bool(report.refusals) != taken


# --- whole models ----------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """Pad, cache, convolve, add, activate, each or not; the frames come in two pieces, the second with a cache."""

    def __init__(
        self, channels: int, kernel: tuple[int, ...], cache: bool, pad: bool, add: int, activation: str
    ) -> None:
        super().__init__()
        convolution = nn.Conv2d if len(kernel) == 2 else nn.Conv3d
        self.first = convolution(channels, channels, kernel, padding="same" if not pad else 0)
        self.second = convolution(channels, channels, kernel, padding="same" if not pad else 0)
        self.cache, self.pad, self.add, self.activation = cache, pad, add, activation

    def around(self, conv: nn.Module, x: Tensor, before: Tensor | None) -> Tensor:
        y = x
        if self.pad:
            spatial = [w for k in reversed(conv.kernel_size[-2:]) for w in (k // 2, (k - 1) // 2)]
            frames = conv.kernel_size[0] - 1 if x.dim() == 5 else 0
            if before is not None and frames:
                before = before[:, :, -frames:]
                y = torch.cat([before, x], 2)
                frames -= before.shape[2]
            y = F.pad(y, [*spatial, frames, 0] if x.dim() == 5 else spatial)
        y = conv(y)
        y = {0: lambda: y, 1: lambda: y + x, 2: lambda: x + y}[self.add]()
        return {"none": lambda: y, "silu": lambda: F.silu(y), "relu": lambda: F.relu(y), "gelu": lambda: F.gelu(y)}[
            self.activation
        ]()

    def forward(self, x: Tensor) -> Tensor:
        y = self.around(self.first, x, None)
        return torch.cat([y, self.around(self.second, y, x if self.cache else None)], 1)


@st.composite
def around(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    spatial = draw(st.sampled_from((2, 3)))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(spatial))
    channels = draw(st.integers(1, 6))
    model = Around(
        channels,
        kernel,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 2)),
        draw(st.sampled_from(("none", "silu", "relu", "gelu"))),
    )
    x = torch.randn(draw(st.sampled_from((1, 1, 2))), channels, *(draw(st.integers(1, 6)) for _ in range(spatial)))
    return model.eval(), x


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(around())
def test_property_all_around_a_convolution(drawn: tuple[nn.Module, Tensor]) -> None:
    model, x = drawn
    assert_equivalent(model, (x,), dtypes=(torch.float64, torch.float32, torch.float16), options=TAPS)


@given(video_models(), st.integers(0, 6))
def test_property_models(drawn: tuple[nn.Module, Tensor], limit: int) -> None:
    """Whole, and with any number of rewrites: stopping anywhere leaves a right graph."""
    model, x = drawn
    assert_equivalent(model, (x,), dtypes=(torch.float64, torch.float16), options=TAPS)
    assert_equivalent(model, (x,), dtypes=(torch.float64,), options={**TAPS, "rewrite_limit": limit})


class Stream(nn.Module):
    """A residual block over a stream of frames."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3)

    def forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([cache, x], 2)
        return F.silu(x + self.conv(F.pad(joined, (1, 1, 1, 1)))), joined[:, :, -2:]


def test_symbolic_sizes() -> None:
    """The cache and the residual are taken in whatever the sizes; one compile."""
    model = Stream()
    compiled = torch.compile(model, backend="pvae", dynamic=True, options={"engine": "eager", **TAPS})
    with torch.no_grad():
        for t, h, w in ((3, 7, 9), (5, 8, 11), (4, 10, 6)):
            x, cache = torch.randn(1, 4, t, h, w), torch.randn(1, 4, 2, h, w)
            torch.testing.assert_close(compiled(x, cache), model(x, cache), rtol=1e-4, atol=1e-5)
    (graph,) = pvae.report(model).graphs
    (report,) = [p for p in graph.passes if p.name == "conv_taps"]
    assert [m.note for m in report.matches] == ["4 -> 4 channels, cache, residual, silu"]


@pytest.mark.parametrize("weights", ["live", "frozen"])
def test_two_instances_compile_once(weights: str) -> None:
    """Re-laid weights are the instance's own, as they are at the call."""
    models = [Stream() for _ in range(2)]
    options = {"engine": "eager", "weights": weights, **TAPS}
    compiled = [torch.compile(m, backend="pvae", options=options, dynamic=False) for m in models]
    with torch.no_grad():
        for _ in range(2):
            for model, function in zip(models, compiled, strict=True):
                torch.testing.assert_close(function(X, CACHE), model(X, CACHE), rtol=1e-4, atol=1e-5)
                model.conv.weight += 0.1
    assert len(pvae.report(None).graphs) == 1


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last_3d])
def test_the_caller_gets_eagers_layout(format: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.SiLU(), nn.Conv3d(6, 4, 3, padding=1))
    compiled = torch.compile(model, backend="pvae", options={"engine": "eager", **TAPS}, dynamic=False)
    x = X.contiguous(memory_format=format)
    with torch.no_grad():
        expected, got = model(x), compiled(x)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_through_inductor() -> None:
    model = nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.SiLU(), nn.Conv3d(6, 4, 3, padding=1))
    compiled = torch.compile(model, backend="pvae", options=TAPS, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X), rtol=1e-4, atol=1e-5)
    assert pvae.report(model).matches("conv_taps") == 2
