"""`shard="sequence"` in one process: what inputs are called, which regions there are, and what blocks hand on."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae import backend, block_pieces, module
from pvae.auto_shard import choose_sharding
from pvae.block_pieces import WholeResults, cut
from pvae.call_structure import argument_names, describe
from pvae.lockstep import simulated_mesh
from pvae.options import parse_options
from pvae.passes.placement import even
from pvae.passes.shard import ShardError
from pvae.passes.shard_choice import NONE, candidates
from pvae.ranks import Ranks, ShardedGraph, mesh_shape, stated
from pvae.regions import regions
from pvae.runtime.sharded_tensor import Piece, ShardedTensor
from pvae.testing import capture
from tests.pvae.sequence_gloo import Block, Transformer, inputs
from tests.pvae.shard_gloo import small

X = torch.arange(3.0)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- names of inputs -----------------------------------------------------------------------------------------------------


def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As diffusers wraps the forward of its models."""

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return wrapper


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.kept = nn.Parameter(torch.ones(3), requires_grad=False), torch.ones(3)

    def forward(self, hidden: Tensor, lists: Any, flag: bool = True, *rest: Tensor, **more: Any) -> Tensor:
        total = hidden * self.weight + self.kept + lists[0] + lists[1]["a-b"]
        return total + sum(rest) + sum(m["mask"] for m in more.values())


class Decorated(Named):
    forward = decorated(Named.forward)


@pytest.mark.parametrize("entry", ["pvae.compile", "torch.compile", "module.compile"])
@pytest.mark.parametrize("kind", [Named, Decorated])
def test_inputs_are_called_as_forward_calls_them(
    monkeypatch: pytest.MonkeyPatch, entry: str, kind: type[nn.Module]
) -> None:
    seen: list[Mapping[str, str]] = []

    def noted(captured: Any, *args: Any, **kwargs: Any) -> Any:
        assert captured.weights.isdisjoint(captured.arguments)
        seen.append(captured.arguments)
        return backend_compile(captured, *args, **kwargs)

    backend_compile = backend.compile_capture
    for place in (backend, module):
        monkeypatch.setattr(place, "compile_capture", noted)
    model = kind()
    run: Any = model
    if entry == "pvae.compile":
        pvae.compile(model, engine="eager")
    elif entry == "torch.compile":
        run = torch.compile(model, backend="pvae", options={"engine": "eager"})
    else:
        model.compile(backend="pvae", options={"engine": "eager"})
    # Tensors of their own: Dynamo makes one input of a tensor that is given twice.
    run(hidden=X + 0, lists=[X + 1, {"a-b": X + 2}], extra={"mask": X + 3})
    run(X + 0, (X + 1, {"a-b": X + 2}), False, X + 4, X + 5, extra={"mask": X + 3})
    few = ["hidden", "lists_0", "lists_1_a-b", "extra_mask"]
    many = ["hidden", "lists_0", "lists_1_a-b", "rest_0", "rest_1", "extra_mask"]
    assert [sorted(names.values()) for names in seen] == [sorted(few), sorted(many)]
    assert {"lists_1_a_b": "lists_1_a-b"}.items() <= seen[0].items()  # a node's name is an identifier


def test_names_where_there_is_no_signature() -> None:
    assert argument_names(max, [X, [X]], {"m": (X, 1)}) == ["args_0", "args_1_0", "m_0"]
    assert argument_names(lambda x, /, y=0, *others, z=1: x, [X, 3, X], {"z": {"k": X}}) == ["x", "others_0", "z_k"]
    tensors: list[Tensor] = []
    call = ([X, {"a": (X, None, [X])}], {"b": X, "c": 3})
    describe(call, tensors, [])
    assert len(argument_names(lambda p, q, b, c: p, *call)) == len(tensors)


def test_a_name_that_an_op_has_is_told_apart() -> None:
    """`add` is also what a node is called."""

    class Adding(nn.Module):
        def forward(self, add: Tensor) -> Tensor:
            return add + 1

    model = pvae.compile(Adding(), engine="eager")
    names: list[str] = []
    model.forward.observe = lambda stage, gm: (
        names.extend(n.name for n in gm.graph.nodes) if stage == "captured" else None
    )
    assert torch.equal(model(X), X + 1)
    assert len(set(names)) == len(names)


