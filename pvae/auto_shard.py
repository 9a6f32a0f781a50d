"""`shard="auto"`: form, dimensions and ranks by predicted cost, chosen once a region, from its first graph."""

from __future__ import annotations

import copy
from dataclasses import replace

from pvae.capture import Capture
from pvae.lockstep import simulated_mesh
from pvae.options import Options
from pvae.passes.cost import Cost, graph_cost
from pvae.passes.machine import machine_named
from pvae.passes.pipeline import run_pipeline
from pvae.passes.rule import Context
from pvae.passes.shard import ShardError
from pvae.passes.shard_choice import NONE, Candidate, Choice, candidates, choose


def choose_sharding(capture: Capture, options: Options, world: int) -> tuple[Options, Choice]:
    """The options with `auto` replaced by what costs least for `capture`'s graph on `world` ranks, and why.

    Runs no tensor and asks no rank: every rank comes to the same choice. A candidate is costed by the graphs of its first
    and its middle rank (which has neighbours on both sides), the slower counts.
    """
    machine = machine_named(options.machine)
    approximate = options.approximate == "on"
    found = candidates(world, dims=options.shard_dims, approximate=approximate, mesh=options.mesh)

    def cost(candidate: Candidate) -> Cost | str:
        ranks = sorted({0, candidate.ranks // 2}) if candidate != NONE else [0]
        try:
            return max((_rank_cost(candidate, rank) for rank in ranks), key=lambda c: c.seconds)
        except ShardError as error:
            return str(error)

    def _rank_cost(candidate: Candidate, rank: int) -> Cost:
        mesh = None if candidate == NONE else simulated_mesh(candidate.mesh, rank)
        gm = copy.deepcopy(capture.gm)
        context = Context(_fixed(options, candidate), capture.weights, mesh=mesh)
        run_pipeline(gm, options.pipeline, context, check=False)
        return graph_cost(gm.graph, machine, capture.weights)

    choice = choose(found, cost, machine)
    return _fixed(options, choice.candidate), choice


def _fixed(options: Options, candidate: Candidate) -> Options:
    if candidate == NONE:
        return replace(options, shard="none")
    return replace(options, shard=candidate.form, shard_dims=candidate.dims, mesh=candidate.mesh)
