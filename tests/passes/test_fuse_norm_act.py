"""fuse_norm_act: every spelling of autoencoders becomes one op, near misses say why, the rest is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from pvae.passes.enlarged import LARGEST
from pvae.passes.rule import Report
from pvae.runtime.torch_compat import new_fake_mode
from pvae.testing import assert_rewrites_to, refusals, relative_error, rewrite
from tests.passes.norm_spellings import (
    C,
    by_mean,
    frames,
    joined,
    moved,
    norm,
    rms_over_last,
    twice,
    wan,
    wan_in_float32,
)

Function = Callable[..., Any]
PASSES = "canonicalize,fuse_norm_act"
ON = {"norm_act": "on"}

aten = torch.ops.aten
channel = torch.ops.pvae.channel_norm_act.default
group = torch.ops.pvae.group_norm_act.default

X, XH = torch.randn(2, C, 3, 4, 5), torch.randn(2, C, 3, 4, 5, dtype=torch.bfloat16)
PICTURE = torch.randn(2, C, 4, 5)
W, B, W3 = torch.randn(C), torch.randn(C), torch.randn(C, 1, 1, 1)
K = torch.randn(4, C, 3, 3, 3)


def check(before: Function, expected: Function, *args: Tensor) -> Report:
    """`assert_rewrites_to` for one result, summed: what is returned would get eager's memory, by one more op."""
    reports = assert_rewrites_to(
        lambda *a: before(*a).sum(), _summed(expected, len(args)), *args, passes=PASSES, options=ON
    )
    return reports[1]


def _summed(expected: Function, count: int) -> Function:
    letters = "abcdefgh"[:count]
    scope = {"expected": expected, "total": aten.sum.default}
    result: Function = eval(f"lambda {', '.join(letters)}: (total(expected({', '.join(letters)})),)", scope)
    return result


CHANNEL: dict[str, tuple[Function, Function, tuple[Tensor, ...]]] = {
    "normalize": (
        lambda x, w: F.silu(wan(x, w)),
        lambda x, w: channel(x, aten.reshape.default(w, [-1]), None, "l2", 1e-12, C**0.5, "silu"),
        (X, W3),
    ),
    "normalize in float32": (
        lambda x, w: F.silu(wan_in_float32(x, w)),
        lambda x, w: channel(x, aten.reshape.default(w, [-1]), None, "l2", 1e-12, C**0.5, "silu"),
        (XH, W3.to(XH.dtype)),
    ),
    "no activation": (
        lambda x, w: wan(x, w),
        lambda x, w: channel(x, aten.reshape.default(w, [-1]), None, "l2", 1e-12, C**0.5, "none"),
        (PICTURE, W3[..., 0]),
    ),
    "square root of the mean": (
        lambda x: F.silu(by_mean(x)),
        lambda x: channel(x, None, None, "rms", 1e-8, 1.0, "silu"),
        (X,),
    ),
    "between movedims": (
        lambda x: F.silu(moved(rms_over_last, x)),
        lambda x: channel(x, None, None, "rms", 1e-6, 1.0, "silu"),
        (X,),
    ),
    "weight and bias between movedims": (
        lambda x, w, b: F.relu(moved(lambda y: rms_over_last(y) * w + b, x)),
        lambda x, w, b: channel(x, w, b, "rms", 1e-6, 1.0, "relu"),
        (PICTURE, W, B),
    ),
    "half precision between movedims": (
        lambda x: F.gelu(moved(lambda y: rms_over_last(y).to(y.dtype), x)),
        lambda x: channel(x, None, None, "rms", 1e-6, 1.0, "gelu"),
        (XH,),
    ),
    "rms_norm": (
        lambda x, w: moved(lambda y: F.rms_norm(y, (C,), w, 1e-6), x),
        lambda x, w: channel(x, w, None, "rms", 1e-6, 1.0, "none"),
        (X, W),
    ),
    "layer norm": (
        lambda x, w, b: moved(lambda y: F.layer_norm(y, (C,), w, b, 1e-6), x),
        lambda x, w, b: channel(x, w, b, "layer", 1e-6, 1.0, "none"),
        (X, W, B),
    ),
    "scale and shift of a sample": (
        lambda x, s, t: F.silu(moved(rms_over_last, x) * (1 + s) + t),
        lambda x, s, t: channel(x, None, None, "rms", 1e-6, 1.0, "silu", scale=aten.add.Tensor(s, 1), shift=t),
        (X, torch.randn(2, C, 1, 1, 1), torch.randn(2, C, 1, 1, 1)),
    ),
    "a residual": (
        lambda x, r: moved(rms_over_last, x) + r,
        lambda x, r: channel(x, None, None, "rms", 1e-6, 1.0, "none", shift=r),
        (X, torch.randn_like(X)),
    ),
}  # fmt: skip
GROUP: dict[str, tuple[Function, Function, tuple[Tensor, ...]]] = {
    "group norm": (
        lambda x, w, b: F.silu(F.group_norm(x, 4, w, b, 1e-6)),
        lambda x, w, b: group(x, 4, w, b, 1e-6, "silu"),
        (X, W, B),
    ),
    "spatial norm": (
        lambda x, w, b, s, t: F.silu(F.group_norm(x, 4, w, b) * s + t),
        lambda x, w, b, s, t: group(x, 4, w, b, 1e-5, "silu", scale=s, shift=t),
        (X, W, B, torch.randn_like(X), torch.randn_like(X)),
    ),
    "casts": (
        lambda x, w, b: F.silu(F.group_norm(x.float(), 4, w, b, 1e-6).to(x.dtype)),
        lambda x, w, b: group(x, 4, w, b, 1e-6, "silu"),
        (XH, W, B),
    ),
    "of frames": (
        lambda x, w, b: F.silu(frames(x, w, b)),
        lambda x, w, b: group(x, 4, w, b, 1e-5, "silu", per_frame=True),
        (X, W, B),
    ),
    "of frames, four at a time": (
        lambda x, w, b: F.silu(frames(x, w, b, 4)),
        lambda x, w, b: group(x, 4, w, b, 1e-5, "silu", per_frame=True),
        (X, W, B),
    ),
}


