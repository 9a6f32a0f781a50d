"""Where tokens begin: small models with known answers, every attention's spelling, and what does not count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pvae.passes.ir import placeholders
from pvae.passes.token_sources import TokenSource, token_sources
from pvae.testing import capture

BOTH, QUERY, KEY = {"query", "key"}, {"query"}, {"key"}
N, S, T, C, HEADS = 2, 6, 5, 8, 2
W = torch.ones(C, C)


def sources(function: Callable[..., Any], *args: Tensor, weights: int = 0) -> list[TokenSource]:
    graph = capture(function, *args).gm.graph
    inputs = placeholders(graph)
    found = token_sources(graph, frozenset(n.name for n in inputs[len(inputs) - weights :]))
    assert [s.node for s in found] == sorted(s.node for s in found)  # in graph order
    for s in found:
        assert s.node.meta["val"].shape[s.dim] == s.size > 1
    return found


def places(found: list[TokenSource]) -> dict[str, set[str]]:
    """What each source feeds, by `arg0_1.1` (a placeholder's dimension) or `op.dim`."""

    def name(source: TokenSource) -> str:
        node = source.node
        return node.name if node.op == "placeholder" else node.target.__name__.partition(".")[0]  # type: ignore[union-attr]

    return {f"{name(s)}.{s.dim}": set(s.feeds) for s in found}


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    return torch.bmm(scores.float().softmax(-1).to(v.dtype), v.flatten(0, 1)).unflatten(0, q.shape[:2])


def by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(torch.zeros(len(q), q.shape[1], k.shape[1]), q, k.transpose(1, 2), beta=0, alpha=0.5)
    return torch.bmm(F.dropout(scores.softmax(-1), 0.1, training=False), v).unflatten(0, (N, HEADS))


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("...id, ...jd -> ...ij", q, k) + torch.zeros(q.shape[2], k.shape[2])
    return torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(dim=-1), v)


def self_attention(x: Tensor, attention: Callable[..., Tensor] = attend) -> Tensor:
    normed = F.layer_norm(x, [C])
    out = attention(heads(F.linear(normed, W)), heads(F.linear(normed, W)), heads(F.linear(normed, W)))
    return x + F.linear(out.transpose(1, 2).flatten(2), W)


def cross_attention(x: Tensor, text: Tensor, attention: Callable[..., Tensor] = attend) -> Tensor:
    out = attention(heads(F.linear(x, W)), heads(F.linear(text, W)), heads(F.linear(text, W)))
    return x + F.linear(out.transpose(1, 2).flatten(2), W)


SPELLINGS = pytest.mark.parametrize("attention", [attend, by_matmul, by_bmm, by_baddbmm, by_einsum])
x, text = torch.randn(N, S, C), torch.randn(N, T, C)


@SPELLINGS
def test_self_and_cross_attention(attention: Callable[..., Tensor]) -> None:
    def function(x: Tensor, text: Tensor) -> Tensor:
        for _ in range(2):
            x = cross_attention(self_attention(x, attention), text, attention)
        return F.linear(x, W)

    found = sources(function, x, text)
    assert places(found) == {"arg0_1.1": BOTH, "arg1_1.1": KEY}
    hidden, keys = found
    layer = 2 * N * C * C
    assert (hidden.size, hidden.linear_flops, hidden.attended_bytes) == (S, (2 * 6 + 1) * S * layer, 0)
    assert (keys.size, keys.linear_flops, keys.attended_bytes) == (T, 2 * 2 * T * layer, 2 * 2 * N * T * C * 4)


def test_attention_of_three_dimensions_and_of_inputs_themselves() -> None:
    assert places(sources(attend, x, text, text.clone())) == {"arg0_1.1": QUERY, "arg1_1.1": KEY, "arg2_1.1": KEY}
    assert places(sources(lambda x: attend(x, x, x), x)) == {"arg0_1.1": BOTH}


