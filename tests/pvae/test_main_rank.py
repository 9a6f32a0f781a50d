"""pvae.main_rank in one process: a world of one, names in a model, copies, and what happens where ranks are missing."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae.main_rank import MainRankFunction
from pvae.options import parse_options
from pvae.passes.main_rank import is_marked, mark_modules
from pvae.report import ModelReport


class Pipe(nn.Module):
    """A text encoder with blocks, and a method that decides by values."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(2))})
        self.head = nn.Linear(4, 2)

    def encode(self, x: Tensor) -> Tensor:
        for layer in self.text["layers"]:
            x = torch.tanh(layer(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x))


def pipe() -> Pipe:
    return Pipe().eval().requires_grad_(False)


def ran(report: ModelReport) -> int:
    return report.matches("main_rank")


# --- a world of one --------------------------------------------------------------------------------------------------------


def test_alone_it_is_an_ordinary_call() -> None:
    model, x = pipe(), torch.randn(3, 4)
    wanted = model(x)
    generator = torch.get_rng_state()
    with pvae.main_rank():
        inside = model(x)
    function = pvae.main_rank(lambda y, scale=1: {"y": y * scale, "kept": y})
    found = function(x, scale=2)
    assert found["kept"] is x and torch.equal(found["y"], x * 2)
    assert torch.equal(inside, wanted) and torch.equal(torch.get_rng_state(), generator)
    with pytest.raises(KeyError, match="boom"):
        pvae.main_rank(lambda: {}["boom"])()


@pytest.mark.parametrize("name", ["encode", "text.layers.1", "head", ""], ids=str)
def test_a_compiled_model_alone(name: str) -> None:
    model, x = pipe(), torch.randn(3, 4)
    wanted = model(x)
    pvae.compile(model, main_rank=[name] if name else [], engine="eager")
    assert torch.equal(model(x), wanted) and torch.equal(model(x), wanted)
    assert ran(pvae.report(model)) == 0
    pvae.restore(model)
    assert not any(isinstance(v, MainRankFunction) for m in model.modules() for v in m.__dict__.values())
    assert torch.equal(model(x), wanted)


def test_under_torch_compile_alone() -> None:
    class Marked(Pipe):
        def forward(self, x: Tensor) -> Tensor:
            with pvae.main_rank():
                y = self.encode(x)
            return self.head(y)

    model, x = Marked().eval().requires_grad_(False), torch.randn(3, 4)
    compiled = torch.compile(model, backend="pvae", fullgraph=True, options={"engine": "eager"})
    assert torch.equal(compiled(x), model(x))
    model.encode = pvae.main_rank(model.encode)
    broken = torch.compile(Pipe.forward, backend="pvae", options={"engine": "eager"})
    assert torch.equal(broken(model, x), model(x))


def test_weights_without_values_alone() -> None:
    model = pipe()
    model.text.to("meta")
    pvae.compile(model, main_rank=["encode"], engine="eager")
    with pytest.raises(pvae.PvaeError, match="a weight is on the meta device"):
        model(torch.randn(3, 4))


def test_a_launcher_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank would draw numbers of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(pvae.OptionError, match="torch.distributed is not initialised"):
        pvae.main_rank(torch.randn)(3)


# --- what is wrapped -------------------------------------------------------------------------------------------------------


def test_a_wrapped_module_stays_what_it_is() -> None:
    model, x = pipe(), torch.randn(3, 4)
    assert pvae.main_rank(model) is model and inspect.signature(model.forward) == inspect.signature(pipe().forward)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.bias += 1
    torch.testing.assert_close(other(x), model(x) + 1)
    pvae.compile(model, engine="eager")  # takes the function that rank 0 runs, and gives it back
    pvae.restore(model)
    assert isinstance(model.forward, MainRankFunction)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("encod", "has no submodule or method 'encod'; did you mean 'encode'?"),
        ("text.layer.1", "did you mean 'text.layers.1' or "),
        ("head.weight", "has no submodule or method 'head.weight'"),
        ("zzz", "It has text, text.layers, text.layers.0, text.layers.1, head, encode"),
    ],
)
def test_names_that_are_not_there(name: str, said: str) -> None:
    model = pipe()
    with pytest.raises(pvae.OptionError) as error:
        pvae.compile(model, main_rank=["encode", name])
    assert said in str(error.value)
    assert "encode" not in model.__dict__


@pytest.mark.parametrize(
    ("given", "paths"),
    [("a.b, c", ("a.b", "c")), (["a", "b", "a"], ("a", "b")), ((), ()), ("", ())],
)
def test_the_option(given: object, paths: tuple[str, ...]) -> None:
    assert parse_options({"main_rank": given}, {}).main_rank == paths
    text = given if isinstance(given, str) else ",".join(given)  # type: ignore[call-overload]
    assert parse_options({}, {"PVAE_MAIN_RANK": text}).main_rank == paths


def test_an_option_that_is_no_name() -> None:
    with pytest.raises(pvae.OptionError, match="main_rank takes names of submodules and methods"):
        parse_options({"main_rank": [pipe().head]}, {})


def test_submodules_by_name_in_a_graph_of_dynamo() -> None:
    """However the code spells them."""
    marked = {}

    def backend(gm: torch.fx.GraphModule, inputs: object) -> object:
        assert mark_modules(gm.graph, ["text.layers.1", "texts"])[0] == ["texts"]
        marked["missing"], marked["known"] = mark_modules(gm.graph, ["nothing"])
        marked["nodes"] = sum(map(is_marked, gm.graph.nodes))
        return gm.forward

    torch.compile(pipe(), backend=backend)(torch.randn(3, 4))
    assert marked == {"missing": ["nothing"], "known": ["head", "text.layers.0", "text.layers.1"], "nodes": 1}