@pytest.mark.parametrize("spelling", [*CHANNEL, *GROUP])
def test_spellings(spelling: str) -> None:
    before, expected, args = (CHANNEL | GROUP)[spelling]
    report = check(before, expected, *args)
    assert len(report.matches) == 1 and not report.refusals
    gm, _ = rewrite(before, *args, passes=PASSES, options=ON)
    exact = before(*(a.double() for a in args)) if args[0].dtype == torch.float32 else before(*args).double()
    assert relative_error(gm(*args)[0], exact) < (1e-6 if args[0].dtype == torch.float32 else 1e-2)


# Borders --------------------------------------------------------------------------------------------------------------


BORDERS: dict[str, tuple[Function, list[int], str]] = {
    "replicate": (lambda y: F.pad(y, (1, 1, 1, 1, 2, 0), "replicate"), [2, 0, 1, 1, 1, 1], "replicate"),
    "reflect": (lambda y: F.pad(y, (1, 2, 0, 0, 0, 0), "reflect"), [0, 0, 0, 0, 1, 2], "reflect"),
    "zeros in front": (lambda y: F.pad(y, (0, 0, 0, 0, 2, 0)), [2, 0, 0, 0, 0, 0], "constant"),
    "repeated frames": (lambda y: joined(y, 1, 1), [1, 1, 0, 0, 0, 0], "replicate"),
    "listed frames": (twice, [2, 0, 0, 0, 0, 0], "replicate"),
    "frames, then pictures": (
        lambda y: F.pad(joined(y, 2, 0), (1, 1, 1, 1, 0, 0), "reflect"),
        [2, 0, 1, 1, 1, 1],
        "replicate,reflect,reflect",
    ),
}


@pytest.mark.parametrize("border", BORDERS)
def test_borders(border: str) -> None:
    pad, widths, mode = BORDERS[border]
    check(
        lambda x, k: F.conv3d(pad(norm(x)), k),
        lambda x, k: aten.conv3d.default(group(x, 4, None, None, 1e-5, "silu", padding=widths, mode=mode), k),
        X,
        K,
    )


