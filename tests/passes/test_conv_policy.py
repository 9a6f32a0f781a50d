"""conv_policy: which form and layout each convolution gets, from whose figures, and that the passes do as it says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

import pvae
from pvae.options import parse_options
from pvae.passes.conv_layout import layout_problem
from pvae.passes.conv_policy import KEY, FormChoice, chosen, decide
from pvae.passes.conv_rules import unfold_pays
from pvae.passes.ir import Builder, ConvNode, value
from pvae.passes.pipeline import Pipeline, run_pipeline
from pvae.passes.rule import Context
from pvae.runtime.fetch import fetch
from pvae.runtime.mesh import Mesh
from pvae.runtime.torch_compat import new_fake_mode
from pvae.testing import capture, refusals, rewrite
from pvae.tools.model_run import Request, compile_traced, shapes_only
from tests.passes.conv_choices import NO_STORE, TIMES, W32, X32, choices, conv, measured, on_gpu

POLICY = "conv_policy"


@pytest.fixture(autouse=True)
def no_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)


# --- one convolution by rule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "out", "frames", "form"),
    [
        (96, 96, 3, "taps"),
        (192, 384, 3, "taps"),
        (96, 3, 3, "taps"),
        (32, 96, 3, "taps"),
        (8, 96, 3, "channels_last"),  # few channels in: nothing was measured
        (256, 256, 3, "channels_last"),  # as fast in both: the one by rule stays
        (96, 96, 1, "taps"),
        (512, 512, 1, "frames"),  # too near to cuDNN to be sure
    ],
)
def test_hopper_by_rule(channels: int, out: int, frames: int, form: str) -> None:
    x, w = on_gpu((1, channels, 6, 256, 256), (out, channels, frames, 3, 3))
    (choice,) = choices(lambda x, w: F.conv3d(x, w, padding=(0, 1, 1)), x, w)
    assert (choice.form, choice.layout) == (form, "channels_last")
    assert choices(lambda x, w: F.conv3d(x, w, padding=(0, 1, 1)), x, w, disable="conv_taps")[0].form != "taps"


@pytest.mark.parametrize("change", [{"stride": 2}, {"dilation": 2}, {"groups": 2}])
def test_no_rate_no_taps(change: dict[str, int]) -> None:
    x, w = on_gpu((1, 192, 64, 64), (192, 192 // change.get("groups", 1), 3, 3))
    assert choices(lambda x, w: F.conv2d(x, w, **change), x, w)[0].form == "channels_last"


@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        (torch.bfloat16, {"machine": "a100"}, ("unfold2d", "channels_last")),
        (torch.bfloat16, {"machine": "a100", "channels_last": "off"}, ("unfold2d", "contiguous")),
        (torch.float16, {"channels_last": "off"}, ("unfold2d", "contiguous")),
        (torch.float32, {}, ("native", "contiguous")),
        (torch.float32, {"channels_last": "on"}, ("taps", "channels_last")),
        (torch.float64, {}, ("native", "contiguous")),
        (torch.bfloat16, {"conv3d": "native"}, ("native", "contiguous")),
        (torch.bfloat16, {"conv3d": "channels_last"}, ("channels_last", "channels_last")),
        (torch.float32, {"conv3d": "unfold2d"}, ("unfold2d", "channels_last")),
        (torch.float32, {"conv3d": "taps"}, ("taps", "channels_last")),
    ],
)
def test_devices_dtypes_and_options(dtype: torch.dtype, options: dict[str, str], expected: tuple[str, str]) -> None:
    x, w = on_gpu((1, 96, 4, 64, 64), (96, 96, 3, 3, 3), dtype=dtype)
    (choice,) = choices(conv, x, w, **options)
    assert (choice.form, choice.layout) == expected


def test_rocm_unfolds_and_takes_taps_only_where_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    x, w = on_gpu((1, 192, 4, 64, 64), (192, 192, 3, 3, 3))
    assert choices(conv, x, w)[0].form == "unfold2d"
    problem = "bfloat16 1x192x4x64x64 > 192 kernel 3x3x3 padding 1.1x1.1x1.1"
    times = {problem: {"native": 3.0, "channels_last": 3.0, "unfold2d": 2.0, "taps": 1.0}}
    store = measured(tmp_path / "s.json", "cuda", times)
    assert choices(conv, x, w, tuning_store=store)[0].form == "taps"


def test_what_cannot_be_honoured_is_refused_with_the_reason() -> None:
    x, w = torch.randn(1, 4, 3, 8, 8), torch.randn(4, 2, 3, 3, 3)
    _, (report,) = rewrite(lambda x, w: F.conv3d(x, w, groups=2), x, w, passes=POLICY, options={"conv3d": "taps"})
    assert refusals([report]) == ["conv3d=taps cannot be honoured: 2 groups; it takes channels_last"]
    assert [d.rule for d in report.decisions] == ["channels_last"] and not report.matches
    _, (report,) = rewrite(
        lambda x, w: F.conv2d(x[:, :, 0], w[:, :, 0], groups=2), x, w, passes=POLICY, options={"conv3d": "unfold2d"}
    )
    assert not refusals([report]), "no form of a 2-D convolution"


def test_shapes_without_figures_stay_with_the_rule() -> None:
    """Symbolic sizes have no time, so nothing replaces what the rule takes."""
    seen: list[Counter[str]] = []
    model = nn.Conv3d(4, 4, 3)
    compiled = torch.compile(model, backend="pvae", dynamic=True, options={"engine": "eager", **NO_STORE})
    with torch.no_grad():
        for size in (5, 6):
            compiled(torch.randn(2, 4, size, size + 1, size + 2))
    for graph in pvae.report(model).graphs:
        seen += [p.counters for p in graph.passes if p.name == POLICY]
        assert all("sizes are symbolic" in d.note for p in graph.passes for d in p.decisions)
    assert seen and all(sum(c.values()) >= 1 for c in seen)


# --- figures -----------------------------------------------------------------------------------------------------------

PROBLEM = "bfloat16 1x96x4x64x64 > 96 kernel 3x3x3 padding 1.1x1.1x1.1"


@pytest.mark.parametrize(
    ("times", "form"),
    [
        ({"native": 1.0, "channels_last": 2.0, "unfold2d": 2.0, "taps": 3.0}, "native"),
        ({"native": 1.97, "channels_last": 2.0, "unfold2d": 2.0, "taps": 2.0}, "unfold2d"),  # within two percent
        ({"native": 5.0, "channels_last": 1.0, "unfold2d": 2.0, "taps": 3.0}, "channels_last"),
        ({"native": 1.0, "channels_last": 2.0, "taps": 0.5}, "unfold2d"),  # the rule's own form was not measured
        ({"unfold2d": 2.0, "taps": 1.9}, "taps"),
    ],
)
def test_a_measured_form_must_beat_the_one_by_rule(tmp_path: Path, times: dict[str, float], form: str) -> None:
    x, w = on_gpu((1, 96, 4, 64, 64), (96, 96, 3, 3, 3))
    store = measured(tmp_path / "s.json", "cuda", {PROBLEM: times}, copy=1e18)  # copies cost nothing
    (choice,) = choices(lambda x, w: conv(x, w), x, w, tuning_store=store)
    assert (choice.form, choice.source) == (form, "measured here" if form in times else "rule")


def test_figures_of_other_versions_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = on_gpu((1, 96, 4, 64, 64), (96, 96, 3, 3, 3))
    store = measured(tmp_path / "s.json", "cuda", {PROBLEM: {"unfold2d": 1.0, "taps": 2.0}})
    assert choices(conv, x, w, tuning_store=store)[0].source == "measured here"
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert choices(conv, x, w, tuning_store=store)[0].source != "measured here"


def test_a_damaged_store_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text("{")
    model = nn.Conv3d(2, 2, 3)
    with pytest.raises(ValueError, match=f"the tuning store {path} is damaged"), torch.no_grad():
        pvae.compile(model, engine="eager", tuning_store=path)(torch.randn(1, 2, 3, 4, 4))


def test_a_store_that_is_not_there_is_said(tmp_path: Path) -> None:
    x, path = torch.randn(1, 2, 3, 4, 4), tmp_path / "typo.json"
    with torch.no_grad():
        with pytest.warns(pvae.PvaeWarning, match=f"tuning_store={path}: there is no such file.*pvae tune"):
            pvae.compile(nn.Conv3d(2, 2, 3), engine="eager", tuning_store=path)(x)
        with pytest.raises(pvae.PvaeError, match="there is no such file"):
            pvae.compile(nn.Conv3d(2, 2, 3), engine="eager", tuning_store=path, strict="on")(x)


# --- a graph: layouts by the cut ---------------------------------------------------------------------------------------

ALL = "tf32 1x32x2x16x16 > 32 kernel 3x3x3 padding 1.1x1.1x1.1"


def three(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return conv(F.silu(conv(F.silu(conv(x, a)), b)), c)


@pytest.mark.parametrize(
    ("copy", "layout"),
    [
        (2**21 / 1e-3, "channels_last"),  # to copy a value, 64 KiB, takes 0.06 ms
        (2**15 / 1e-3, "contiguous"),  # 4 ms: input and result cost more than what three convolutions save
    ],
)
def test_the_layout_is_chosen_for_the_whole_graph(tmp_path: Path, copy: float, layout: str) -> None:
    args = on_gpu(X32, *[W32] * 3, dtype=torch.float32)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        store = measured(tmp_path / "s.json", "cuda", {ALL: TIMES}, copy)
        found = choices(three, *args, tuning_store=store)
    assert [c.layout for c in found] == [layout] * 3
    assert not any(c.converted for c in found)


def test_a_convolution_that_gains_less_than_copies_cost_follows_its_neighbours(tmp_path: Path) -> None:
    """The one in the middle is 0.1 ms slower in channels_last; copying there and back would cost 0.16."""
    args = on_gpu(X32, W32, (48, 32, 3, 3, 3), (32, 48, 3, 3, 3), dtype=torch.float32)
    middle = ALL.replace("> 32", "> 48")
    last = ALL.replace("1x32x", "1x48x")
    times = {ALL: TIMES, middle: {"native": 1.0, "channels_last": 1.1}, last: TIMES}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        for copy, expected in (
            (2**21 / 1e-3, ["channels_last"] * 3),
            (1e18, ["channels_last", "native", "channels_last"]),
        ):
            store = measured(tmp_path / "s.json", "cuda", times, copy)
            assert [c.form for c in choices(three, *args, tuning_store=store)] == expected


def test_one_fast_contiguous_form_is_not_worth_its_copies(tmp_path: Path) -> None:
    """All go together; also where nothing is cut, a form stays in the layout of all others."""
    args = on_gpu(X32, W32, (48, 32, 3, 3, 3), (32, 48, 3, 3, 3))
    bf16 = {"native": 2.0, "channels_last": 1.0}
    times = {p.replace("tf32", "bfloat16"): bf16 for p in (ALL, ALL.replace("1x32x", "1x48x"))}
    times[ALL.replace("> 32", "> 48").replace("tf32", "bfloat16")] = {"native": 1.0, "channels_last": 1.05}
    for copy, form in ((2**16 / 1e-3, "native"), (2**20 / 1e-3, "channels_last")):  # input and result are contiguous
        store = measured(tmp_path / "s.json", "cuda", times, copy)
        assert {c.form for c in choices(three, *args, tuning_store=store)} == {form}
    context = Context(parse_options({"tuning_store": store}, {}))
    alone = [chosen(node, context) for node in capture(three, *args).gm.graph.nodes]
    assert {c.form for c in alone if c is not None} == {"channels_last"}


def test_contiguous_by_figures_is_carried_out(tmp_path: Path) -> None:
    """In half precision everything else is channels_last, so the operands are copied."""
    args = on_gpu(X32, W32, (48, 32, 3, 3, 3), (32, 48, 3, 3, 3))
    times = {p.replace("tf32", "bfloat16"): TIMES for p in (ALL, ALL.replace("1x32x", "1x48x"))}
    times[ALL.replace("> 32", "> 48").replace("tf32", "bfloat16")] = {"native": 1.0, "channels_last": 9.0, "taps": 9.0}
    store = measured(tmp_path / "s.json", "cuda", times, 1e18)
    passes = "conv_policy,conv3d_unfold,channels_last"
    gm, reports = rewrite(three, *args, passes=passes, options={"tuning_store": store})
    assert [c.converted for c in choices(three, *args, tuning_store=store)] == [False, True, False]
    convs = [c for c in map(ConvNode.of, gm.graph.nodes) if c is not None]
    compact, lay = torch.ops.pvae.compact.default, torch.ops.pvae.channels_last.default
    assert [c.weight.target is lay for c in convs] == [True, False, True]
    assert [c.x.target is compact for c in convs] == [False, True, False]
    assert reports[-1].counters == {"contiguous": 1, "channels_last": 2, **reports[-1].counters}


def layers(x: Tensor, p: Tensor, g: Tensor) -> Tensor:
    """Per-frame norm and upsampling, tokens through a product and back: what a decoder does between convolutions."""
    n, c, t, h, w = x.shape
    frames = F.group_norm(x.permute(0, 2, 1, 3, 4).reshape(n * t, c, h, w), 4, g, g)
    frames = F.interpolate(frames, scale_factor=2.0, mode="nearest")
    tokens = F.linear(x.flatten(2).transpose(1, 2), p).transpose(1, 2).reshape(n, c, t, h, w)
    return frames.sum() + F.silu(tokens).unsqueeze(0).sum() + x.reshape(n, c * t, h, w).sum()


@pytest.mark.parametrize("own_norms", [True, False])
def test_what_stands_between_convolutions_costs_in_each_layout(own_norms: bool) -> None:
    """In ms, with 64 KiB a value and a copy of it (read and written) in 0.5 ms."""
    graph = capture(layers, torch.randn(X32), torch.randn(32, 32), torch.randn(32)).gm.graph
    settings = {"weights": {"arg1_1", "arg2_1"}, "free_outputs": {0}, "own_norms": own_norms}
    problem, like = layout_problem(graph, {}, 2**18 / 1e-3, interpreted=True, **settings)
    costs = {str(n.target).partition(".")[2]: pair for n, pair in problem.costs.items() if isinstance(n, Node)}
    costs = {
        name: costs[name] for name in ("linear.default", "silu.default", "group_norm.default", "upsample_nearest2d.vec")
    }
    norm = (0.0, 0.0) if own_norms else (0.5, 1.0)
    assert costs == {
        "linear.default": (0.5, 0.0),  # reads tokens as rows
        "silu.default": (0.0, 0.0),
        "group_norm.default": norm,
        "upsample_nearest2d.vec": (pytest.approx(1.25), pytest.approx(3.0)),
    }
    (x,) = [n for n in graph.nodes if n.name == "arg0_1"]
    views = {
        tuple(value(n).shape): problem.costs.get(n) for n in graph.nodes if n.target is torch.ops.aten.reshape.default
    }
    assert views[2, 32, 16, 16] == (0.5, 0.0), "frames of a contiguous video are a copy"
    assert views[1, 32, 512] == views[1, 32, 2, 16, 16] == (0.0, 0.0), "rows and columns join in either layout"
    assert views[1, 64, 16, 16] is None, "channels and frames are one dimension: nothing follows its layout"
    # As it comes, the input is contiguous; in channels_last joining channels and frames is a copy besides.
    assert problem.costs[x] == (0.0, 1.0) and x not in like


# --- sharded -----------------------------------------------------------------------------------------------------------


def test_views_are_tried_where_a_fake_mode_is_on_as_well() -> None:
    """As `pvae explain` does: there torch raises ValueError for a view that needs a copy, else RuntimeError."""

    def unshuffled(x: Tensor, w: Tensor) -> Tensor:
        apart = conv(x, w).view(1, 96, 4, 120, 2, 208, 2).permute(0, 1, 4, 6, 2, 3, 5)
        return apart.reshape(1, 384, 4, 120, 208).sum()

    graph = capture(unshuffled, *on_gpu((1, 96, 4, 240, 416), (96, 96, 3, 3, 3))).gm.graph
    context = Context(parse_options(NO_STORE, {}))
    with new_fake_mode():
        ((_, under_the_mode),) = decide(graph, context).values()
    ((_, without),) = decide(graph, context).values()
    assert under_the_mode == without and without.form == "taps"


def test_ranks_keep_the_layouts_that_they_exchange_rows_in(tmp_path: Path) -> None:
    """Whatever one rank's store says, its fetches and layouts are those of a rank that has none."""
    args = on_gpu((1, 32, 2, 16, 16), W32)
    times = {ALL.replace("tf32", "bfloat16"): {"native": 1.0, "channels_last": 9.0, "taps": 0.1, "unfold2d": 2.0}}
    store = measured(tmp_path / "s.json", "cuda", times, 1e18)

    found = []
    for option in ("off", store):
        gm = capture(conv, *args).gm
        (node,) = [n for n in gm.graph.nodes if ConvNode.of(n)]
        rows = Builder(node)(fetch, node.args[0], 3, (0, 16, 32), ((0, 16), (16, 32)), 0, "zeros", None)
        node.replace_input_with(node.args[0], rows)
        context = Context(parse_options({"tuning_store": option}, {}), mesh=Mesh((2,), (None,), 0, (0,)))
        run_pipeline(gm, Pipeline.parse("conv_policy,channels_last"), context)
        nodes = list(gm.graph.nodes)
        found.append(([n.args[1:] for n in nodes if n.target is fetch], [n.meta[KEY] for n in nodes if KEY in n.meta]))
    (fetches, (plain,)), (others, (own,)) = found
    assert fetches == others and fetches and fetches[0][-1] is True
    assert (plain.layout, own.layout) == ("channels_last", "channels_last") and own.form == "taps" != plain.form