def test_joint_attention_follows_text_and_image_apart() -> None:
    def function(x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(2):
            joint = self_attention(torch.cat([text, x], 1))
            text, x = joint[:, :T], joint[:, T:]
            x = x + F.linear(x, W)
        return x, text

    found = sources(function, x, text)
    assert places(found) == {"arg0_1.1": BOTH, "arg1_1.1": BOTH}
    layer = 2 * N * C * C
    assert [s.linear_flops for s in found] == [2 * 5 * S * layer, 2 * 4 * T * layer]
    assert [s.attended_bytes for s in found] == [0, 0]


def test_keys_of_text_and_image_are_bytes_by_share() -> None:
    def function(x: Tensor, text: Tensor) -> Tensor:
        return cross_attention(x, torch.cat([text, x], 1))

    found = sources(function, x, text)
    assert places(found) == {"arg0_1.1": BOTH, "arg1_1.1": KEY}
    assert found[1].attended_bytes == 2 * N * T * C * 4


def test_a_patch_embedding_begins_tokens_at_its_flatten() -> None:
    def function(picture: Tensor, kernel: Tensor, table: Tensor) -> Tensor:
        tokens = F.conv2d(picture, kernel, stride=2).flatten(2).transpose(1, 2) + table
        return self_attention(tokens)

    args = torch.randn(1, 4, 4, 6), torch.randn(C, 4, 2, 2), torch.randn(1, S, C)
    assert places(sources(function, *args, weights=2)) == {"reshape.2": BOTH}
    assert places(sources(function, *args)) == {"reshape.2": BOTH}  # the table is an input


def test_patches_by_reshape() -> None:
    def function(picture: Tensor) -> Tensor:
        tokens = picture.reshape(N, 2, 2, 2, 3, 2).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return self_attention(tokens)

    (found,) = sources(function, torch.randn(N, 2, 4, 6))
    assert (found.dim, found.size, found.node.meta["val"].shape) == (1, 6, (N, 6, C))


def real_rotary(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = q.unflatten(-1, (-1, 2)).unbind(-1)
    return q * cos + torch.stack([-b, a], -1).flatten(3) * sin


def complex_rotary(q: Tensor, table: Tensor) -> Tensor:
    turned = torch.view_as_complex(q.float().unflatten(-1, (-1, 2))) * table
    return torch.view_as_real(turned).flatten(3).type_as(q)


def rotated(x: Tensor, rotary: Callable[[Tensor], Tensor]) -> Tensor:
    q, k, v = (heads(F.linear(F.rms_norm(x, [C]), W)) for _ in range(3))
    return attend(rotary(q), rotary(k), v)


def test_rotary_tables_are_no_sources() -> None:
    def inputs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotated(x, lambda q: real_rotary(q, cos, sin))

    def of_positions(x: Tensor, ids: Tensor) -> Tensor:
        angles = torch.outer(ids, torch.arange(2.0)).repeat_interleave(2, -1)
        return rotated(x, lambda q: real_rotary(q, angles.cos(), angles.sin()))

    def complex_input(x: Tensor, table: Tensor) -> Tensor:
        return rotated(x, lambda q: complex_rotary(q, table))

    def complex_of_positions(x: Tensor, ids: Tensor) -> Tensor:
        angles = torch.outer(ids, torch.arange(2.0))
        return rotated(x, lambda q: complex_rotary(q, torch.polar(torch.ones_like(angles), angles)))

    table, ids = torch.randn(S, 4), torch.arange(float(S))
    assert places(sources(inputs, x, table, table)) == {"arg0_1.1": BOTH}
    assert places(sources(of_positions, x, ids)) == {"arg0_1.1": BOTH}
    assert places(sources(complex_input, x, torch.randn(S, 2, dtype=torch.complex64))) == {"arg0_1.1": BOTH}
    assert places(sources(complex_of_positions, x, ids)) == {"arg0_1.1": BOTH}


def test_modulation_and_masks_are_no_sources() -> None:
    def modulated(x: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        shift, scale, gate = table.chunk(3, -1)
        out = self_attention(F.layer_norm(x, [C]) * (1 + scale) + shift) * gate
        return self_attention(torch.where(mask.unsqueeze(-1), out + x, 0.0))

    def by_time(x: Tensor, times: Tensor) -> Tensor:  # one time a token
        angles = times.unsqueeze(-1) * torch.arange(4.0)
        scale = F.linear(F.silu(F.linear(torch.cat([angles.cos(), angles.sin()], -1), W)), W)
        return self_attention(F.layer_norm(x, [C]) * (1 + scale))

    table, mask = torch.randn(N, S, 3 * C), torch.ones(N, S, dtype=torch.bool)
    assert places(sources(modulated, x, table, mask)) == {"arg0_1.1": BOTH}
    assert places(sources(by_time, x, torch.rand(N, S))) == {"arg0_1.1": BOTH}


def test_two_embeddings_that_are_added_are_both_sources() -> None:
    def function(x: Tensor, control: Tensor) -> Tensor:
        return self_attention(F.linear(x, W) + F.linear(control, W))

    assert places(sources(function, x, x.clone())) == {"arg0_1.1": BOTH, "arg1_1.1": BOTH}


def test_learned_and_pooled_queries_are_no_tokens() -> None:
    def resampled(x: Tensor, text: Tensor, latents: Tensor) -> Tensor:
        few = cross_attention(latents.expand(N, 3, C), text)
        return cross_attention(self_attention(x), few)

    def pooled(x: Tensor, text: Tensor) -> Tensor:
        one = cross_attention(text.mean(1, keepdim=True), text)
        return self_attention(x + one)

    assert places(sources(resampled, x, text, torch.randn(1, 3, C), weights=1)) == {"arg0_1.1": BOTH}
    assert places(sources(pooled, x, text)) == {"arg0_1.1": BOTH}


def test_registers_beside_tokens() -> None:
    def function(x: Tensor, registers: Tensor) -> Tensor:
        return self_attention(torch.cat([registers.expand(N, 4, C), x], 1))

    (found,) = sources(function, x, torch.randn(1, 4, C), weights=1)
    assert found.node.name == "arg0_1"
    assert found.linear_flops == 4 * 2 * N * S * C * C  # not the registers'


def test_windows_are_split_where_they_are_whole() -> None:
    def function(x: Tensor) -> Tensor:
        windows = F.linear(x, W).reshape(N * 2, S // 2, C)
        return self_attention(self_attention(windows).reshape(N, S, C))

    def only_windows(x: Tensor) -> Tensor:
        return self_attention(F.linear(x, W).reshape(N * 2, S // 2, C))

    assert places(sources(only_windows, x)) == {"reshape.1": BOTH}
    found = places(sources(function, x))
    assert found == {"reshape.1": BOTH}


def test_attention_within_and_over_frames() -> None:
    def function(video: Tensor) -> Tensor:
        frames = self_attention(video.flatten(0, 1))  # [b f, s, c]
        over = frames.unflatten(0, (N, 3)).transpose(1, 2).flatten(0, 1)  # [b s, f, c]
        return self_attention(self_attention(over).unflatten(0, (N, S)).transpose(1, 2).flatten(0, 1))

    (found,) = sources(function, torch.randn(N, 3, S, C))
    assert (found.node.name, found.dim, found.size, set(found.feeds)) == ("arg0_1", 2, S, BOTH)  # not the 3 frames


def test_keys_of_queries_that_stay_whole_do_not_count() -> None:
    def function(video: Tensor, text: Tensor) -> Tensor:
        frames = self_attention(video.flatten(0, 1)).unflatten(0, (N, 3))
        return cross_attention(frames.transpose(1, 2).flatten(0, 1), text.repeat_interleave(S, 0))

    (found,) = sources(function, torch.randn(N, 3, S, C), text)
    assert (found.node.name, found.dim) == ("arg0_1", 2)


def test_the_larger_of_two_places_counts_also_where_it_is_behind() -> None:
    def function(video: Tensor) -> Tensor:  # [b, f, c, h, w]
        pixels = video.flatten(3).transpose(2, 3)  # [b, f, s, c]
        over = self_attention(pixels.transpose(1, 2).flatten(0, 1)).unflatten(0, (N, S)).transpose(1, 2)
        return self_attention(over.flatten(0, 1))

    (found,) = sources(function, torch.randn(N, 3, C, 2, 3))
    assert (found.dim, found.size) == (3, S)


def test_behind_an_attention_only_unknown_ops_begin_tokens() -> None:
    def known(x: Tensor) -> Tensor:
        return self_attention(self_attention(x)[:, ::2])

    def unknown(x: Tensor, order: Tensor) -> Tensor:
        return self_attention(self_attention(x)[:, order])

    def beside_known(x: Tensor, order: Tensor) -> Tensor:
        x = self_attention(x)
        return self_attention(x + x[:, order])

    assert places(sources(known, x)) == {"arg0_1.1": BOTH}
    assert places(sources(beside_known, x, torch.arange(S))) == {"arg0_1.1": BOTH}
    assert places(sources(unknown, x, torch.arange(4))) == {"arg0_1.1": BOTH, "index.1": BOTH}


def test_an_unknown_op_ends_the_walk() -> None:
    def function(x: Tensor) -> Tensor:
        return self_attention(F.linear(x, W).sort(1).values)

    assert places(sources(function, x)) == {"getitem.1": BOTH}


def test_graphs_without_tokens() -> None:
    assert sources(lambda x: F.linear(x, W).relu(), x) == []
    assert sources(lambda x: self_attention(x), torch.randn(N, 1, C)) == []  # one token
    assert sources(lambda x: F.linear(x, W).softmax(-1) @ W, x) == []  # no keys
    assert sources(lambda x: (x[0] @ x[0, 0]).softmax(-1) @ x[0], x) == []  # one query


def test_softmax_over_queries_is_no_attention() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.transpose(1, 2)).softmax(1) @ y

    assert sources(function, x, text) == []