# --- regions --------------------------------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.blocks = nn.Linear(3, 3), nn.Linear(3, 3), nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def test_regions_by_name() -> None:
    model, vae = Transformer(), Autoencoder()
    blocks = ["blocks.0", "blocks.1", "blocks.2"]
    assert list(regions(model)) == list(regions(model, "blocks")) == blocks
    assert regions(model, "whole") == {"": model} and regions(vae, "whole") == {"": vae}
    assert list(regions(vae)) == ["encoder", "decoder"]
    assert list(regions(nn.Linear(1, 1))) == [""]
    with pytest.raises(
        pvae.OptionError, match=r"Autoencoder names no repeated blocks; regions='whole'.*such as \['Block'\]"
    ):
        pvae.compile(vae, regions="blocks")
    vae._repeated_blocks = ["Block"]
    assert list(regions(vae, "blocks")) == ["blocks.0", "blocks.1"]
    for choice, names in (("whole", [""]), ("blocks", blocks)):
        pvae.compile(model, regions=choice, engine="eager")
        assert [name for name, m in model.named_modules() if "forward" in m.__dict__] == names


def test_regions_are_for_pvae_compile() -> None:
    compiled = torch.compile(nn.ReLU(), backend="pvae", options={"regions": "whole"})
    with pytest.raises(Exception, match="regions='whole' is for pvae.compile.*compile_repeated_blocks"):
        compiled(X)
    with pytest.raises(pvae.PvaeError, match="regions: shard='tile' spreads whole tiles"):
        pvae.compile(Autoencoder(), shard="tile", regions="whole")


# --- block by block -------------------------------------------------------------------------------------------------------


def test_the_mesh() -> None:
    for asked, shape in ((None, (6,)), ("3", (3,)), ("2x3", (2, 3))):
        assert mesh_shape(parse_options({"shard": "sequence", "mesh": asked}, {}), 6) == shape


def test_a_world_of_one_takes_every_block_as_it_is() -> None:
    model, given = small(Transformer), inputs()
    wanted = model(*given)
    for choice in ("whole", "blocks"):
        pvae.compile(model, shard="sequence", regions=choice, engine="eager")
        got = model(*given)
        assert all(torch.equal(got[name], wanted[name]) and type(got[name]) is Tensor for name in wanted)


def test_the_hook_at_the_end_comes_and_goes() -> None:
    model = small(Transformer)
    for options, hooks in (
        ({"shard": "sequence"}, 1),
        ({"shard": "sequence", "gather": "off"}, 0),
        ({"shard": "sequence", "regions": "whole"}, 0),
        ({"shard": "sequence"}, 1),
    ):
        pvae.compile(model, engine="eager", **options)
        assert [type(hook) for hook in model._forward_hooks.values()] == [WholeResults] * hooks
    own = model.register_forward_hook(lambda *_: None)
    for twin in (copy.deepcopy(model), model):
        pvae.restore(twin)
        assert len(twin._forward_hooks) == 1
    own.remove()
    pvae.compile(model, shard="sequence", engine="eager")
    twin = pickle.loads(pickle.dumps(model))
    assert twin(*inputs()).keys() == {"image", "text"}
    pvae.restore(twin)
    assert not twin._forward_hooks


@pytest.mark.parametrize(("shape", "rank"), [((3,), 1), ((2, 2), 2)])
def test_whole_inputs_are_cut_as_the_pass_would(shape: tuple[int, ...], rank: int) -> None:
    """Tokens of image and text, by the mesh's last axis; the batch by its first."""
    mesh = simulated_mesh(shape, rank)
    block, flat = small(Block), [torch.randn(2, 11, 24).double(), torch.randn(2, 5, 24).double()]
    captured = capture(
        lambda hidden, text: torch.cat([block(hidden, [text])[0], block(hidden, [text])[1][0]], 1), *flat
    )
    options = parse_options({"shard": "sequence"}, {})
    found = block_pieces.input_pieces(captured, flat, options, mesh)
    assert list(found) == [0, 1]
    for x, pieces in zip(flat, found.values(), strict=True):
        assert {p.dim: p.bounds for p in pieces} == {
            axis + 2 - len(shape): even(x.shape[axis + 2 - len(shape)], n) for axis, n in enumerate(shape)
        }
        held = cut(x, pieces)
        wanted = x
        for piece in pieces:
            wanted = wanted.narrow(piece.dim, piece.own[0], piece.own[1] - piece.own[0])
        assert held.shape == x.shape and torch.equal(held.local, wanted) and held.local.is_contiguous()
    # What is a piece already is left alone, as are inputs of a world of one.
    assert list(block_pieces.input_pieces(captured, [cut(flat[0], found[0]), flat[1]], options, mesh)) == [1]
    assert block_pieces.input_pieces(captured, flat, options, simulated_mesh((1,), 0)) == {}
    named = parse_options({"shard": "sequence", "mesh": shape, "disable": "shard"}, {})
    assert block_pieces.input_pieces(captured, flat, named, mesh) == {}