# --- what follows asks it ----------------------------------------------------------------------------------------------


def test_without_the_pass_a_convolution_is_decided_alone() -> None:
    graph = capture(conv, *on_gpu((1, 96, 4, 64, 64), (96, 96, 3, 3, 3))).gm.graph
    context = Context(parse_options({**NO_STORE, "machine": "a100"}, {}))
    found = [chosen(node, context) for node in graph.nodes]
    assert [f.form for f in found if f is not None] == ["unfold2d"]
    node = next(n for n in graph.nodes if ConvNode.of(n))
    node.meta[KEY] = choice = FormChoice("native", "contiguous", None, (), "test")
    assert chosen(node, context) is choice
    asked = chosen(node, context, "channels_last")
    assert asked is not None and asked.form == "channels_last"


def test_what_became_of_a_convolution_keeps_its_layout() -> None:
    x, w = on_gpu((1, 32, 4, 8, 8), (32, 32, 1, 3, 3))
    gm, _ = rewrite(conv_frames, x, w, passes="conv_policy,conv3d_unfold", options=NO_STORE)
    (node,) = [n for n in gm.graph.nodes if n.target is torch.ops.aten.conv2d.default]
    assert (node.meta[KEY].form, node.meta[KEY].layout) == ("channels_last", "channels_last")