@pytest.mark.parametrize(
    "after",
    [
        lambda y, k: (F.pad(y, (1, 1, 0, 0, 0, 0), "replicate").sum(),),  # no convolution reads it
        lambda y, k: (
            F.conv3d(F.pad(y, (1, 1, 0, 0, 0, 0), "replicate"), k),
            y.sum(),
        ),  # something else reads the inside
        lambda y, k: (F.conv3d(F.pad(y, (1, 1, 0, 0, 0, 0), "circular"), k),),
        lambda y, k: (F.conv3d(F.pad(y, (1, 1), value=1.0), k),),
        lambda y, k: (F.conv3d(F.pad(y, (-1, 2)), k),),
        lambda y, k: (F.conv3d(torch.cat([y[:, :, 1:2], y], 2), k),),  # not the first frame
        lambda y, k: (F.conv3d(torch.cat([y[:, :, :2], y], 2), k),),  # not one frame
        lambda y, k: (F.conv3d(torch.cat([y, y], 2), k),),
        lambda y, k: (F.conv3d(torch.cat([y[..., :1], y], -1), k),),
        lambda y, k: (F.conv3d(torch.cat([torch.zeros_like(y), y], 2), k),),  # a cache
        lambda y, k: (F.conv3d(F.pad(joined(y, 1, 0), (0, 0, 0, 0, 1, 0), "reflect"), k), y.sum()),
    ],
)
def test_what_is_no_border_stays(after: Function) -> None:
    gm, _ = rewrite(lambda x, k: after(norm(x), k), X, K, passes=PASSES, options=ON)
    (node,) = [n for n in gm.graph.nodes if n.target is group]
    assert len(node.args) == 6 and not node.kwargs
    torch.testing.assert_close(gm(X, K), list(after(norm(X), K)), rtol=1e-4, atol=1e-4)


def test_a_second_pad_in_time_stays() -> None:
    def before(x: Tensor, k: Tensor) -> Tensor:
        return F.conv3d(F.pad(joined(norm(x), 2, 0), (0, 0, 0, 0, 1, 0)), k)

    gm, _ = rewrite(before, X, K, passes=PASSES, options=ON)
    targets = [n.target for n in gm.graph.nodes]
    assert aten.pad.default in targets and group in targets
    torch.testing.assert_close(gm(X, K)[0], before(X, K), rtol=1e-4, atol=1e-4)


def test_a_border_in_front_of_a_convolution_that_has_its_input_laid_out() -> None:
    """The temporal unfold asks for a channels-last activation, which the norm writes anyway."""

    def before(x: Tensor, k: Tensor) -> Tensor:
        return F.conv3d(F.pad(norm(x), (1, 1, 1, 1, 2, 0), "replicate"), k)

    passes = "canonicalize,conv3d_unfold{form=unfold2d},fuse_norm_act"
    gm, reports = rewrite(before, X, K, passes=passes, options=ON | {"channels_last": "on"})
    targets = [n.target for n in gm.graph.nodes]
    assert aten.contiguous.default in targets and aten.pad.default not in targets
    assert reports[-1].matches[0].note.endswith("silu + replicate border")
    torch.testing.assert_close(gm(X, K)[0], before(X, K), rtol=1e-4, atol=1e-4)


# Where a chain ends ---------------------------------------------------------------------------------------------------


def test_a_value_that_others_read_ends_the_chain() -> None:
    check(
        lambda x, w, b: (lambda y: F.silu(y).matmul(y.mT))(F.group_norm(x, 4, w, b)),
        lambda x, w, b: (lambda y: aten.matmul.default(aten.silu.default(y), aten.transpose.int(y, -2, -1)))(
            group(x, 4, w, b, 1e-5, "none")
        ),
        X, W, B,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("after", "ops"),
    [
        (lambda y, x: y * y, [aten.mul.Tensor]),
        (lambda y, x: F.silu(y + 1.0), [aten.add.Tensor, aten.silu.default]),
        (lambda y, x: F.silu(y * 2.0), [aten.mul.Tensor, aten.silu.default]),  # a norm of groups has no factor
        (lambda y, x: F.gelu(y, approximate="tanh"), [aten.gelu.default]),
        (lambda y, x: F.silu(y) * x, [aten.mul.Tensor]),
        (lambda y, x: torch.add(y, x, alpha=2), [aten.add.Tensor]),
        (lambda y, x: y * x[:1], [aten.slice.Tensor, aten.mul.Tensor]),
    ],
)
def test_what_ends_a_chain(after: Function, ops: list[Any]) -> None:
    gm, _ = rewrite(lambda x: after(F.group_norm(x, 4), x).sum(), X, passes=PASSES, options=ON)
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert group in targets and [t for t in targets if t is not group] == [*ops, aten.sum.default]
    torch.testing.assert_close(gm(X)[0], after(F.group_norm(X, 4), X).sum(), rtol=1e-4, atol=1e-3)


