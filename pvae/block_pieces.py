"""Block by block under `shard="sequence"`: tokens stay split from one block to the next, and are whole at the model's end.

The first block is given whole tensors. They are cut before it, to the pieces that the pass would cut them into, so that it
is the same kind of call as the others: one compile for all, and nothing that the ranks would have to agree on anew.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pvae.capture import Capture
from pvae.options import Options
from pvae.passes.ir import placeholders
from pvae.passes.machine import machine_named
from pvae.passes.main_rank import has_regions
from pvae.passes.pipeline import Pipeline, run_pipeline
from pvae.passes.rule import Context, Report
from pvae.passes.sequence import token_cuts
from pvae.passes.shard import SHARD, pieces_of
from pvae.passes.sharder import Sharder
from pvae.ranks import Ranks
from pvae.runtime.mesh import Mesh
from pvae.runtime.sharded_tensor import Piece, ShardedTensor

Pieces = tuple[Piece, ...]


def input_pieces(capture: Capture, inputs: Sequence[Any], options: Options, mesh: Mesh) -> dict[int, Pieces]:
    """The pieces that the sequence form would cut whole inputs into, by the input's number; of those that it cuts.

    `inputs` are those of the call, without weights. None are cut that the block writes to.
    """
    names = [step.pass_.name for step in options.pipeline.steps]
    if max(mesh.shape) == 1 or SHARD.name not in names or capture.mutated or has_regions(capture.gm.graph):
        return {}
    gm = copy.deepcopy(capture.gm)
    nodes = placeholders(gm.graph)
    held = {n.name: x.pieces for n, x in zip(nodes, inputs, strict=False) if isinstance(x, ShardedTensor)}
    context = Context(options, capture.weights, mesh=mesh, held=held, arguments=capture.arguments)
    before = Pipeline(options.pipeline.steps[: names.index(SHARD.name)])
    run_pipeline(gm, before, context, check=False)
    sharder = Sharder(gm.graph, mesh, Report(SHARD.name), sequence=True, machine=machine_named(options.machine))
    cuts = token_cuts(gm.graph, sharder, context)
    found = {i: pieces_of(cuts[node], mesh) for i, node in enumerate(nodes) if node in cuts}
    return {i: pieces for i, pieces in found.items() if pieces}


def cut(whole: torch.Tensor, pieces: Pieces) -> ShardedTensor:
    """This rank's piece of what every rank has whole."""
    for piece in pieces:
        start, stop = piece.held[piece.rank]
        whole = whole.narrow(piece.dim, start, stop - start)
    return ShardedTensor(whole.contiguous(), pieces)


def cut_inputs(tensors: Sequence[torch.Tensor], cuts: Mapping[int, Pieces]) -> list[torch.Tensor]:
    return [cut(t, cuts[i]) if i in cuts else t for i, t in enumerate(tensors)]


class Ranked(Protocol):
    """What knows its ranks once it was called."""

    ranks: Ranks | None


@dataclass(frozen=True)
class WholeResults:
    """A forward hook of the model: what blocks left as pieces leaves it whole. `block` is one of them."""

    block: Ranked

    def __call__(self, model: nn.Module, args: Any, result: Any) -> Any:
        leaves, spec = tree_flatten(result)
        if not any(isinstance(leaf, ShardedTensor) for leaf in leaves):
            return result
        ranks = self.block.ranks
        with nullcontext() if ranks is None else ranks.guarded(type(model).__name__):
            leaves = [leaf.whole() if isinstance(leaf, ShardedTensor) else leaf for leaf in leaves]
        return tree_unflatten(leaves, spec)