def conv_frames(x: Tensor, w: Tensor) -> Tensor:
    return F.conv3d(x, w, padding=(0, 1, 1)).sum()


def test_it_reports_every_convolution_and_rewrites_nothing() -> None:
    args = on_gpu((1, 96, 4, 240, 416), (96, 96, 3, 3, 3), (3, 96, 1, 1, 1))
    gm, (report,) = rewrite(lambda x, a, b: F.conv3d(conv(x, a), b), *args, passes=POLICY, options=NO_STORE)
    assert not report.changed and sum(ConvNode.of(n) is not None for n in gm.graph.nodes) == 2
    first, second = report.decisions
    problem = PROBLEM.replace("64x64", "240x416")
    assert first.rule == "taps" and first.note.startswith(f"{problem}: taps ") and "unfold2d " in first.note
    assert second.rule == "linear" and "taps: no figure" in second.note


# --- the zoo -----------------------------------------------------------------------------------------------------------


def pretend(graph: Graph) -> Graph:
    """A copy of the graph as it would be on a GPU."""
    mode, copies = new_fake_mode(), dict[Node, Node]()

    def moved(v: Any) -> Any:
        if not isinstance(v, Tensor):
            return v
        with mode:
            return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda")

    new = Graph()
    new.output(new.graph_copy(graph, copies))
    for old, node in copies.items():
        node.meta = {"val": torch.utils._pytree.tree_map(moved, old.meta.get("val"))}
    return new