def test_a_norm_of_tokens_is_none_of_these() -> None:
    for function, x in (
        (lambda x: F.layer_norm(x, (C,)), torch.randn(2, 6, C)),
        (rms_over_last, torch.randn(2, 6, C)),
        (lambda x: F.normalize(x, dim=-1), X),
        (lambda x: x / x.abs().sum(1, keepdim=True).clamp_min(1e-6), X),
        (lambda x: x / torch.linalg.vector_norm(x, 1, 1, keepdim=True).clamp_min(1e-6), X),
        (lambda x: x * torch.rsqrt((X * X).mean(1, keepdim=True) + 1e-6), X),  # another's mean
    ):
        _, reports = rewrite(function, x, passes=PASSES, options=ON)
        assert not reports[1].matches and not refusals(reports)


# Refusals -------------------------------------------------------------------------------------------------------------


def auto(
    function: Function, *shapes: tuple[int, ...], dtype: Any, device: str = "cuda", laid: bool = True
) -> list[Report]:
    with new_fake_mode():
        args = [torch.empty(s, device=device, dtype=dtype) for s in shapes]
        if laid:
            args = [a.to(memory_format=torch.channels_last_3d) if a.dim() == 5 else a for a in args]
    return rewrite(function, *args, passes=PASSES)[1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float16}, None),
        ({"dtype": torch.float32}, None),
        ({"dtype": torch.float64}, "x is torch.float64"),
        ({"device": "cpu"}, "no kernel runs on cpu"),
        ({"laid": False}, "x is not channels-last"),
    ],
)
def test_auto_is_for_gpus_and_channels_last(changes: dict[str, Any], reason: str | None) -> None:
    for function in (lambda x: norm(x), lambda x: by_mean(x), lambda x: moved(rms_over_last, x).to(x.dtype)):
        reports = auto(function, (1, C, 3, 4, 5), **{"dtype": torch.bfloat16, **changes})
        assert refusals(reports) == ([] if reason is None else [reason])
        assert len(reports[1].matches) == (reason is None)


def test_auto_takes_operands_like_x_only_where_they_are_laid_out_like_it() -> None:
    def before(x: Tensor, s: Tensor) -> Tensor:
        return F.group_norm(x, 4) * s.transpose(3, 4)

    (record,) = auto(before, (1, C, 3, 4, 5), (1, C, 3, 5, 4), dtype=torch.bfloat16)[1].matches
    assert record.note == "group norm + scale"  # strided, but each position's channels are side by side
    reports = auto(lambda x, s: F.group_norm(x, 4) * s.view(1, C, 3, 4, 5), (1, C, 3, 4, 5), (C, 60), dtype=torch.half)
    assert [m.note for m in reports[1].matches] == ["group norm"]


def test_off() -> None:
    _, reports = rewrite(norm, X, passes=PASSES, options={"norm_act": "off"})
    assert not reports[1].matches and not reports[1].refusals


@pytest.mark.parametrize(
    ("function", "x", "reason"),
    [
        (lambda x: F.group_norm(x, 4), torch.randn(2, C, 6), "group norm of 3 dimensions, neither pictures nor videos"),
        (
            lambda x: F.group_norm(x.float(), 4),
            XH,
            "x is torch.bfloat16, and what follows stays torch.float32 or channels-last in name",
        ),
    ],
)
def test_refusals(function: Function, x: Tensor, reason: str) -> None:
    gm, reports = rewrite(function, x, passes=PASSES, options=ON)
    assert refusals(reports) == [reason]
    torch.testing.assert_close(gm(x)[0], function(x), rtol=1e-4, atol=1e-5)


def test_a_rounding_inside_float64_is_kept() -> None:
    """LTX's norms round to float32 inside a float64 model; one op in float64 would be another result."""
    _, reports = rewrite(lambda x: moved(rms_over_last, x), X.double(), passes=PASSES, options=ON)
    assert refusals(reports) == ["it rounds torch.float64 to less inside"]


