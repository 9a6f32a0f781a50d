"""The sharding pass on random models: on any mesh, all ranks in one process, equal to eager in float64 to 1e-12 relative.

Each kind of block is tried by itself, with what it may follow, then all of them in rows of up to five. The default profile
runs hundreds of cases, `--hypothesis-profile=deep` thousands.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

from pvae.capture import capture_run
from pvae.lockstep import Traffic, all_meshes, lockstep
from pvae.options import parse_options
from pvae.passes.ir import placeholders
from pvae.passes.pipeline import run_pipeline
from pvae.passes.rule import Context, RewriteCounter
from pvae.passes.shard import collectives
from pvae.runtime.mesh import Mesh
from pvae.runtime.sharded_tensor import Piece
from pvae.runtime.torch_compat import new_fake_mode, static_fake
from pvae.testing import FLOAT64_BOUND
from tests.passes.shard_blocks import CausalConv
from tests.passes.shard_models import KINDS, Inputs, ShardModel, shard_models

MESHES = (((2,), "h"), ((3,), "w"), ((5,), "h"), ((2, 2), "hw"), ((1, 3), "hw"))
KEPT = ("nothing", "caches", "all")  # the outputs that may stay pieces
EXAMPLES = settings.default.max_examples


@dataclass(frozen=True)
class Value:
    """A tensor as the ranks have it: each its local piece, or each the whole (then `pieces` are empty)."""

    whole: Tensor
    local: tuple[Tensor, ...]
    pieces: tuple[tuple[Piece, ...], ...]


def graph_of(
    model: ShardModel, x: Tensor, caches: Sequence[Tensor | None]
) -> tuple[GraphModule, frozenset[str], list[Tensor]]:
    """The graph of one call (inputs x, the caches there are, weights; outputs y, all caches), and the weights."""
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    there = [i for i, cache in enumerate(caches) if cache is not None]

    def run(x: Tensor, *rest: Tensor) -> list[Any]:
        given: list[Tensor | None] = [None] * len(caches)
        for i, cache in zip(there, rest, strict=False):
            given[i] = cache
        y = torch.func.functional_call(model, dict(zip(weights, rest[len(there) :], strict=True)), (x, given))
        return [y, *given]

    mode = new_fake_mode()
    values = [x, *(caches[i] for i in there), *weights.values()]
    with torch.no_grad():
        captured = capture_run(run, [static_fake(mode, v) for v in values], list(weights), mode)
    return captured.gm, captured.weights, [w.detach() for w in weights.values()]


@dataclass(frozen=True)
class Program:
    """One kind of call, compiled for every rank: the graphs, their weights, and the outputs that stay pieces."""

    graphs: tuple[GraphModule, ...]
    weights: tuple[Tensor, ...]
    left: tuple[Mapping[int, tuple[Piece, ...]], ...]


def compiled(
    model: ShardModel, x: Tensor, caches: Sequence[Value | None], meshes: Sequence[Mesh], dims: str, keep: str
) -> Program:
    """All ranks' graphs of `model(x, caches)`. They are checked to meet at the same fetches, in the same order."""
    captured, weight_names, weights = graph_of(model, x, [None if cache is None else cache.whole for cache in caches])
    given = [cache for cache in caches if cache is not None]
    names = [node.name for node in placeholders(captured.graph)[1 : 1 + len(given)]]
    options = parse_options({"shard": "halo", "shard_dims": dims}, {})
    kept = frozenset(range({"nothing": 1 + len(caches), "caches": 1, "all": 0}[keep], 1 + len(caches)))
    graphs, left = [], []
    for rank, mesh in enumerate(meshes):
        held = {name: cache.pieces[rank] for name, cache in zip(names, given, strict=True) if cache.pieces}
        context = Context(options, weight_names, kept, RewriteCounter(), mesh=mesh, held=held)
        gm = copy.deepcopy(captured)
        run_pipeline(gm, options.pipeline, context)
        graphs.append(gm)
        left.append(context.left)
    assert all(mine.keys() == left[0].keys() <= kept for mine in left)
    first, *others = [list(collectives(gm.graph)) for gm in graphs]
    assert all(other == first for other in others)
    return Program(tuple(graphs), tuple(weights), tuple(left))


