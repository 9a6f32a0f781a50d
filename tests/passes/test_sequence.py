"""The sequence form on small transformers: every rank's graph together computes what one rank does, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pvae.lockstep import Traffic
from pvae.passes.sharder import ShardError
from pvae.runtime.exchange import exchange
from tests.passes.shard_case import Sharded, assert_same, shard

HEADS, WIDTH = 4, 3
CHANNELS = HEADS * WIDTH


def tokens(n: int, batch: int = 1, channels: int = CHANNELS) -> Tensor:
    return torch.randn(batch, n, channels, dtype=torch.float64)


def weight(*shape: int) -> Tensor:
    return torch.randn(shape or (CHANNELS, CHANNELS), dtype=torch.float64)


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    return x.unflatten(2, (count, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def self_attention(x: Tensor, w: Tensor, **how: Any) -> Tensor:
    y = F.linear(x, w)
    return joined(F.scaled_dot_product_attention(heads(y), heads(y * 2), heads(y.sin()), **how))


def sequence(function: Callable[..., Any], *args: Tensor, **how: Any) -> Sharded:
    """On a machine whose gathers are slow, so that heads are exchanged where that can be."""
    return shard(function, *args, shard="sequence", **{"mesh": (3,), "machine": "h200,link=1", **how})


def targets(found: Sharded, rank: int = 0) -> list[str]:
    return [str(getattr(n.target, "__name__", n.target)) for n in found.graphs[rank].graph.nodes]


@pytest.mark.parametrize("world", [2, 3, 4, 5])
@pytest.mark.parametrize("n", [1, 2, 7, 13])
def test_self_attention_exchanges_heads_for_tokens(world: int, n: int) -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(self_attention(x, w) + x, w)

    x, w = tokens(n, 2), weight()
    found = sequence(model, x, w, mesh=(world,), weights=1)
    assert_same(found, model, x, w)
    if n > 1:
        assert found.report.counters["heads"] == 2 and found.report.counters["gather"] <= 1
        assert not found.whole


def test_nothing_but_heads_and_the_result_travels() -> None:
    x, w = tokens(12), weight()
    found = sequence(lambda x, w: F.linear(self_attention(x, w) + x, w), x, w, mesh=(4,), weights=1)
    traffic = [Traffic() for _ in range(4)]
    found.run(x, w, traffic=traffic)
    moved = 8 * 12 * CHANNELS * 3 // 4 // 4  # what a rank has of one tensor, less what stays
    assert [(t.collectives, t.received) for t in traffic] == [(3, 4 * moved + 8 * 9 * CHANNELS)] * 4


@pytest.mark.parametrize(("text", "world"), [(5, 2), (5, 3), (2, 4), (1, 3)])
def test_joint_attention_keeps_every_rank_its_pieces_of_both(text: int, world: int) -> None:
    def model(x: Tensor, y: Tensor, cos: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([F.linear(y, w), F.linear(x, w)], 1) * cos
        both = self_attention(both, w) + both
        y, x = both[:, : y.shape[1]], both[:, y.shape[1] :]
        return F.linear(x, w), F.layer_norm(y, [CHANNELS])

    args = tokens(11), tokens(text), tokens(11 + text), weight()
    found = sequence(model, *args, mesh=(world,), weights=1)
    outputs, whole = found.run(*args), model(*args)
    for ours in outputs:
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)
    assert found.report.counters["heads"] == 2 and found.report.counters["gather"] <= 2
    assert found.report.counters["exchange"] <= 2 and not found.whole  # the results


def masks(n: int, text: int) -> dict[str, Tensor]:
    keep = torch.rand(2, n + text) > 0.3
    keep[:, :2] = True
    return {
        "keys": keep[:, None, None, :],
        "pairs": (keep[:, None, None, :] & torch.rand(1, 1, n + text, 1).gt(-1)),
        "two dimensions": keep[0][None, :].expand(n + text, -1).contiguous(),
        "additive, by head": torch.randn(2, HEADS, n + text, n + text, dtype=torch.float64),
        "additive": torch.randn(1, 1, 1, n + text, dtype=torch.float64),
    }


@pytest.mark.parametrize("kind", masks(2, 2))
@pytest.mark.parametrize("text", [0, 5])
def test_masks_follow_the_order_in_which_tokens_are_held(kind: str, text: int) -> None:
    def model(x: Tensor, y: Tensor, mask: Tensor, w: Tensor) -> Tensor:
        both = torch.cat([y, x], 1) if text else x
        return self_attention(both, w, attn_mask=mask)[:, text:]

    args = tokens(7, 2), tokens(text or 1, 2), masks(7, text)[kind], weight()
    found = sequence(model, *args, weights=1)
    assert_same(found, model, *args)
    assert found.report.counters["heads"] == 2


@pytest.mark.parametrize(("kv", "world"), [(1, 2), (2, 2), (2, 3), (2, 4), (4, 3), (3, 4)])
def test_grouped_queries(kv: int, world: int) -> None:
    count = 6 if kv == 3 else 4

    def model(x: Tensor, w: Tensor, small: Tensor) -> Tensor:
        q, k = heads(F.linear(x, w), count), heads(F.linear(x, small), kv)
        return joined(F.scaled_dot_product_attention(q, k, k + 1, enable_gqa=True))

    x, w, small = tokens(9), weight(count * WIDTH, CHANNELS), weight(kv * WIDTH, CHANNELS)
    found = sequence(model, x, w, small, mesh=(world,), weights=2)
    assert_same(found, model, x, w, small)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_causal_attention(world: int) -> None:
    x, w = tokens(7), weight()
    found = sequence(lambda x, w: self_attention(x, w, is_causal=True), x, w, mesh=(world,), weights=1)
    assert_same(found, lambda x, w: self_attention(x, w, is_causal=True), x, w)
    assert not found.whole


def test_causal_attention_over_two_segments_is_computed_whole() -> None:
    def model(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return self_attention(torch.cat([x, y], 1), w, is_causal=True)

    found = sequence(model, tokens(7), tokens(3), weight(), weights=1)
    assert found.whole == {"scaled_dot_product_attention.default": "causal attention over a split token dimension"}


def test_cross_attention_is_local_to_its_queries() -> None:
    def model(x: Tensor, text: Tensor, w: Tensor) -> Tensor:
        x = self_attention(x, w)
        k, v = heads(F.linear(text, w)), heads(F.linear(text, w).cos())
        return joined(F.scaled_dot_product_attention(heads(F.linear(x, w)), k, v))

    args = tokens(9), tokens(4), weight()
    found = sequence(model, *args, weights=1)
    assert_same(found, model, *args)
    assert found.report.counters["heads"] == 2 and found.report.counters["gather"] == 1  # that is the result
    cuts = [r.node for r in found.report.matches if r.rule == "cut"]
    assert len(cuts) == 1


@given(
    batch=st.integers(1, 2),
    text=st.integers(0, 6),
    image=st.integers(1, 9),
    count=st.sampled_from([1, 2, 3, 6]),
    world=st.integers(2, 5),
    depth=st.integers(1, 2),
    order=st.booleans(),
)
def test_any_sizes(batch: int, text: int, image: int, count: int, world: int, depth: int, order: bool) -> None:
    """Joint attention over segments, rotary tables, modulation, several layers: any sizes, worlds and heads."""
    channels = 6 * count

    def rotated(x: Tensor, table: Tensor) -> Tensor:
        pair = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pair * table).flatten(-2)

    def model(x: Tensor, y: Tensor, scale: Tensor, angle: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        table = torch.polar(torch.ones_like(angle), angle)
        for _ in range(depth):
            parts = [y, x] if order else [x, y]
            both = F.layer_norm(torch.cat(parts, 1), [channels]) * (1 + scale)
            q, k, v = (heads(z, count) for z in F.linear(both, w).chunk(3, -1))
            out = joined(F.scaled_dot_product_attention(rotated(q, table), rotated(k, table), v))
            first = parts[0].shape[1]
            pieces = [out[:, :first], out[:, first:]]
            y, x = pieces if order else pieces[::-1]
        return x, y

    args = (
        tokens(image, batch, channels),
        tokens(text, batch, channels),
        tokens(1, batch, channels),
        torch.randn(image + text, 3, dtype=torch.float64),
        weight(3 * channels, channels) / channels**0.5,
    )
    found = sequence(model, *args, mesh=(world,), weights=1)
    whole = model(*args)
    for ours in found.run(*args):
        torch.testing.assert_close(tuple(ours), whole, rtol=1e-12, atol=1e-12)


def test_patch_embedding_and_unpatchify_are_inside() -> None:
    conv, back = torch.nn.Conv2d(2, CHANNELS, 2, 2).double().requires_grad_(False), weight(8, CHANNELS)

    def model(x: Tensor, kernel: Tensor, w: Tensor, out: Tensor) -> Tensor:
        b, _, h, wide = x.shape
        t = F.conv2d(x, kernel, None, 2).flatten(2).transpose(1, 2)
        t = F.linear(self_attention(t, w), out)
        return t.reshape(b, h // 2, wide // 2, 2, 2, 2).permute(0, 5, 1, 3, 2, 4).reshape(b, 2, h, wide)

    args = torch.randn(1, 2, 6, 10, dtype=torch.float64), conv.weight, weight(), back
    found = sequence(model, *args, weights=3)
    assert_same(found, model, *args)
    assert found.report.counters["heads"] == 2 and not found.whole


def test_a_batch_of_two_branches_on_the_first_axis() -> None:
    def model(x: Tensor, text: Tensor, shift: Tensor, w: Tensor) -> Tensor:
        x = self_attention(x + shift, w)
        k = heads(F.linear(text, w))
        return joined(F.scaled_dot_product_attention(heads(x), k, k + 1))

    args = tokens(7, 2), tokens(3, 2), tokens(1, 2), weight()
    found = sequence(model, *args, mesh=(2, 2), weights=1)
    assert_same(found, model, *args)
    shapes = {tuple(n.meta["val"].shape) for n in found.graphs[0].graph.nodes if "linear" in n.name}
    assert (1, 4, CHANNELS) in shapes
    with pytest.raises(ShardError, match="has a batch of 1"):
        sequence(model, tokens(7), tokens(3), tokens(1), weight(), mesh=(2, 2), weights=1)


def test_inputs_by_name() -> None:
    x, w = tokens(7, 2), weight()

    def model(x: Tensor, w: Tensor) -> Tensor:
        return self_attention(x, w)

    name = next(n.name for n in sequence(model, x, w, weights=1).graphs[0].graph.nodes)
    for dim in (1, -2):
        found = sequence(model, x, w, weights=1, shard_inputs={name: dim})
        assert_same(found, model, x, w)
    both = sequence(model, x, w, weights=1, mesh=(2, 2), shard_inputs={name: (0, 1)})
    assert_same(both, model, x, w)
    with pytest.raises(ShardError, match=rf"no tensor argument is called 'hidden'; this call has {name} \[2, 7, 12\]"):
        sequence(model, x, w, weights=1, shard_inputs={"hidden": 1})
    with pytest.raises(ShardError, match="has no dimension 3"):
        sequence(model, x, w, weights=1, shard_inputs={name: 3})


def test_without_attention_nothing_is_split() -> None:
    found = sequence(lambda x, w: F.linear(x, w).relu(), tokens(7), weight(), weights=1)
    assert [r.note for r in found.report.refusals] == ["no attention over tokens of an input"]


@pytest.mark.parametrize(
    ("count", "world", "boxes"), [(2, 4, 2), (1, 3, 1), (4, 4, 4), (3, 4, 1), (5, 4, 1), (2, 6, 2)]
)
def test_few_heads_are_spread_over_groups_of_ranks(count: int, world: int, boxes: int) -> None:
    """In a group a rank takes its share of the queries and all keys of the group's heads."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        y = heads(F.linear(x, w), count)
        return joined(F.scaled_dot_product_attention(y, y + 1, y * 2))

    width = 512 * count
    x, w = tokens(12, 1, width), weight(width, width) / width
    found = sequence(model, x, w, mesh=(world,), weights=1, machine="h200,fp64=1e6,link=1e9")
    assert_same(found, model, x, w)
    (there, *_) = [n for n in found.graphs[0].graph.nodes if n.target is exchange] or [None]
    assert len({box[0] for box in there.args[2][0]} if there else {()}) == boxes


def test_what_costs_less_is_taken() -> None:
    x, w = tokens(12), weight()
    for machine, heads_exchanged in (("h200,link=1", 2), ("h200,link=1e20", 0)):
        found = sequence(self_attention, x, w, mesh=(4,), weights=1, machine=machine)
        assert_same(found, self_attention, x, w)
        assert found.report.counters["heads"] == heads_exchanged