def enlarged(x: Tensor, *sizes: int) -> Tensor:
    return F.interpolate(x, size=sizes)


def test_an_enlarged_scale_and_shift_are_read_as_they_were() -> None:
    """By whole numbers in rows and columns; in time, and 1 + scale, on the small one."""
    s, t = torch.randn(2, C, 3, 2, 1), torch.randn(2, C, 1, 4, 5)

    def expected(x: Tensor, s: Tensor, t: Tensor) -> Any:
        t = aten.upsample_nearest3d.vec(t, [3, 4, 5], None)
        return group(x, 4, None, None, 1e-5, "silu", scale=aten.add.Tensor(s, 1), shift=t)

    check(
        lambda x, s, t: F.silu(F.group_norm(x, 4) * (enlarged(s, 3, 4, 5) + 1) + enlarged(t, 3, 4, 5)),
        expected,
        X,
        s,
        t,
    )


def test_an_enlarged_scale_that_others_read_is_still_read_small() -> None:
    def before(x: Tensor, s: Tensor) -> Tensor:
        large = enlarged(s, 4, 5)
        return F.group_norm(x, 4) * large + large

    s = torch.randn(2, C, 2, 5).to(memory_format=torch.channels_last)
    check(before, lambda x, s: group(x, 4, None, None, 1e-5, "none", scale=s, shift=s), PICTURE, s)


@pytest.mark.parametrize(
    "enlarge",
    [
        lambda s: F.interpolate(s, size=(4, 5), mode="bilinear"),
        lambda s: F.interpolate(s[:, :, :, :2], size=(4, 5)),  # by 5 / 2
        lambda s: F.pad(F.interpolate(s, size=(4, 6)), (0, -1)),
    ],
)
def test_what_is_not_enlarged_by_whole_numbers_is_written(enlarge: Function) -> None:
    s = torch.randn(2, C, 2, 3)
    gm, (_, report) = rewrite(lambda x, s: F.group_norm(x, 4) * enlarge(s), PICTURE, s, passes=PASSES, options=ON)
    assert [m.note for m in report.matches] == ["group norm + scale"]
    torch.testing.assert_close(gm(PICTURE, s)[0], F.group_norm(PICTURE, 4) * enlarge(s), rtol=1e-4, atol=1e-5)


def test_auto_takes_what_is_enlarged_however_it_is_laid_out() -> None:
    def before(x: Tensor, s: Tensor) -> Tensor:
        return F.group_norm(x, 4) * F.interpolate(s.view(1, C, 3, 2, 3), size=(3, 4, 6))

    reports = auto(before, (1, C, 3, 4, 6), (C, 18), dtype=torch.bfloat16)
    assert [m.note for m in reports[1].matches] == ["group norm + enlarged scale"]


def test_whole_numbers_are_those_that_aten_reads_exactly() -> None:
    """Entry i // factor for each i, by a product with a rounded 1 / factor; 41 is the first that it fails for."""
    for factor in (*range(1, LARGEST + 1), 41):
        x = torch.arange(300.0).reshape(1, 1, 300, 1)
        for size in ({"size": (300 * factor, 1)}, {"scale_factor": (float(factor), 1.0)}):
            exact = torch.equal(F.interpolate(x, **size), x.repeat_interleave(factor, 2))
            assert exact is (factor <= LARGEST)


def test_auto_with_symbolic_sizes() -> None:
    """Strides of a channels-last activation are products of symbols, and still known to be such."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from pvae.passes.channel_norm import is_innermost

    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x = torch.randn(2, C, 3, 4, 5)
        laid = mode.from_tensor(x.to(memory_format=torch.channels_last_3d))
        assert is_innermost(torch.relu(laid)) and not is_innermost(mode.from_tensor(x))


def test_the_layout_that_the_op_states_is_in_the_graph() -> None:
    gm: GraphModule = rewrite(norm, X, passes=PASSES, options=ON)[0]
    (node,) = [n for n in gm.graph.nodes if n.target is group]
    assert node.meta["val"].is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(gm(X)[0], norm(X), rtol=1e-5, atol=1e-5)
