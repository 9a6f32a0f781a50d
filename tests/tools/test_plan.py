"""`pvae plan`: each rank's graphs without ranks, the plan's figures, its picture, and its mistakes."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from pvae.options import Options
from pvae.passes.cost import Exchange
from pvae.passes.shard_choice import Candidate
from pvae.runtime.fetch import fetch
from pvae.tools import cli
from pvae.tools.model_run import Request, RequestError
from pvae.tools.plan import Planner, machine_named, plan_worlds, purpose, rank_graphs, traced_ranks
from pvae.tools.plan_picture import picture
from tests.pvae.sequence_gloo import Transformer, inputs

Run = Callable[..., tuple[int, Any]]
HALO = Options(shard="halo", shard_dims="h")
SLOW = "h200,link=1e6"  # bytes are dear: heads are exchanged, for keys and values of all tokens are more
FREE = "exchange=1e-12,launch=1e-12,link=1e20"  # a machine whose exchanges cost nothing: sharding always pays


class Decoder(nn.Module):
    """Doubles the picture; a causal cache in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv3d(4, 8, 3, padding=(0, 1, 1)), nn.Conv3d(8, 3, 1)

    def forward(self, x: Tensor, cache: list[Tensor | None]) -> Tensor:
        before = torch.zeros_like(x).repeat(1, 1, 2, 1, 1) if cache[0] is None else cache[0]
        x = torch.cat([before, x], 2)
        cache[0] = x[:, :, -2:].clone()
        return self.last(nn.functional.interpolate(self.first(x), scale_factor=(1.0, 2.0, 2.0)))


class Video(nn.Module):
    """Decodes frame by frame, as Wan does; the region that pvae compiles is the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()

    def forward(self, x: Tensor) -> Tensor:
        cache: list[Tensor | None] = [None]
        return torch.cat([self.decoder(frame, cache) for frame in x.split(1, 2)], 2)


class Whole(nn.Module):
    """An op that the algebra does not know, over the rows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sort(x.sin(), dim=-2).values.cos()


class Deciding(Transformer):
    """What runs depends on a value, outside of the blocks."""

    def forward(self, hidden_states: Tensor, text: Tensor) -> dict[str, Tensor]:
        return super().forward(hidden_states, text) if hidden_states.sum() > 0 else {}