def assert_piece(got: Tensor, whole: Tensor, pieces: Sequence[Piece], what: str) -> None:
    """That `got` is what `pieces` say of the whole, to 1e-12 of the whole's norm."""
    wanted = whole
    for piece in pieces:
        start, stop = piece.held[piece.rank]
        wanted = wanted.narrow(piece.dim, start, stop - start)
    assert got.shape == wanted.shape, f"{what}: {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    error = torch.linalg.vector_norm(got - wanted).item()
    size = torch.linalg.vector_norm(whole).item()
    assert error <= FLOAT64_BOUND * size, f"{what}: error {error:.1e} of {size:.1e}"


def check(
    model: ShardModel, inputs: Sequence[Tensor], shape: tuple[int, ...], dims: str, keep: str
) -> list[tuple[Program, list[Traffic]]]:
    """All calls on all ranks, the caches handed on as the pass left them; each output against eager.

    Returns what each call ran, and what the ranks exchanged in it.
    """
    meshes, programs, ran = all_meshes(shape), {}, []
    values: list[Value | None] = [None] * model.caches
    for x in inputs:
        key = tuple(None if cache is None else (cache.whole.shape, cache.pieces) for cache in values)
        if key not in programs:
            programs[key] = compiled(model, x, values, meshes, dims, keep)
        program, caches = programs[key], [cache for cache in values if cache is not None]
        given = [[x, *(cache.local[rank] for cache in caches), *program.weights] for rank in range(len(meshes))]
        traffic = [Traffic() for _ in meshes]
        outputs = lockstep(program.graphs, given, traffic)
        ran.append((program, traffic))
        after = [None if cache is None else cache.whole for cache in values]
        with torch.no_grad():
            expected = [model(x, after), *after]
        values = []
        for index, whole in enumerate(expected):
            local = tuple(output[index] for output in outputs)
            pieces = tuple(left[index] for left in program.left if index in left)
            for rank, got in enumerate(local):
                assert_piece(got, whole, pieces[rank] if pieces else (), f"output {index} on rank {rank}")
            values.append(Value(whole, local, pieces))
        del values[0]
    return ran


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=max(1, EXAMPLES // 5))
@given(data=st.data())
def test_each_kind_of_block(name: str, data: st.DataObject) -> None:
    model, inputs = data.draw(shard_models((name,), max_blocks=2), "model")
    shape, dims = data.draw(st.sampled_from(MESHES), "mesh")
    check(model, inputs, shape, dims, data.draw(st.sampled_from(KEPT), "keep"))


@pytest.mark.parametrize(("shape", "dims"), [*MESHES, ((1,), "h")], ids=str)
@settings(max_examples=max(1, EXAMPLES // 2))
@given(case=shard_models(max_blocks=5), keep=st.sampled_from(KEPT))
def test_rows_of_blocks(shape: tuple[int, ...], dims: str, case: tuple[ShardModel, Inputs], keep: str) -> None:
    check(*case, shape, dims, keep)


@pytest.mark.parametrize("keep", KEPT)
def test_causal_convolutions_exchange_halos_only(keep: str) -> None:
    """That what is tried above is sharded indeed: a row of halo a convolution, no cache gathered where it may stay."""
    torch.manual_seed(0)
    blocks = [CausalConv(2, (3, 3), "zeros", "zeros"), torch.nn.SiLU(), CausalConv(2, (3, 3), "zeros", "zeros")]
    model = ShardModel(blocks, [None, None, ("add", 0)]).to(torch.float64).eval()
    n, c, t, h, w = 1, 2, 2, 7, 5
    ran = check(model, list(torch.randn(3, n, c, t, h, w, dtype=torch.float64)), (3,), "h", keep)
    first, second, third = (program for program, _ in ran)
    assert second is third is not first, "two kinds of call"
    row = n * c * w * 8
    whole = {"nothing": 3, "caches": 1, "all": 0}[keep]
    for call, (program, traffic) in enumerate(ran):
        assert sorted(program.left[0]) == list(range(whole, 3))
        # The middle rank has 2 of 7 rows, and neighbours on both sides; a convolution reads 4 frames, with the cache's.
        gathered, halos = whole * (h - 2) * t * row, 2 * 2 * (t + 2) * row
        assert traffic[1].collectives == 2 + whole
        assert traffic[1].received - gathered == halos if call else 0 < traffic[1].received - gathered <= halos
