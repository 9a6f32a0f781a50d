"""`shard="auto"`: form, dimensions and ranks by predicted cost, chosen once a region, from its first graph."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch.fx import Graph

from pvae.capture import Capture
from pvae.lockstep import simulated_mesh
from pvae.options import Options
from pvae.passes.cost import Cost, graph_cost
from pvae.passes.ir import ConvNode, value
from pvae.passes.machine import machine_named
from pvae.passes.pipeline import run_pipeline
from pvae.passes.rule import Context
from pvae.passes.shard import ShardError
from pvae.passes.shard_choice import NONE, Candidate, Choice, candidates, choose
from pvae.passes.token_sources import token_sources


def choose_sharding(capture: Capture, options: Options, world: int) -> tuple[Options, Choice]:
    """The options with `auto` replaced by what costs least for `capture`'s graph on `world` ranks, and why.

    Runs no tensor and asks no rank: every rank comes to the same choice. A candidate is costed by the graphs of its first
    and its middle rank (which has neighbours on both sides), the slower counts.
    """
    machine = machine_named(options.machine)
    approximate = options.approximate == "on"
    tokens = world > 1 and (options.shard_inputs is not None or of_tokens(capture.gm.graph, capture.weights))
    found = candidates(world, dims=options.shard_dims, approximate=approximate, mesh=options.mesh, tokens=tokens)

    def cost(candidate: Candidate) -> Cost | str:
        ranks = sorted({0, candidate.ranks // 2}) if candidate != NONE else [0]
        try:
            return max((_rank_cost(candidate, rank) for rank in ranks), key=lambda c: c.seconds)
        except ShardError as error:
            if options.shard_inputs is not None:  # they were asked for, and do not fit
                raise
            return str(error)

    def _rank_cost(candidate: Candidate, rank: int) -> Cost:
        mesh = None if candidate == NONE else simulated_mesh(candidate.mesh, rank)
        gm = copy.deepcopy(capture.gm)
        context = Context(_fixed(options, candidate), capture.weights, mesh=mesh, arguments=capture.arguments)
        run_pipeline(gm, options.pipeline, context, check=False)
        return graph_cost(gm.graph, machine, capture.weights)

    choice = choose(found, cost, machine)
    return _fixed(options, choice.candidate), choice


def of_tokens(graph: Graph, weights: frozenset[str]) -> bool:
    """Whether more is computed on tokens than by convolutions; a VAE's attention is not what there is to gain by."""
    products = sum(source.linear_flops for source in token_sources(graph, weights))
    convolutions = (conv for node in graph.nodes if (conv := ConvNode.of(node)))
    return products > sum(2 * value(c.node).numel() * value(c.weight)[0].numel() for c in convolutions)


def _fixed(options: Options, candidate: Candidate) -> Options:
    if candidate == NONE:
        return replace(options, shard="none", shard_inputs=None)
    if candidate.form == "sequence":
        return replace(options, shard="sequence", shard_dims="auto", mesh=candidate.mesh)
    return replace(options, shard=candidate.form, shard_dims=candidate.dims, mesh=candidate.mesh)