class Idle(nn.Module):
    """Has a decoder and does not call it."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType("small")
    module.video = lambda: (Video(), (torch.randn(1, 4, 5, 30, 20),))  # type: ignore[attr-defined]
    module.idle = lambda: (Idle(), (torch.randn(1, 4, 12, 8),))  # type: ignore[attr-defined]
    module.whole = lambda: (Whole(), (torch.randn(1, 4, 12, 8),))  # type: ignore[attr-defined]
    module.transformer = lambda: (Transformer(), inputs())  # type: ignore[attr-defined]
    module.deciding = lambda: (Deciding(), inputs())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "small", module)
    yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, Any]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main(["plan", *arguments, "--device", "cpu"])
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out if "--json" in arguments else said.out + said.err

    return call


def request(model: str = "small:video", options: Options = HALO) -> Request:
    return Request(model, device="cpu", options=options)


def test_a_ranks_graphs_and_how_often_they_run() -> None:
    graphs = rank_graphs(request(), (3,), 1)
    assert [g.calls for g in graphs] == [1, 4]  # the first frame, the steady ones
    for g in graphs:
        exchanged = [n for n in g.graph.nodes if n.target is fetch]
        assert exchanged and all(n.args[4] == 1 for n in exchanged)
        assert g.weights >= {"first_weight", "last_bias"}
    assert rank_graphs(request(options=Options()), (), 0)[0].calls == 1


def test_a_plan_by_hand() -> None:
    machine, _, (plan,) = plan_worlds(request(), [3], "halo", "h", "h200")
    rank = plan.ranks[1]
    assert (machine.name, str(plan.candidate), [r.rank for r in plan.ranks]) == ("h200", "halo h 3", [0, 1, 2])
    assert rank.input == (1, 4, 1, 30, 20) and [calls for _, calls in rank.graphs] == [1, 4]
    (cut,) = rank.cuts
    assert (cut.direction, cut.size, cut.bounds) == ("h", 30, (0, 10, 20, 30))
    halo = [t for t in rank.exchanges() if t.purpose == "halo"]
    result = [t for t in rank.exchanges() if t.purpose == "result"]
    assert sum(t.count for t in halo) == 5 and {t.direction for t in halo} == {"rows"}  # one convolution reads across
    assert sum(t.count for t in result) == 5
    assert (
        sum(t.received for t in result) == 5 * 2 * 20 * 40 * 3 * 4
    )  # frames, other ranks, rows, columns, channels, f32
    for what in ("halo", "result"):
        alike = [t for r in plan.ranks for t in r.exchanges() if t.purpose == what]
        assert sum(t.sent for t in alike) == sum(t.received for t in alike)
    assert rank.gathered() == rank.refused == {}


def test_two_dimensions() -> None:
    _, _, (plan,) = plan_worlds(request(), [4], "halo", "hw", "h200")
    assert plan.candidate.mesh == (2, 2)
    assert [(c.direction, c.bounds) for c in plan.slowest.cuts] == [("h", (0, 15, 30)), ("w", (0, 10, 20))]
    assert {t.direction for t in plan.slowest.exchanges()} == {"rows", "columns"}


def test_every_rank_is_traced_once_and_no_more_than_needed() -> None:
    assert traced_ranks((8,)) == [0, 1, 7]
    assert traced_ranks((2,)) == [0, 1]
    assert traced_ranks(()) == [0]
    assert len(traced_ranks((5, 4))) == 9
    traced: list[str] = []
    planner = Planner(request(), machine_named("h200"), traced.append)
    planner.plan(5, "halo", "h")
    planner.plan(5, "halo", "h")
    assert sorted(traced) == ["halo h 5, rank 0", "halo h 5, rank 1", "halo h 5, rank 4", "none, rank 0"]


def test_no_other_rank_has_more_to_do() -> None:
    planner = Planner(request(), machine_named("h200"))
    found = planner.plan(5, "halo", "h")
    others = [planner.rank(found.candidate, rank).cost for rank in (2, 3)]
    assert found.seconds >= max(cost.seconds for cost in others)
    assert found.memory >= max(cost.memory for cost in others)


def test_auto_leaves_the_small_whole_and_shards_where_it_pays() -> None:
    _, _, (plan,) = plan_worlds(request(options=Options()), [4], None, None, "h200")
    assert plan.candidate == Candidate("none") and "too small to gain" in plan.choice.reason
    assert plan.seconds == plan.alone
    _, _, (eager,) = plan_worlds(request(options=Options()), [4], None, None, FREE)
    assert eager.candidate.ranks == 4 and eager.alone / eager.seconds > 1.5
    assert eager.memory < plan.memory
    assert {c.candidate.ranks for c in eager.choice.considered} == {1, 2, 4}


def test_what_must_be_computed_whole_is_listed(run: Run) -> None:
    code, text = run("small:whole", "--world", "2", "--shard", "halo", "--shard-dims", "h")
    assert code == 0
    assert "sort" in text and "computed whole" in text and "gathered" in text


def test_patch_moves_nothing_but_its_result() -> None:
    _, _, (plan,) = plan_worlds(request(), [2], "patch", "h", "h200")
    assert {t.purpose for t in plan.slowest.exchanges()} == {"result"}
    assert plan.slowest.cuts[0].halo == (4, 30)
    _, _, (auto,) = plan_worlds(request(options=Options(approximate="on")), [2], None, "h", FREE)
    assert "patch h 2" in [str(c.candidate) for c in auto.choice.considered]


def test_one_machine_many_ranks(run: Run) -> None:
    code, text = run("small:video", "--world", "30", "--shard", "halo", "--shard-dims", "h")
    assert code == 0 and "halo h 30" in text and "traced: ranks 0, 1, 29" in text


def test_text(run: Run) -> None:
    code, text = run("small:video", "--world", "1,2", "--shard", "halo", "--shard-dims", "h")
    assert code == 0
    for words in (
        "machine h200",
        "speed-up",
        "rows of the input, 30: bounds 0 15 30",
        "memory: rank 0",
        "halo",
        "result",
    ):
        assert words in text
    assert text.splitlines()[1].endswith("calls: decoder x 1, decoder x 4")


def test_json(run: Run, tmp_path: Path) -> None:
    svg = tmp_path / "plan.svg"
    code, text = run(
        "small:video", "--world", "1,2", "--shard-dims", "h", "--machine", FREE, "--svg", str(svg), "--json"
    )
    said = json.loads(text)
    assert code == 0 and said["machine"]["launch"] == 1e-12
    one, two = said["plans"]
    assert (one["form"], two["form"], two["mesh"]) == ("none", "halo", [2])
    assert one["speedup"] == 1 and two["speedup"] > 1
    assert two["partition"][0]["bounds"] == [0, 15, 30]
    assert [c["form"] for c in two["considered"]] == ["none", "halo"]
    rank = two["ranks"][0]
    assert rank["graphs"] == [{"name": "decoder", "calls": 1}, {"name": "decoder", "calls": 4}]
    assert {e["purpose"] for e in rank["exchanges"]} == {"halo", "result"}
    assert rank["memory"] == rank["weights"] + rank["inputs"] + rank["peak"]
    assert svg.exists()


def test_the_picture_has_every_rank_within_the_plane() -> None:
    _, _, plans = plan_worlds(request(), [1, 4], "halo", "hw", "h200")
    root = ElementTree.fromstring(picture(plans))
    name = "{http://www.w3.org/2000/svg}"
    words = [t.text for t in root.iter(f"{name}text")]
    for wanted in ("rank 0", "rank 3", "rows 15-30, columns 10-20", "4 ranks: halo hw 2x2", "1 rank"):
        assert wanted in words
    boxes = [{k: float(v) for k, v in r.attrib.items() if k in "xywidtheight"} for r in root.iter(f"{name}rect")]
    width, height = (float(root.attrib[k]) for k in ("width", "height"))
    assert len(boxes) == 2 + 4 + 4 * 2 + 1  # planes and pieces; two bands a rank; the single rank's piece
    assert all(b["x"] >= 0 and b["x"] + b["width"] <= width and b["y"] + b["height"] <= height for b in boxes)
    assert "href" not in picture(plans)
    assert "rank 15" not in picture(plan_worlds(request(), [20], "halo", "w", "h200")[2])  # a column a rank: no room


def transformer(**options: Any) -> Request:
    return request("small:transformer", Options(**options))


def test_tokens_by_hand() -> None:
    _, _, (plan,) = plan_worlds(transformer(), [3], "sequence", None, SLOW)
    rank = plan.ranks[0]
    assert str(plan.candidate) == "sequence 3" and [r.rank for r in plan.ranks] == [0, 1, 2]
    assert rank.input == (2, 11, 6) and rank.graphs == (("Transformer", 1),) and rank.of_tokens
    found = {(c.node, c.dimension, c.size, c.bounds) for c in rank.token_cuts}
    assert found == {("hidden_states", 1, 11, (0, 4, 8, 11)), ("text", 1, 5, (0, 2, 4, 5))}
    assert rank.cuts == () and not rank.gathered() and not rank.refused
    assert {t.purpose for t in rank.exchanges()} == {"heads", "result"} and {t.size for t in rank.exchanges()} <= {
        16,
        11,
        5,
    }
    assert {t.direction for t in rank.exchanges()} == {"tokens"}
    head = 2 * 8 * 4  # bytes of a token of one head: batch, width, f32; this rank holds six tokens of three heads
    there, back = 3 * (16 - 6) * 1 * head, 6 * (3 - 1) * head
    assert sum(t.received for t in rank.exchanges() if t.purpose == "heads") == 3 * (there + back)
    longest = (4 + 2) * 2 * 24 * 4
    assert sum(t.received for t in rank.exchanges() if t.purpose == "result") == 2 * longest


def test_the_machine_decides_between_heads_and_keys() -> None:
    _, _, (plan,) = plan_worlds(transformer(), [3], "sequence", None, "h200")
    assert {t.purpose for t in plan.slowest.exchanges()} == {"gather", "result"}
    _, asked, (dear,) = plan_worlds(transformer(machine=SLOW), [3], "sequence", None, None)
    assert asked.options.machine == SLOW
    assert {t.purpose for t in dear.slowest.exchanges()} == {"heads", "result"}


def test_batch_and_tokens() -> None:
    _, _, (plan,) = plan_worlds(transformer(mesh=(2, 2)), [4], "sequence", None, "h200")
    assert str(plan.candidate) == "sequence 2x2" and len(plan.ranks) == 4
    found = {(c.node, c.dimension, c.bounds) for c in plan.slowest.token_cuts}
    assert found == {
        ("hidden_states", 0, (0, 1, 2)),
        ("hidden_states", 1, (0, 6, 11)),
        ("text", 0, (0, 1, 2)),
        ("text", 1, (0, 3, 5)),
    }
    assert {(t.purpose, t.direction) for t in plan.slowest.exchanges()} == {
        ("gather", "tokens"),
        ("result", "tokens"),
        ("result", "batch"),
    }


def test_blocks_hand_their_tokens_on() -> None:
    request = transformer(shard="sequence", regions="blocks")
    graphs = rank_graphs(request, (2,), 1)
    assert [(g.report.name, g.calls) for g in graphs] == [(f"blocks.{i}", 1) for i in range(3)]
    _, _, (plan,) = plan_worlds(request, [2], None, None, "h200")
    rank = plan.slowest
    assert {(c.size, c.bounds) for c in rank.token_cuts} == {(11, (0, 6, 11)), (5, (0, 3, 5))}
    assert {t.purpose for t in rank.exchanges()} == {"gather"}  # no block gathers its result


def test_auto_considers_tokens() -> None:
    _, _, (plan,) = plan_worlds(transformer(), [4], None, None, "h200")
    assert [str(c.candidate) for c in plan.choice.considered] == ["none", "sequence 2", "sequence 4"]
    assert plan.candidate == Candidate("none") and "too small to gain" in plan.choice.reason
    _, _, (eager,) = plan_worlds(transformer(), [4], None, None, FREE)
    assert str(eager.candidate) == "sequence 4" and eager.alone / eager.seconds > 2
    with pytest.raises(RequestError, match="works on tokens"):
        plan_worlds(transformer(), [4], None, "h", FREE)


def test_no_other_rank_has_more_tokens_to_do() -> None:
    planner = Planner(transformer(machine=SLOW), machine_named(SLOW))
    found = planner.plan(5, "sequence", "auto")
    others = [planner.rank(found.candidate, rank).cost for rank in (2, 3)]
    assert found.seconds >= max(cost.seconds for cost in others)
    assert found.memory >= max(cost.memory for cost in others)


def test_tokens_as_text_and_json(run: Run) -> None:
    arguments = ("small:transformer", "--world", "1,3", "--shard", "sequence", "--machine", SLOW)
    code, text = run(*arguments)
    assert code == 0 and "sequence 3" in text and "heads" in text
    assert "dimension 1 of hidden_states, 11: bounds 0 4 8 11" in text
    code, text = run(*arguments, "--json")
    one, three = json.loads(text)["plans"]
    assert code == 0 and one["partition"] == []
    assert {p["node"]: p["bounds"] for p in three["partition"]} == {
        "hidden_states": [0, 4, 8, 11],
        "text": [0, 2, 4, 5],
    }
    assert {e["purpose"] for e in three["ranks"][0]["exchanges"]} == {"heads", "result"}


def test_tokens_are_strips_to_scale() -> None:
    _, _, plans = plan_worlds(transformer(), [1, 2], "sequence", None, "h200")
    root = ElementTree.fromstring(picture(plans))
    name = "{http://www.w3.org/2000/svg}"
    words = [t.text for t in root.iter(f"{name}text")]
    for wanted in ("1 rank", "nothing is cut", "2 ranks: sequence 2", "dimension 1 of hidden_states, 11", "0-6", "3-5"):
        assert wanted in words
    boxes = [{k: float(v) for k, v in r.attrib.items() if k in ("x", "width")} for r in root.iter(f"{name}rect")]
    assert len(boxes) == 4  # two pieces of each of two inputs
    assert sorted(round(b["width"] / 420, 3) for b in boxes) == sorted(
        round(n, 3) for n in (6 / 11, 5 / 11, 3 / 5, 2 / 5)
    )
    assert all(b["x"] + b["width"] <= float(root.attrib["width"]) for b in boxes)


@pytest.mark.parametrize(
    ("have", "need", "changed", "wanted"),
    [
        ((0, 4, 8), ((0, 5), (3, 8)), {}, "halo"),
        ((0, 4, 8), ((0, 6), (6, 8)), {}, "bounds"),
        ((0, 4, 8), ((0, 4), (4, 7)), {}, "halo"),  # a row is dropped
        ((0, 4, 8), ((0, 8), (0, 8)), {"whole": True}, "gather"),
        ((0, 4, 8), ((0, 8), (0, 8)), {"whole": True, "result": True}, "result"),
        ((0, 1, 2), ((0, 2), (0, 2)), {"whole": True, "dim": 0}, "sums"),
        ((0, 1, 2), ((0, 2), (0, 2)), {"whole": True, "dim": 0, "result": True}, "result"),  # a batch of two
        ((0, 8), ((0, 8),), {"kind": "boxes"}, "heads"),
    ],
)
def test_what_an_exchange_is_for(have: Any, need: Any, changed: dict[str, Any], wanted: str) -> None:
    plain = Exchange("fetch", "", 1, "exchange", "group", have, need, False, False, (1, 4), 0, 0, 0, 0.0)
    assert purpose(replace(plain, **changed)) == wanted


def test_a_transformer_that_cannot_be_one_graph() -> None:
    with pytest.raises(RequestError, match="-o regions=blocks"):
        rank_graphs(request("small:deciding", Options()), (), 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--world", "0"), "numbers of 1 or more"),
        (("--world", "two"), "not a number of ranks"),
        (("--world", ""), "names no number"),
        (("--shard", "tile"), "auto, halo, patch, sequence, none"),
        (("--shard", "sequence", "--shard-dims", "h"), "sequence splits tokens"),
        (("--shard-dims", "x"), "auto, h, w, hw"),
        (("--machine", "h20"), "did you mean h200"),
        (("--world", "3", "--shard", "halo", "--shard-dims", "hw"), "no grid"),
        (("--world", "4", "-o", "mesh=3"), "--world 3"),
    ],
)
def test_mistakes_are_one_line(run: Run, arguments: tuple[str, ...], said: str) -> None:
    code, text = run("small:video", *arguments)
    assert code == 2 and said in text and text.count("\n") == 1


def test_options_stand_for_flags() -> None:
    options = replace(HALO, mesh=(2,))
    _, _, (plan,) = plan_worlds(request(options=options), [2], None, None, "h200")
    assert str(plan.candidate) == "halo h 2"
    with pytest.raises(RequestError, match="nothing that pvae compiles"):
        rank_graphs(Request("small:idle", device="cpu"), (), 0)
