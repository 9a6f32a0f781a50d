"""The processes of `test_sequence_gloo.py`: transformers split over ranks by their tokens. They are started, and report, as
those of `shard_gloo.py` are and do."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import pvae
from pvae.runtime.sharded_tensor import ShardedTensor
from pvae.testing import relative_error
from tests.pvae.shard_gloo import PATIENT, SECONDS, SESSIONS, latents, main, scenario, small, worst

__all__ = ["SESSIONS"]


# --- a small transformer -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """`[batch, tokens, 24]` and text `[batch, words, 24]`, as a list of one, to both."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.words = nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, 24)

    def heads(self, x: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (3, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]

    def forward(self, hidden: Tensor, texts: list[Tensor], scale: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        size = hidden.shape[1]
        joint = torch.cat([F.layer_norm(hidden, (24,)), F.layer_norm(texts[0], (24,))], 1)
        attended = F.scaled_dot_product_attention(*self.heads(joint)).transpose(1, 2).flatten(2)
        hidden = hidden + self.out(attended[:, :size]) * (1 if scale is None else scale)
        return hidden, [texts[0] + self.words(attended[:, size:])]


class Transformer(nn.Module):
    """Blocks whose last result is the model's own."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.blocks = nn.Linear(6, 24), nn.ModuleList(Block() for _ in range(3))

    def forward(self, hidden_states: Tensor, text: Tensor) -> dict[str, Tensor]:
        hidden, texts = self.enter(hidden_states), [text]
        for block in self.blocks:
            hidden, texts = block(hidden, texts)
        return {"image": hidden, "text": texts[0]}


def inputs(tokens: int = 11) -> tuple[Tensor, Tensor]:
    return latents(2, tokens, 6), latents(2, 5, 24)


def error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return worst(*(relative_error(got[name], wanted[name]) for name in wanted))


def graphs(model: nn.Module) -> dict[str, int]:
    """How many kinds of call, how many of them were compiled, and in how many ranks exchange anything."""
    found = pvae.report(model).graphs
    counters = [p.counters for graph in found for p in graph.passes if p.name == "shard"]
    moving = sum(any(c[kind] for kind in ("heads", "exchange", "gather")) for c in counters)
    return {"graphs": len(found), "compiled": sum(g.shared_with is None for g in found), "moving": moving}


# --- two ranks: models of the zoo ---------------------------------------------------------------------------------------------


def zoo(name: str, regions: str, **size: Any) -> dict[str, Any]:
    case = load(name, dtype=torch.float64, **size)
    wanted = case.run()
    pvae.compile(case.model, shard="sequence", regions=regions, **PATIENT)
    errors = [relative_error(case.run(), wanted) for _ in range(2)]
    return {"error": worst(*errors), **graphs(case.model)}


@scenario("models")
def wan_whole(rank: int) -> dict[str, Any]:
    """With the patch embedding and the way back to a picture."""
    return zoo("wan2.1-dit", "whole", size=(3, 6, 10))


@scenario("models")
def wan_blocks(rank: int) -> dict[str, Any]:
    return zoo("wan2.1-dit", "blocks", size=(3, 6, 10))


@scenario("models")
def flux_blocks(rank: int) -> dict[str, Any]:
    """Two kinds of block, with image and text between them."""
    return zoo("flux-dit", "blocks")


@scenario("models")
def qwen_image_blocks_by_torch_compile(rank: int) -> dict[str, Any]:
    """As diffusers compiles them: Dynamo is given pieces and hands them on."""
    case = load("qwen-image-dit", dtype=torch.float64)
    wanted = case.run()
    options = {"shard": "sequence", "gather": "off", **PATIENT}
    case.model.compile_repeated_blocks(backend="pvae", fullgraph=True, options=options)
    errors = [relative_error(case.run(), wanted) for _ in range(2)]
    return {"error": worst(*errors), **graphs(case.model)}


@scenario("models")
def guidance_branches(rank: int) -> dict[str, Any]:
    """A mesh of two by one: each rank has one branch of guidance, and all of its tokens."""
    model, given = small(Transformer), inputs()
    wanted = model(*given)
    pvae.compile(model, shard="sequence", mesh="2x1", **PATIENT)
    return {"error": error(model(*given), wanted), **graphs(model)}


@scenario("models")
def inductor(rank: int) -> dict[str, Any]:
    model, given = small(Transformer), inputs()
    wanted = model(*given)
    pvae.compile(model, shard="sequence", timeout=120)
    return {"error": worst(*(error(model(*given), wanted) for _ in range(2))), **graphs(model)}


@scenario("models")
def inductor_by_torch_compile(rank: int) -> dict[str, Any]:
    model, given = small(Transformer), inputs()
    wanted = model(*given)
    for block in model.blocks:
        block.compile(backend="pvae", fullgraph=True, options={"shard": "sequence", "gather": "off", "timeout": 120.0})
    return {"error": worst(*(error(model(*given), wanted) for _ in range(2))), **graphs(model)}


# --- three ranks: a small model, every way in ---------------------------------------------------------------------------------


@scenario("tokens")
def whole_model(rank: int) -> dict[str, Any]:
    model, given = small(Transformer), inputs()
    wanted = model(*given)
    pvae.compile(model, shard="sequence", regions="whole", **PATIENT)
    return {"error": worst(*(error(model(*given), wanted) for _ in range(2))), **graphs(model)}


@scenario("tokens")
def whole_model_by_torch_compile(rank: int) -> dict[str, Any]:
    model, given = small(Transformer), inputs()
    wanted = model(*given)
    compiled = torch.compile(model, backend="pvae", fullgraph=True, options={"shard": "sequence", **PATIENT})
    return {"error": worst(*(error(compiled(*given), wanted) for _ in range(2))), **graphs(model)}


@scenario("tokens")
def fewer_tokens_than_ranks(rank: int) -> dict[str, Any]:
    """Kept on by a later call with more."""
    model, found = small(Transformer), []
    calls = [inputs(tokens=2), inputs(tokens=7), inputs(tokens=1)]
    wanted = [model(*given) for given in calls]
    pvae.compile(model, shard="sequence", **PATIENT)
    found = [error(model(*given), w) for given, w in zip(calls, wanted, strict=True)]
    return {"error": worst(*found)}


@scenario("tokens")
def blocks_hand_on_pieces(rank: int) -> dict[str, Any]:
    """One compile for all blocks that are given pieces, and one for the first; whole results at the model's end."""
    model, given, seen = small(Transformer), inputs(), []
    wanted = model(*given)
    pvae.compile(model, shard="sequence", **PATIENT)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    got = model(*given)
    with torch.inference_mode():
        again = model(*given)
    pieces = [isinstance(x, ShardedTensor) for x in seen[:3]]
    return {
        "error": worst(error(got, wanted), error(again, wanted)),
        "pieces": pieces,
        "plain": all(type(x) is Tensor for x in got.values()),
        "local": list(seen[1].local.shape),
        "notes": [graph.notes for graph in pvae.report(model).graphs],
        **graphs(model),
    }


@scenario("tokens")
def results_left_as_pieces(rank: int) -> dict[str, Any]:
    model, given = small(Transformer), inputs()
    wanted, errors, local = model(*given), [], []
    for regions in ("whole", "blocks"):
        pvae.compile(model, shard="sequence", regions=regions, gather="off", **PATIENT)
        got = model(*given)
        assert all(isinstance(x, ShardedTensor) for x in got.values())
        local.append(list(got["image"].local.shape))
        errors.append(error({name: x.whole() for name, x in got.items()}, wanted))
    return {"error": worst(*errors), "local": local}


@scenario("tokens")
def named_inputs(rank: int) -> dict[str, Any]:
    """By the model's own names, by both entrances; an item of a list has its index behind the name."""
    block, hidden, text = small(Block), latents(2, 11, 24), latents(2, 5, 24)
    wanted = block(hidden, [text])
    named = {"shard_inputs": {"hidden": 1, "texts_0": -2}, "shard": "sequence", **PATIENT}
    compiled = torch.compile(block, backend="pvae", fullgraph=True, options=named)
    results = [compiled(hidden, texts=[text])]
    pvae.compile(block, **named)
    results.append(block(hidden=hidden, texts=[text]))
    cut = [{r.node for p in g.passes for r in p.matches if r.rule == "cut"} for g in pvae.report(block).graphs]
    errors = [
        relative_error(g, w) for got in results for g, w in zip((got[0], *got[1]), (wanted[0], *wanted[1]), strict=True)
    ]
    return {"error": worst(*errors), "cut": [sorted(names) for names in cut]}


@scenario("tokens")
def a_name_that_is_not_there(rank: int) -> dict[str, Any]:
    block = pvae.compile(small(Block), shard="sequence", shard_inputs={"image": 1}, **PATIENT)
    block(latents(2, 11, 24), [latents(2, 5, 24)])
    return {}


@scenario("tokens")
def auto(rank: int) -> dict[str, Any]:
    """One choice for all blocks: on a machine of slow arithmetic to split, on an H200 not to, for so small a model."""
    found = {}
    model, given = small(Transformer), inputs()
    wanted = model(*given)
    for name, machine in (("fast", "h200"), ("slow", "h200,fp64=1e6")):
        pvae.compile(model, shard="auto", machine=machine, **PATIENT)
        found[name] = error(model(*given), wanted)
        found[f"{name} forms"] = sorted({block.forward.options.shard for block in model.blocks})
    return {"error": worst(found.pop("fast"), found.pop("slow")), **found}


@scenario("tokens")
def batch_and_tokens(rank: int) -> dict[str, Any]:
    """A mesh of one row of three: all branches of guidance in each rank's batch."""
    model, given = small(Transformer), inputs()
    wanted = model(*given)
    pvae.compile(model, shard="sequence", mesh="1x3", **PATIENT)
    return {"error": error(model(*given), wanted)}


@scenario("tokens")
def eager_code_between_blocks(rank: int) -> dict[str, Any]:
    """A residual of a control net, say: what is no block gathers what it reads."""
    model, given = small(Transformer), inputs()
    forward = model.blocks[1].forward

    def run() -> dict[str, Tensor]:
        hidden, texts = model.blocks[0](model.enter(given[0]), [given[1]])
        hidden, texts = model.blocks[1](hidden + 1, texts)
        return {"image": hidden.flip(1), "text": texts[0].clone()}

    wanted = run()
    pvae.compile(model, shard="sequence", **PATIENT)
    assert model.blocks[1].forward != forward
    return {"error": error(run(), wanted)}


# --- three ranks that do not do the same ---------------------------------------------------------------------------------------


def hasty(model: nn.Module, **options: Any) -> Any:
    dist.barrier()  # on a busy machine ranks are late without any fault
    return pvae.compile(model, shard="sequence", engine="eager", timeout=SECONDS, **options)


def total(found: dict[str, Tensor]) -> dict[str, Any]:
    return {"sum": found["image"].sum().item()}


@scenario("apart")
def another_token_count(rank: int) -> dict[str, Any]:
    return total(hasty(small(Transformer), regions="whole")(*inputs(tokens=12 if rank == 2 else 11)))


@scenario("apart")
def another_token_count_block_by_block(rank: int) -> dict[str, Any]:
    return total(hasty(small(Transformer))(*inputs(tokens=12 if rank == 2 else 11)))


@scenario("apart")
def never_calls(rank: int) -> dict[str, Any]:
    model = hasty(small(Transformer))
    if rank == 2:
        time.sleep(SECONDS + 2)
    return total(model(*inputs()))


@scenario("apart")
def fails_between_blocks(rank: int) -> dict[str, Any]:
    """In a submodule that is no block, before the second block is compiled."""
    model = small(Transformer)
    forward = model.blocks[1].heads

    def heads(x: Tensor) -> list[Tensor]:
        if rank == 2:
            raise ValueError("boom")
        return forward(x)

    model.blocks[1].heads = heads
    return total(hasty(model)(*inputs()))


@scenario("apart")
def all_call_again(rank: int) -> dict[str, Any]:
    model, given = small(Transformer), inputs()
    wanted = model(*given)
    return {"error": error(hasty(model)(*given), wanted)}


@scenario("apart")
def fails_before_the_end(rank: int) -> dict[str, Any]:
    """Behind the last block, before its pieces are gathered. The last of its session: gloo's pairs are gone."""
    model = hasty(small(Transformer))

    def leave(_: nn.Module, args: Any, result: Any) -> None:
        if rank == 2:
            raise ValueError("boom")

    model.blocks[2].register_forward_hook(leave)
    return total(model(*inputs()))


@scenario("stops")
def stops_after_a_block(rank: int) -> dict[str, Any]:
    """In the steady state blocks do not agree anew: it is the exchange that ends. Gloo's pairs are gone after it."""
    model, given = hasty(small(Transformer)), inputs()
    model(*given)
    if rank == 2:
        model.blocks[0](model.enter(given[0]), [given[1]])
        time.sleep(SECONDS + 4)
        return {}
    return total(model(*given))


if __name__ == "__main__":
    if any(session.startswith("models=") for session in sys.argv):
        from diffusers import (  # noqa: F401  (once for all ranks)
            FluxTransformer2DModel,
            QwenImageTransformer2DModel,
            WanTransformer3DModel,
        )

        from pvae.tools.zoo import load

    main(*sys.argv[1:])
