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
from pvae.passes.compute_device import ComputeDevice
from pvae.passes.conv_figures import Knowledge, nearest
from pvae.passes.conv_policy import KEY, FormChoice, chosen, decide
from pvae.passes.conv_problem import ConvProblem
from pvae.passes.conv_rules import unfold_pays
from pvae.passes.ir import ConvNode, value
from pvae.passes.pipeline import Pipeline, run_pipeline
from pvae.passes.rule import Context
from pvae.passes.tuning_store import DeviceTable, Measured, merge, shipped
from pvae.runtime.fetch import fetch
from pvae.runtime.mesh import Mesh
from pvae.runtime.torch_compat import new_fake_mode
from pvae.testing import capture, refusals, rewrite
from pvae.tools.model_run import Request, compile_traced, shapes_only

NO_STORE = {"tuning_store": "off"}
POLICY = "conv_policy"


@pytest.fixture(autouse=True)
def no_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)


def on_gpu(*sizes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Tensors on a GPU that need not be there."""
    with new_fake_mode():
        return [torch.empty(*s, device="cuda", dtype=dtype) for s in sizes]


def choices(function: Any, *args: Tensor, **options: Any) -> list[FormChoice]:
    context = Context(parse_options({**NO_STORE, **options}, {}))
    return [choice for _, choice in decide(capture(function, *args).gm.graph, context).values()]


def conv(x: Tensor, w: Tensor) -> Tensor:
    return F.conv3d(x, w, padding=1) if x.dim() == 5 else F.conv2d(x, w, padding=1)


def measured(path: Path, device: str, times: dict[str, dict[str, float]], copy: float = 1e13) -> str:
    """A tuning store of this device with these times; the option's value."""
    table = {ConvProblem.parse(p): {f: Measured(ms) for f, ms in forms.items()} for p, forms in times.items()}
    merge(path, DeviceTable.of(ComputeDevice.of(torch.device(device), parse_options({}, {})), copy, table))
    return str(path)


# --- one convolution by rule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "out", "frames", "form"),
    [
        (96, 96, 3, "taps"),
        (192, 384, 3, "taps"),
        (96, 3, 3, "channels_last"),  # few channels out: nothing was measured
        (32, 96, 3, "channels_last"),
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
        (torch.float32, {"channels_last": "on"}, ("channels_last", "channels_last")),
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


def test_a_last_wave_of_few_tiles_costs_as_much_as_a_full_one() -> None:
    def ms(rows: int) -> float | None:
        x, w = on_gpu((1, 192, 1, rows), (192, 192, 3, 3))
        (choice,) = choices(conv, x, w)
        return next(f.ms for f in choice.alternatives if f.name == "taps")

    assert ms(132 * 128) == pytest.approx(ms(128)) and ms(133 * 128) == pytest.approx(2 * (ms(128) or 0))


def test_what_cannot_be_honoured_is_refused_with_the_reason() -> None:
    x, w = torch.randn(1, 4, 3, 8, 8), torch.randn(4, 2, 3, 3, 3)
    _, (report,) = rewrite(lambda x, w: F.conv3d(x, w, groups=2), x, w, passes=POLICY, options={"conv3d": "taps"})
    assert refusals([report]) == ["conv3d=taps cannot be honoured: 2 groups; it takes channels_last"]
    assert [d.rule for d in report.decisions] == ["channels_last"] and not report.matches
    _, (report,) = rewrite(lambda x: F.conv2d(x[0], x[0, :, :1]), x, passes=POLICY, options={"conv3d": "unfold2d"})
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
        ({"native": 1.96, "channels_last": 2.0, "unfold2d": 2.0, "taps": 2.0}, "unfold2d"),  # within two percent
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


def test_the_shipped_table_is_asked_after_the_store_and_nearby_figures_after_that() -> None:
    (table,) = [t for t in shipped() if t.name == "NVIDIA H200"]
    options = parse_options(NO_STORE, {})
    knowledge = Knowledge.of(torch.device("cuda"), options)
    problem = next(p for p in table.convolutions if p.channels == p.out_channels == 96)
    found = knowledge.figures(problem)
    assert (found.source, found.sure) == ("table of NVIDIA H200", "measured")
    other = ConvProblem.parse(str(problem).replace("4x480x832", "4x480x416"))
    near = knowledge.figures(other)
    assert near.sure == "near" and near.source == f"table of NVIDIA H200, at {problem}"
    assert near.forms["taps"].ms == pytest.approx((found.forms["taps"].ms or 0) / 2)
    assert nearest(ConvProblem.parse(str(problem).replace("kernel 3x3x3", "kernel 3x3x5")), table.convolutions) is None
    assert nearest(ConvProblem.parse(str(problem).replace("4x480x832", "4x48x83")), table.convolutions) is None
    assert Knowledge.of(torch.device("cuda"), parse_options({**NO_STORE, "machine": "a100"}, {})).brought == ()


def test_a_damaged_store_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text("{")
    model = nn.Conv3d(2, 2, 3)
    with pytest.raises(ValueError, match=f"the tuning store {path} is damaged"), torch.no_grad():
        pvae.compile(model, engine="eager", tuning_store=path)(torch.randn(1, 2, 3, 4, 4))


# --- a graph: layouts by the cut ---------------------------------------------------------------------------------------

X32, W32 = (1, 32, 2, 16, 16), (32, 32, 3, 3, 3)
ALL = "tf32 1x32x2x16x16 > 32 kernel 3x3x3 padding 1.1x1.1x1.1"
TIMES = {"native": 2.0, "channels_last": 1.0, "unfold2d": 3.0, "taps": 4.0}


def three(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return conv(F.silu(conv(F.silu(conv(x, a)), b)), c)


@pytest.mark.parametrize(
    ("copy", "layout"),
    [
        (2**21 / 1e-3, "channels_last"),  # a conversion of a value, 256 KiB twice, takes 0.25 ms
        (2**17 / 1e-3, "contiguous"),  # 4 ms: more than what three convolutions save
    ],
)
def test_the_layout_is_chosen_for_the_whole_graph(tmp_path: Path, copy: float, layout: str) -> None:
    args = on_gpu(X32, *[W32] * 3, dtype=torch.float32)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        store = measured(tmp_path / "s.json", "cuda", {ALL: TIMES}, copy)
        found = choices(three, *args, tuning_store=store)
    assert [c.layout for c in found] == [layout] * 3
    assert [c.converted for c in found] == [layout == "channels_last", False, False]


def test_a_convolution_that_gains_less_than_copies_cost_follows_its_neighbours(tmp_path: Path) -> None:
    """The one in the middle is a little slower in channels_last; copying there and back would cost more."""
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


def test_contiguous_by_figures_is_carried_out(tmp_path: Path) -> None:
    """In half precision everything else is channels_last, so the operands are copied."""
    args = on_gpu(X32, W32, (48, 32, 3, 3, 3), (32, 48, 3, 3, 3))
    times = {p.replace("tf32", "bfloat16"): TIMES for p in (ALL, ALL.replace("1x32x", "1x48x"))}
    times[ALL.replace("> 32", "> 48").replace("tf32", "bfloat16")] = {"native": 1.0, "channels_last": 9.0, "taps": 9.0}
    store = measured(tmp_path / "s.json", "cuda", times, 1e18)
    passes = "conv_policy,conv3d_unfold,channels_last"
    gm, reports = rewrite(three, *args, passes=passes, options={"tuning_store": store})
    convs = [c for c in map(ConvNode.of, gm.graph.nodes) if c is not None]
    compact, lay = torch.ops.pvae.compact.default, torch.ops.pvae.channels_last.default
    assert [c.weight.target is lay for c in convs] == [True, False, True]
    assert [c.x.target is compact for c in convs] == [False, True, False]
    assert value(convs[1].node).is_contiguous() and not value(convs[0].node).is_contiguous()
    assert reports[-1].counters == {"contiguous": 1, "channels_last": 2, **reports[-1].counters}


class Attention(nn.Module):
    """Convolution, tokens, convolution: a view in channels_last, a copy in contiguous."""

    def forward(self, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
        y = conv(x, w)
        n, c, t, h, width = y.shape
        tokens = F.linear(y.flatten(2).transpose(1, 2), p)
        return conv(tokens.transpose(1, 2).reshape(n, c, t, h, width), w)


def test_views_and_products_of_tokens_pull_to_channels_last(tmp_path: Path) -> None:
    args = on_gpu(X32, W32, (32, 32), dtype=torch.float32)
    even = {ALL: {"native": 1.0, "channels_last": 1.0}}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        store = measured(tmp_path / "s.json", "cuda", even, 2**18 / 1e-3)
        found = choices(Attention(), *args, tuning_store=store)
        plain = choices(lambda x, w, p: conv(conv(x, w), w), *args, tuning_store=store)
    assert {c.layout for c in plain} == {"contiguous"}
    # Two copies of tokens are saved, and the input and the result are copied instead: a tie stays as it was.
    assert {c.layout for c in found} == {"contiguous"}


# --- sharded -----------------------------------------------------------------------------------------------------------


def test_ranks_keep_the_layouts_that_they_exchange_rows_in(tmp_path: Path) -> None:
    """Whatever one rank's store says, its fetches and layouts are those of a rank that has none."""
    args = on_gpu((1, 32, 2, 16, 16), W32)
    times = {ALL.replace("tf32", "bfloat16"): {"native": 1.0, "channels_last": 9.0, "taps": 0.1, "unfold2d": 2.0}}
    store = measured(tmp_path / "s.json", "cuda", times, 1e18)

    def piece(x: Tensor, w: Tensor) -> Tensor:
        return conv(fetch(x, 3, (0, 16, 32), ((0, 16), (16, 32)), 0, "zeros", None), w)

    found = []
    for option in ("off", store):
        captured = capture(piece, *args)
        mesh = Mesh(2, 0)
        context = Context(parse_options({"tuning_store": option}, {}), mesh=mesh)
        run_pipeline(captured.gm, Pipeline.parse("conv_policy,channels_last"), context)
        nodes = list(captured.gm.graph.nodes)
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
    args = on_gpu((1, 96, 4, 64, 64), (96, 96, 3, 3, 3), (3, 96, 3, 3, 3))
    gm, (report,) = rewrite(lambda x, a, b: conv(conv(x, a), b), *args, passes=POLICY, options=NO_STORE)
    assert not report.changed and sum(ConvNode.of(n) is not None for n in gm.graph.nodes) == 2
    first, second = report.decisions
    assert first.rule == "taps" and first.note.startswith(f"{PROBLEM}: taps ") and "unfold2d " in first.note
    assert second.rule == "channels_last" and "taps: no figure" in second.note
    assert first.source.startswith("test_conv_policy.py:")


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


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox", "ltx2-video", "kl", "dc", "hunyuan-video"])
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
