"""conv3d_unfold: each form at the convolutions that it suits, what it folds in, and why it leaves others alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pvae
from pvae.passes.conv3d_unfold import CONV3D_UNFOLD
from pvae.runtime.torch_compat import new_fake_mode
from pvae.testing import assert_equivalent, assert_rewrites_to, refusals, rewrite, video_models

aten = torch.ops.aten
unfold = torch.ops.pvae.conv3d_unfold.default
FORCED = "conv3d_unfold{form=unfold2d}"
X, W, B = torch.randn(2, 4, 5, 8, 8), torch.randn(6, 4, 3, 3, 3), torch.randn(6)


def sums(function: Any) -> Any:
    """`function` reduced to a number, so that no output has to be laid out again."""
    return lambda *args: function(*args).sum()


# --- linear ----------------------------------------------------------------------------------------------------------


def test_patches_become_a_linear() -> None:
    def expected(x: Tensor, w: Tensor, b: Tensor) -> Any:
        x = aten.slice.Tensor(x, 2, 0, 4)  # the fifth frame fills no patch
        x = aten.permute.default(aten.reshape.default(x, [2, 4, 2, 2, 2, 4, 4, 2]), [0, 2, 4, 6, 1, 3, 5, 7])
        x = aten.reshape.default(x, [2, 2, 2, 4, 64])
        y = aten.linear.default(x, aten.reshape.default(w, [6, -1]), b)
        return (aten.sum.default(aten.permute.default(y, [0, 4, 1, 2, 3])),)

    args = X, torch.randn(6, 4, 2, 4, 2), B
    before = sums(lambda x, w, b: F.conv3d(x, w, b, stride=(2, 4, 2)))
    reports = assert_rewrites_to(before, expected, *args, passes="conv3d_unfold")
    assert [(m.rule, m.note) for m in reports[0].matches] == [("linear", "kernel 2x4x2 = stride")]


def test_pointwise_needs_no_patches() -> None:
    def expected(x: Tensor, w: Tensor) -> Any:
        x = aten.permute.default(x, [0, 2, 3, 4, 1])
        y = aten.linear.default(x, aten.reshape.default(w, [6, -1]), None)
        return (aten.sum.default(aten.permute.default(y, [0, 4, 1, 2, 3])),)

    assert_rewrites_to(sums(F.conv3d), expected, X, W[:, :, :1, :1, :1], passes="conv3d_unfold")


@pytest.mark.parametrize(
    ("groups", "padding", "dilation", "linear"),
    [(1, 0, 1, True), (2, 0, 1, False), (1, 1, 1, False), (1, 0, 2, False), (1, (0, 0, 1), 1, False)],
)
def test_linear_only_for_plain_patches(groups: int, padding: Any, dilation: int, linear: bool) -> None:
    weight = torch.randn(6, 4 // groups, 2, 2, 2)
    _, reports = rewrite(
        lambda x, w: F.conv3d(x, w, None, 2, padding, dilation, groups), X, weight, passes="conv3d_unfold"
    )
    assert [m.rule for m in reports[0].matches] == (
        ["linear"] if linear else reports[0].counters["unfold2d"] * ["unfold2d"]
    )


def test_dilation_means_nothing_in_a_kernel_of_one() -> None:
    _, reports = rewrite(lambda x, w: F.conv3d(x, w, dilation=3), X, W[:, :, :1, :1, :1], passes="conv3d_unfold")
    assert reports[0].matches[0].rule == "linear"


@pytest.mark.parametrize(
    ("kernel", "stride", "groups", "rule"),
    [
        ((1, 1, 1), (1, 1, 1), 1, "linear"),
        ((1, 1, 1), (1, 1, 1), 2, "linear"),
        ((2, 4, 2), (2, 4, 2), 1, "linear"),
        ((1, 3, 3), (1, 2, 1), 1, "frames"),
        ((1, 3, 3), (2, 2, 1), 1, None),
        ((3, 3, 3), (2, 1, 2), 1, "unfold2d"),
    ],
)
def test_every_form_with_symbolic_sizes(kernel: Any, stride: Any, groups: int, rule: str | None) -> None:
    """Sizes of batch, time, height and width may change, with no more compiles than without pvae."""
    model = nn.Sequential(nn.Conv3d(4, 6, kernel, stride, groups=groups), nn.SiLU())
    plain: list[int] = []

    def counting(gm: Any, inputs: Any) -> Any:
        plain.append(1)
        return gm.forward

    baseline = torch.compile(model, backend=counting, dynamic=True)
    options = {"engine": "eager", "conv3d": "unfold2d"}
    with torch.no_grad():
        # Whole patches: whether any input is left over is a question that one graph cannot leave open.
        sizes = [(2, 4, 4, 8, 10), (3, 4, 8, 12, 14), (2, 4, 6, 16, 16)]
        for size in sizes:
            baseline(torch.randn(size))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="pvae", dynamic=True, options=options)
        for size in sizes:
            x = torch.randn(size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        graphs = pvae.report(model).graphs
        assert len(graphs) == len(plain)
        x = torch.randn(2, 4, 5, 9, 11)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    for graph in graphs:
        (report,) = [p for p in graph.passes if p.name == "conv3d_unfold"]
        assert [m.rule for m in report.matches] == ([rule] if rule else [])
        if not rule:
            assert refusals([report]) == ["strides over a symbolic number of frames"]


# --- groups as a batched product --------------------------------------------------------------------------------------


def test_a_grouped_pointwise_convolution_is_a_batched_product() -> None:
    def expected(x: Tensor, w: Tensor, b: Tensor) -> Any:
        x = aten.reshape.default(aten.transpose.int(x, 0, 1), [2, 2, 640])
        y = aten.bmm.default(aten.reshape.default(w, [2, 3, 2]), x)
        y = aten.transpose.int(aten.reshape.default(y, [6, 2, 5, 8, 8]), 0, 1)
        return (aten.sum.default(aten.add.Tensor(y, aten.reshape.default(b, [6, 1, 1, 1]))),)

    before = sums(lambda x, w, b: F.conv3d(x, w, b, groups=2))
    reports = assert_rewrites_to(before, expected, X, W[:, :2, :1, :1, :1], B, passes="conv3d_unfold")
    assert [(m.rule, m.note) for m in reports[0].matches] == [("linear", "2 groups of 2 channels")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_grouped_conv2d_reads_channels_last_as_it_lies(dtype: torch.dtype) -> None:
    """On a GPU that need not be there; x is viewed, not copied, whatever its batch."""
    with new_fake_mode():
        x = torch.empty(2, 8, 5, 7, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
        w = torch.empty(12, 2, 1, 1, device="cuda", dtype=dtype)
    gm, reports = rewrite(sums(lambda x, w: F.conv2d(x, w, groups=4)), x, w, passes="conv3d_unfold")
    (product,) = [n for n in gm.graph.nodes if n.target is aten.bmm.default]
    assert [tuple(n.meta["val"].shape) for n in (*product.args, product)] == [(4, 3, 2), (4, 2, 70), (4, 3, 70)]
    assert product.args[1].meta["val"].stride() == (2, 1, 8)
    assert reports[0].counters["linear"] == 1


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((6, 2, 1, 1), {"stride": 2}),
        ((6, 2, 1, 1), {"padding": 1}),
        ((6, 2, 1, 3), {}),
        ((8, 1, 1, 1), {"groups": 4}),  # depthwise
        ((6, 4, 1, 1), {"groups": 1}),
    ],
)
def test_only_plain_groups_become_a_product(shape: tuple[int, ...], options: dict[str, int]) -> None:
    _, reports = rewrite(
        lambda x, w: F.conv2d(x, w, **{"groups": 2, **options}), X[:, :, 0], torch.randn(shape), passes="conv3d_unfold"
    )
    assert not reports[0].matches and not reports[0].refusals


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cpu", torch.bfloat16, "oneDNN's grouped convolution is kept for torch.bfloat16"),
        ("meta", torch.float32, "no measurement for device type 'meta'"),
    ],
)
def test_where_atens_grouped_convolution_is_kept(device: str, dtype: torch.dtype, reason: str) -> None:
    x, w = X.to(device, dtype), W[:, :2, :1, :1, :1].to(device, dtype)
    for args, call in (((x[:, :, 0], w[:, :, 0]), F.conv2d), ((x, w), F.conv3d)):
        _, (report,) = rewrite(lambda x, w, call=call: call(x, w, groups=2), *args, passes="conv3d_unfold")
        assert reason in refusals([report])
        assert [m.rule for m in report.matches] == (["frames"] if call is F.conv3d else [])


def test_another_form_can_be_asked_for() -> None:
    args = X[:, :, 0], W[:, :2, 0, :1, :1]
    for form in ("native", "channels_last"):
        gm, _ = rewrite(
            lambda x, w: F.conv2d(x, w, groups=2), *args, passes="conv_policy,conv3d_unfold", options={"conv3d": form}
        )
        assert not [n for n in gm.graph.nodes if n.target is aten.bmm.default]


@given(
    st.data(),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(),
    st.sampled_from(["auto", "on"]),
)
def test_property_grouped_pointwise(data: st.DataObject, dtype: torch.dtype, bias: bool, layout: str) -> None:
    groups, inside, out = data.draw(st.tuples(st.integers(2, 4), st.integers(2, 5), st.integers(1, 4)))
    positions = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=3))
    kind = nn.Conv2d if len(positions) == 2 else nn.Conv3d
    model = kind(groups * inside, groups * out, 1, groups=groups, bias=bias)
    x = torch.randn(data.draw(st.integers(1, 3)), groups * inside, *positions)
    if data.draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    assert_equivalent(model, (x,), dtypes=(dtype,), options={"channels_last": layout})


def test_two_instances_with_groups_share_one_compile() -> None:
    models = [nn.Sequential(nn.Conv2d(6, 8, 1, groups=2), nn.SiLU(), nn.Conv2d(8, 4, 1, groups=4)) for _ in range(2)]
    x = torch.randn(2, 6, 4, 5)
    with torch.no_grad():
        for model in models:
            expected = model(x)
            torch.testing.assert_close(pvae.compile(model)(x), expected, rtol=1e-5, atol=1e-6)
    graphs = pvae.report(None).graphs
    assert [g.shared_with for g in graphs] == [None, 0]
    assert [p.counters["linear"] for p in graphs[0].passes if p.name == "conv3d_unfold"] == [2]


# --- frames ----------------------------------------------------------------------------------------------------------


def test_one_frame_deep_is_a_conv2d() -> None:
    def expected(x: Tensor, w: Tensor, b: Tensor) -> Any:
        x = aten.slice.Tensor(x, 2, 0, 2**63 - 1, 2)
        x = aten.reshape.default(aten.permute.default(x, [0, 2, 1, 3, 4]), [6, 4, 8, 8])
        y = aten.conv2d.default(x, aten.select.int(w, 2, 0), b, [1, 3], [1, 2], [2, 1], 2)
        y = aten.reshape.default(y, [2, 3, 6, 6, 4])
        return (aten.sum.default(aten.permute.default(y, [0, 2, 1, 3, 4])),)

    args = X, torch.randn(6, 2, 1, 3, 3), B
    before = sums(lambda x, w, b: F.conv3d(x, w, b, (2, 1, 3), (0, 1, 2), (1, 2, 1), 2))
    reports = assert_rewrites_to(before, expected, *args, passes="conv3d_unfold")
    assert reports[0].matches[0].rule == "frames"


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_frames_refuses_padded_time_and_uneven_same() -> None:
    cases: list[tuple[Any, Tensor, str]] = [
        (lambda x, w: F.conv3d(x, w, padding=1), W[:, :, :1], "pads time with a kernel of one frame"),
        (lambda x, w: F.conv3d(x, w, padding="same"), W[:, :, :1, :, :2], "padding='same' is uneven here"),
    ]
    for before, weight, reason in cases:
        _, reports = rewrite(before, X, weight, passes="conv3d_unfold{form=auto}")
        assert not reports[0].matches and refusals(reports) == [reason]


# --- unfold2d --------------------------------------------------------------------------------------------------------


def test_unfold_takes_the_causal_pad_in() -> None:
    def expected(x: Tensor, w: Tensor, b: Tensor) -> Any:
        w = aten.reshape.default(aten.permute.default(w, [0, 2, 1, 3, 4]), [6, 12, 3, 3])
        y = unfold(x, aten.contiguous.default(w), b, 3, [1, 2, 1], [2, 0, 1, 1, 3, 2], [1, 1, 1], 1, False)
        return (aten.sum.default(y),)

    before = sums(lambda x, w, b: F.conv3d(F.pad(x, (2, 1, 1, 1, 2, 0)), w, b, stride=(1, 2, 1), padding=(0, 0, 1)))
    reports = assert_rewrites_to(before, expected, X, W, B, passes=FORCED)
    assert [(m.rule, m.note) for m in reports[0].matches] == [("unfold2d", "4 -> 6 channels")]


def test_unfold_in_channels_last_with_groups() -> None:
    def expected(x: Tensor, w: Tensor) -> Any:
        w = aten.reshape.default(aten.permute.default(w, [0, 2, 1, 3, 4]), [6, 6, 3, 3])
        w = torch.ops.pvae.channels_last.default(w)
        x = aten.contiguous.default(x, memory_format=torch.channels_last_3d)
        return (aten.sum.default(unfold(x, w, None, 3, [1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1], 2, True)),)

    before = sums(lambda x, w: F.conv3d(x, w, padding=1, groups=2))
    assert_rewrites_to(before, expected, X, W[:, :2], passes=FORCED, options={"channels_last": "on"})


@pytest.mark.parametrize(
    "pad",
    [
        lambda x: F.pad(x, (1,) * 6, mode="replicate"),
        lambda x: F.pad(x, (1,) * 6, value=2.0),
        lambda x: F.pad(x, (-1, 1, 0, 0, 1, 1)),
        lambda x: F.pad(x[:, :3], (1, 1, 1, 1, 1, 1, 0, 1)),
    ],
)
def test_unfold_leaves_other_pads_in_front(pad: Any) -> None:
    gm, reports = rewrite(lambda x, w: F.conv3d(pad(x), w), X, W, passes=FORCED)
    assert reports[0].counters["unfold2d"] == 1
    (node,) = [n for n in gm.graph.nodes if n.target is unfold]
    assert node.args[0].target is aten.pad.default and node.args[5] == [0] * 6


@pytest.mark.parametrize("form", ["native", "channels_last"])
def test_other_forms_leave_everything(form: str) -> None:
    for options in (
        {"passes": f"conv3d_unfold{{form={form}}}"},
        {"passes": "conv3d_unfold", "options": {"conv3d": form}},
    ):
        _, reports = rewrite(F.conv3d, X, W[:, :, :1, :1, :1], **options)
        assert not reports[0].matches and not reports[0].refusals


# --- the rule that chooses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("three_d", "two_d", "least", "reason"),
    [
        ("Mkldnn", "Mkldnn", 0.0, "ATen has a fast conv3d for this shape (Mkldnn)"),
        ("Slow3d", "Mkldnn", 0.0, None),
        ("Slow3d", "Mkldnn", 16e6, "0.83 MFLOP: conv3d is done sooner than the unfold has begun"),
        ("Slow3d", "Slow2d", 16e6, "ATen has no fast conv2d for this shape either (Slow2d)"),
    ],
)
def test_auto_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, three_d: str, two_d: str, least: float, reason: str | None
) -> None:
    monkeypatch.setattr("pvae.passes.conv_rules.UNFOLD_FLOPS", least)
    backends = {5: three_d, 4: two_d}
    monkeypatch.setattr("pvae.passes.conv_rules.conv_backend", lambda x, *rest: backends[x.dim()])
    _, reports = rewrite(lambda x, w: F.conv3d(x, w, padding=1), X, W, passes="conv3d_unfold")
    assert (len(reports[0].matches), refusals(reports)) == ((0, [reason]) if reason else (1, []))


def test_the_cpu_is_asked_as_it_is() -> None:
    _, reports = rewrite(lambda x, w: F.conv3d(x, w, padding=1), X.double(), W.double(), passes="conv3d_unfold")
    assert refusals(reports)[0].startswith("ATen has no fast conv2d for this shape either (Slow2d")


def on_gpu(channels: int, out: int, dtype: torch.dtype, **options: str) -> tuple[Any, list[Any]]:
    """A convolution on a GPU that need not be there."""
    with new_fake_mode():
        x = torch.empty(1, channels, 4, 8, 8, device="cuda", dtype=dtype)
        w, b = (torch.empty(*sizes, device="cuda", dtype=dtype) for sizes in ((out, channels, 3, 3, 3), (out,)))
    before = sums(lambda x, w, b: F.conv3d(x, w, b, padding=1))
    return rewrite(
        before, x, w, b, passes="conv3d_unfold", options={"machine": "a100", "disable": "conv_taps", **options}
    )


def test_auto_on_cuda_is_channels_last_with_the_bias_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    gm, _reports = on_gpu(96, 96, torch.bfloat16)
    (node,) = [n for n in gm.graph.nodes if n.target is unfold]
    assert node.args[2] is None and node.args[-1] is True
    assert node.args[1].target is torch.ops.pvae.channels_last.default
    assert next(iter(node.users)).target is aten.add.Tensor


@pytest.mark.parametrize(
    ("channels", "out", "dtype", "reason"),
    [
        (64, 64, torch.bfloat16, "64 -> 64 channels: cuDNN's conv3d is as fast (the unfold pays at 96)"),
        (128, 128, torch.float16, "128 -> 128 channels: cuDNN's conv3d is as fast (the unfold pays at 96)"),
        (96, 3, torch.bfloat16, "96 -> 3 channels: cuDNN's conv3d is as fast (the unfold pays at 96)"),
        (96, 96, torch.float32, "cuDNN's conv3d is kept for torch.float32"),
    ],
)
def test_auto_on_cuda_and_rocm(
    monkeypatch: pytest.MonkeyPatch, channels: int, out: int, dtype: torch.dtype, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert refusals(on_gpu(channels, out, dtype)[1]) == [reason]
    assert on_gpu(channels, out, dtype, conv3d="unfold2d")[1][0].counters["unfold2d"] == 1
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert on_gpu(channels, out, dtype)[1][0].counters["unfold2d"] == 1


def test_other_devices_are_refused() -> None:
    _, reports = rewrite(F.conv3d, X.to("meta"), W.to("meta"), passes="conv3d_unfold")
    assert refusals(reports) == ["no measurement for device type 'meta'"]


def test_integers_and_complex_are_refused() -> None:
    _, reports = rewrite(F.conv3d, X.to(torch.complex64), W.to(torch.complex64), passes=FORCED)
    assert set(refusals(reports)) == {"torch.complex64 is not a floating-point type"}
    _, reports = rewrite(F.conv3d, X.to(torch.int32), W.to(torch.int32), passes=FORCED)
    assert set(refusals(reports)) == {"torch.int32 is not a floating-point type"}


def test_other_convolutions_are_not_its_business() -> None:
    for args in ((F.conv2d, X[:, :, 0], W[:, :, 0]), (F.conv3d, X[0], W), (F.conv_transpose3d, X, W[:4, :4])):
        _, reports = rewrite(*args, passes=FORCED)
        assert not reports[0].matches and not reports[0].refusals
    assert CONV3D_UNFOLD.exact == "only rounding can differ"


@given(video_models(), st.sampled_from(["auto", "on"]))
def test_property_models(drawn: tuple[nn.Module, Tensor], layout: str) -> None:
    model, x = drawn
    options = {"conv3d": "unfold2d", "channels_last": layout}
    assert_equivalent(model, (x,), dtypes=(torch.float64, torch.float32, torch.float16), options=options)


@given(video_models(), st.integers(0, 12))
def test_property_any_number_of_rewrites(drawn: tuple[nn.Module, Tensor], limit: int) -> None:
    """Stopping anywhere leaves a right graph, with whichever rewrites came first."""
    model, x = drawn
    assert_equivalent(model, (x,), dtypes=(torch.float64,), options={"conv3d": "unfold2d", "rewrite_limit": limit})