# --- shard="auto" ----------------------------------------------------------------------------------------------------------


def test_candidates_of_tokens() -> None:
    assert list(map(str, candidates(4, tokens=True))) == ["none", "sequence 2", "sequence 4"]
    assert list(map(str, candidates(4, tokens=True, mesh=(2, 2)))) == ["none", "sequence 2x2"]
    assert list(map(str, candidates(6, form="sequence", fewer=False))) == ["sequence 6"]
    assert candidates(1, tokens=True) == [NONE]


@pytest.mark.parametrize(("name", "forms"), [("wan2.1-dit", {"none", "sequence"}), ("tiny-kl", {"none", "halo"})])
def test_what_auto_considers(name: str, forms: set[str]) -> None:
    """A transformer with a patch embedding, and a VAE with attention."""
    pytest.importorskip("diffusers")
    from pvae.tools.zoo import load

    case, found = load(name), []
    target = case.model if name.endswith("dit") else case.model.decoder

    def note(captured: Any, given: Any, options: Any, *args: Any, **kwargs: Any) -> Any:
        slow = dataclasses.replace(options, machine="h200,fp32=1e6,tf32=1e6")
        found.append(choose_sharding(captured, slow, 2))
        return backend.compile_capture(captured, given, options, *args, **kwargs)

    pvae.compile(target, engine="eager", regions="whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "compile_capture", note)
        case.run()
    options, choice = found[0]
    assert {c.candidate.form for c in choice.considered} == forms
    assert options.shard == choice.candidate.form != "none" and options.mesh == (2,)
    assert choice.cost.seconds < 0.8 * choice.considered[0].cost.seconds


def test_auto_leaves_alone_what_is_small() -> None:
    """And forgets with the form what was said for it."""
    block, flat = small(Block), [torch.randn(2, 11, 24).double(), torch.randn(2, 5, 24).double()]
    captured = capture(lambda hidden, text: block(hidden, [text])[0], *flat)
    for name in ("arg0_1", "image"):  # what has no name is called as the graph calls it
        options = parse_options({"shard": "auto", "shard_inputs": {name: 1}}, {})
        with (
            nullcontext()
            if name == "arg0_1"
            else pytest.raises(ShardError, match="no tensor argument is called 'image'")
        ):
            chosen, choice = choose_sharding(captured, options, 2)
    assert (chosen.shard, chosen.shard_inputs) == ("none", None) and "too small to gain" in choice.reason


# --- when ranks agree --------------------------------------------------------------------------------------------------------


def test_kinds_of_call() -> None:
    """Graphs that differ in weights alone are of one kind, and the ranks do not agree anew between them."""
    told: list[str] = []

    class Agreement:
        def agree(self, name: str, collectives: Any, inputs: Any, *, check_values: bool) -> None:
            told.append(name)

        def guarded(self, name: str) -> Any:
            return torch.no_grad()

    piece = Piece(0, (0, 2, 3), ((0, 2), (2, 3)), None, 0)
    ranks = Ranks(simulated_mesh((1,), 0), Agreement())  # type: ignore[arg-type]

    def graph(name: str, size: int = 3, **options: Any) -> Any:
        given = {0: stated(torch.empty(size)), 2: stated(ShardedTensor(torch.empty(2), [piece]))}
        return ShardedGraph(name, lambda x: x, ranks, {}, ("fetch",), given, options.get("check_inputs", False))

    first, second, other = graph("a"), graph("b"), graph("c", size=4)
    checked = graph("d", check_inputs=True)
    for one in (first, second, first, second, other, other, first, checked, checked, first):
        one([X, X, X])
    assert told == ["a", "b", "c", "a", "d", "d"], "when one is new, and when the kind changes"
    second([X, X, X])
    first.run = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        first([X, X, X])
    second([X, X, X])
    assert told[6:] == ["b"], "after an error all agree anew"