def captured(name: str, part: str, dtype: torch.dtype) -> list[Graph]:
    """The graphs of a tiny model of the zoo as they stand before the policy."""
    request = Request(name, part, "tiny", dtype, "cpu", options=parse_options({"engine": "eager"}, {}))
    found: list[Graph] = []
    with shapes_only(request):
        case, mode = request.shapes()
        compile_traced(case, request.options)
        for module in case.model.modules():
            forward = module.__dict__.get("forward")
            if hasattr(forward, "observe"):
                forward.observe = lambda stage, gm: found.append(pretend(gm.graph)) if stage == "conv_dtype" else None
        with mode:
            case.run()
    return found


@pytest.mark.parametrize("name", ["cogvideox", "kl"])
def test_layouts_of_the_zoo(name: str) -> None:
    """Half precision on NVIDIA works channels_last throughout, with the form that was measured before there was a policy."""
    for graph in captured(name, "decode", torch.bfloat16):
        for options in ({}, {"machine": "a100"}, {"machine": "a100", "engine": "eager"}):
            for node, (_, choice) in decide(graph, Context(parse_options({**NO_STORE, **options}, {}))).items():
                assert choice.layout == "channels_last"
                conv = ConvNode.of(node)
                assert conv is not None
                unfolds = (
                    conv.ndim == 3 and conv.kernel[0] > 1 and conv.kernel != conv.stride and unfold_pays(conv) is None
                )
                if "machine" in options:
                    assert (choice.form == "unfold2d") == unfolds and choice.form != "taps"
