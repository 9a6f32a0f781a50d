"""Where dimensions begin: every op that carries one, with known answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pvae.passes.ir import output_node, placeholders, value
from pvae.passes.origins import Origins
from pvae.testing import capture

X = (2, 6, 8)
Begins = list[tuple[int, set[str]]]


def begins(function: Callable[..., Any], *args: Tensor, dim: int, weights: int = 0) -> Begins:
    """The runs of a dimension of what `function` returns: size, and where it begins as `x0.1` (dimension 1 of argument 0)
    or `op.dim`. The last `weights` arguments are weights."""
    graph = capture(function, *args).gm.graph
    inputs = placeholders(graph)
    names = {node: f"x{i}" for i, node in enumerate(inputs)}
    origins = Origins(graph, frozenset(n.name for n in inputs[len(inputs) - weights :]))
    (out,) = output_node(graph).args[0]

    def named(place: Any) -> str:
        node, d = place
        return f"{names.get(node) or node.target.__name__.partition('.')[0]}.{d}"

    assert sum(run.size for run in origins.of(out, dim)) == value(out).shape[dim]
    return [(run.size, {named(place) for place in run.begins}) for run in origins.of(out, dim)]


def rotated(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., ::2], out[..., 1::2] = -x[..., 1::2], x[..., ::2]
    return out


# Dimension 1 of x `[2, 6, 8]` carried to dimension `dim` of the result.
CARRY: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "pointwise": (lambda x: F.gelu(x) * 2 + x.sigmoid(), 1),
    "cast": (lambda x: x.to(torch.float64).to(torch.float32), 1),
    "dropout": (lambda x: F.dropout(x, 0.5, training=False), 1),
    "where": (lambda x: torch.where(x > 0, x, torch.zeros_like(x)), 1),
    "masked_fill": (lambda x: x.masked_fill(x > 0, 0.0), 1),
    "linear": (lambda x: F.linear(x, torch.ones(3, 8)), 1),
    "matmul": (lambda x: x @ torch.ones(8, 3), 1),
    "matmul's right side": (lambda x: torch.ones(2, 3, 8) @ x.transpose(1, 2), 2),
    "matmul by a vector": (lambda x: x @ torch.ones(8), 1),
    "matmul of a vector": (lambda x: torch.ones(8) @ x.transpose(1, 2), 1),
    "bmm": (lambda x: torch.bmm(x, torch.ones(2, 8, 3)), 1),
    "baddbmm": (lambda x: torch.baddbmm(torch.ones(2, 6, 3), x, torch.ones(2, 8, 3)), 1),
    "einsum": (lambda x: torch.einsum("bsd,de->esb", x, torch.ones(8, 3)), 1),
    "conv1d of one position": (lambda x: F.conv1d(x.transpose(1, 2), torch.ones(3, 8, 1)), 2),
    "layer_norm": (lambda x: F.layer_norm(x, [8]), 1),
    "rms_norm": (lambda x: F.rms_norm(x, [8]), 1),
    "group_norm": (lambda x: F.group_norm(x.transpose(1, 2), 2), 2),
    "rms norm by hand": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), 1),
    "softmax elsewhere": (lambda x: x.softmax(-1), 1),
    "cumsum elsewhere": (lambda x: x.cumsum(-1), 1),
    "sum elsewhere": (lambda x: x.sum(0), 0),
    "mean elsewhere": (lambda x: x.mean(-1, keepdim=True), 1),
    "amax elsewhere": (lambda x: x.amax(0), 0),
    "transpose": (lambda x: x.transpose(0, 1), 0),
    "permute": (lambda x: x.permute(2, 0, 1), 2),
    "t": (lambda x: x[0].t(), 1),
    "reshape to heads": (lambda x: x.reshape(2, 6, 4, 2), 1),
    "flatten of heads": (lambda x: x.reshape(2, 6, 4, 2).transpose(1, 2).permute(0, 2, 1, 3).flatten(2), 1),
    "unflatten": (lambda x: x.unflatten(-1, (-1, 2)), 1),
    "unsqueeze, squeeze": (lambda x: x.unsqueeze(1).unsqueeze(-1).squeeze(1), 1),
    "expand": (lambda x: x.unsqueeze(1).expand(2, 3, 6, 8), 2),
    "slice elsewhere": (lambda x: x[..., ::2], 1),
    "select elsewhere": (lambda x: x[0], 0),
    "chunk elsewhere": (lambda x: x.chunk(2, dim=-1)[1], 1),
    "unbind elsewhere": (lambda x: x.unbind(0)[1], 0),
    "cat elsewhere": (lambda x: torch.cat([x, x * 2], -1), 1),
    "cat with nothing": (lambda x: torch.cat([torch.empty(0), x], 1), 1),
    "stack": (lambda x: torch.stack([x, -x], 1), 2),
    "repeat elsewhere": (lambda x: x.repeat(3, 2, 1, 1), 2),
    "repeat_interleave elsewhere": (lambda x: x.repeat_interleave(2, 0), 1),
    "index_select elsewhere": (lambda x: x.index_select(2, torch.tensor([1, 0])), 1),
    "flip elsewhere": (lambda x: x.flip(-1), 1),
    "roll elsewhere": (lambda x: x.roll(1, -1), 1),
    "pad elsewhere": (lambda x: F.pad(x, (1, 2)), 1),
    "rotary, complex": (
        lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.ones(6, 4)).flatten(2),
        1,
    ),
    "rotary, written in place": (rotated, 1),
}


@pytest.mark.parametrize("name", CARRY)
def test_what_carries_a_dimension(name: str) -> None:
    function, dim = CARRY[name]
    assert begins(function, torch.randn(X), dim=dim) == [(6, {"x0.1"})]


def test_of_an_attention_queries_carry_the_tokens_and_values_the_channels() -> None:
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 3)
    attention = F.scaled_dot_product_attention
    assert begins(attention, q, k, v, dim=2) == [(6, {"x0.2"})]
    assert begins(attention, q, k, v, dim=3) == [(3, {"x2.3"})]
    assert begins(attention, q[0], k[0], v[0], dim=1) == [(6, {"x0.1"})]


# What makes dimension `dim` of the result anew, though it computes it from x.
MAKE: list[tuple[str, Callable[[Tensor], Tensor], int]] = [
    ("index.0", lambda x: x[torch.tensor([1, 0, 1])], 0),
    ("linear.2", lambda x: F.linear(x, torch.ones(3, 8)), 2),
    ("softmax.1", lambda x: x.softmax(1), 1),
    ("slice.1", lambda x: x[:, ::2], 1),
    ("flip.1", lambda x: x.flip(1), 1),
    ("repeat_interleave.1", lambda x: x.repeat_interleave(2, 1), 1),
    ("stack.1", lambda x: torch.stack([x, x], 1), 1),
    ("conv1d.2", lambda x: F.conv1d(x.transpose(1, 2), torch.ones(3, 8, 3), padding=1), 2),
    ("conv1d.2", lambda x: F.conv1d(x.transpose(1, 2), torch.ones(3, 8, 3)), 2),
    ("conv1d.2", lambda x: F.conv1d(x.transpose(1, 2), torch.ones(3, 8, 1), padding=1), 2),
    ("conv1d.2", lambda x: F.conv1d(x.transpose(1, 2), torch.ones(3, 8, 1), stride=2), 2),
    ("pad.1", lambda x: F.pad(x, (0, 0, -1, 2)), 1),
    ("reshape.1", lambda x: x.reshape(2, 3, 2, 8), 1),
    ("reshape.1", lambda x: x.reshape(3, 8, 4), 1),
    ("reshape.1", lambda x: x.flatten(0, 1)[:9].reshape(3, 3, 8), 1),
    ("reshape.0", lambda x: x.flatten(0, 1)[:10].reshape(2, 5, 8), 0),
    ("getitem.1", lambda x: x.sort(1).values, 1),
]


@pytest.mark.parametrize(("name", "function", "dim"), MAKE)
def test_what_begins_anew(name: str, function: Callable[[Tensor], Tensor], dim: int) -> None:
    ((_, found),) = begins(function, torch.randn(X), dim=dim)
    assert found == {name}


def test_a_flatten_merges_dimensions_and_a_reshape_takes_them_apart() -> None:
    def merged(x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def apart(x: Tensor) -> Tensor:
        tokens = F.linear(merged(x), torch.ones(4, 4))
        return tokens.reshape(2, 3, 5, 4)

    x = torch.randn(2, 4, 3, 5)
    assert begins(merged, x, dim=1) == [(15, {"reshape.2"})]
    assert begins(apart, x, dim=1) == [(3, {"x0.2"})]
    assert begins(apart, x, dim=2) == [(5, {"x0.3"})]


def test_frames_in_the_batch_and_back_again() -> None:
    def function(x: Tensor) -> Tensor:
        frames = x.reshape(2 * 3, 4 * 5, 8)  # [b f, h w, c]
        pixels = frames.reshape(2, 3, 20, 8).transpose(1, 2).reshape(2 * 20, 3, 8)  # [b h w, f, c]
        return pixels.reshape(2, 20, 3, 8).transpose(1, 2).reshape(2 * 3, 20, 8)

    x = torch.randn(2, 3, 4, 5, 8)
    assert begins(function, x, dim=1) == [(20, {"reshape.1"})]
    assert begins(lambda x: function(x).reshape(2, 3, 20, 8), x, dim=1) == [(3, {"x0.1"})]


def test_cat_slices_and_padding_are_runs() -> None:
    def joint(x: Tensor, y: Tensor) -> Tensor:
        return F.linear(torch.cat([x, y], 1), torch.ones(8, 8))

    x, y = torch.randn(2, 6, 8), torch.randn(2, 5, 8)
    both = [(6, {"x0.1"}), (5, {"x1.1"})]
    assert begins(joint, x, y, dim=1) == both
    assert begins(lambda x, y: joint(x, y)[:, 6:], x, y, dim=1) == [(5, {"x1.1"})]
    assert begins(lambda x, y: joint(x, y).split([6, 5], 1)[0], x, y, dim=1) == [(6, {"x0.1"})]
    assert begins(lambda x, y: joint(x, y)[:, 2:-1], x, y, dim=1) == [(4, {"x0.1"}), (4, {"x1.1"})]
    assert begins(lambda x, y: F.pad(joint(x, y), (0, 0, 1, 2)), x, y, dim=1) == [(1, set()), *both, (2, set())]
    assert begins(lambda x, y: joint(x, y).repeat(1, 2, 1), x, y, dim=1) == [*both, *both]
    assert begins(lambda x: torch.cat([x[:, :2], x[:, 2:]], 1), x, dim=1) == [(6, {"x0.1"})]


def test_writing_a_part_of_a_dimension() -> None:
    def rotate_image(x: Tensor, y: Tensor) -> Tensor:
        joint = F.linear(torch.cat([x, y], 1), torch.ones(8, 8))
        joint[:, 6:] = joint[:, 6:] * 2
        return joint

    def in_turn(x: Tensor, y: Tensor) -> Tensor:
        joint = x.new_zeros(2, 12, 8)
        joint[:, :6], joint[:, 6:-1] = x, y
        return joint

    def by_sample(x: Tensor, y: Tensor) -> Tensor:
        joint = x.new_zeros(2, 11, 8)
        for i in range(2):
            joint[i] = torch.cat([x[i], y[i]])
        return joint

    def of_others(x: Tensor, y: Tensor) -> Tensor:
        other = x.clone()
        other[0, :5] = y[0]
        return other

    x, y = torch.randn(2, 6, 8), torch.randn(2, 5, 8)
    both = [(6, {"x0.1"}), (5, {"x1.1"})]
    assert begins(rotate_image, x, y, dim=1) == both
    assert begins(in_turn, x, y, dim=1) == [*both, (1, set())]
    assert begins(by_sample, x, y, dim=1) == both
    assert begins(of_others, x, y, dim=1) == [(6, {"select_scatter.1"})]


def test_runs_of_operands_meet_at_all_their_bounds() -> None:
    def function(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.cat([F.layer_norm(x, [8]), y], 1) + z

    args = torch.randn(2, 6, 8), torch.randn(2, 5, 8), torch.randn(2, 11, 8)
    assert begins(function, *args, dim=1) == [(6, {"x0.1"}), (5, {"x1.1", "x2.1"})]


def test_what_comes_out_of_a_layer_goes_before_inputs() -> None:
    def frames(x: Tensor, table: Tensor) -> Tensor:
        return F.linear(x.flatten(1, 2), torch.ones(8, 8)).unflatten(1, (3, 5)) + table

    x, table = torch.randn(2, 6, 8), torch.randn(6, 8)
    assert begins(lambda x, t: F.layer_norm(x, [8]) * (1 + t) + t, x, table, dim=1) == [(6, {"x0.1"})]
    assert begins(lambda x, t: x * x.pow(2).mean(-1, keepdim=True).rsqrt() * t, x, x.clone(), dim=1) == [(6, {"x0.1"})]
    assert begins(lambda x, t: t * F.linear(x, torch.ones(8, 8)), x, table, dim=1) == [(6, {"x0.1"})]
    video = torch.randn(2, 3, 5, 8)
    assert begins(frames, video, video.clone(), dim=1) == [(3, {"x0.1"})]
    assert begins(lambda x, t: x + t, x, table, dim=1) == [(6, {"x0.1"})]  # the larger
    assert begins(lambda x, y: x + y, x, x.clone(), dim=1) == [(6, {"x0.1", "x1.1"})]


def test_a_patch_embedding_is_a_layer() -> None:
    def function(x: Tensor, table: Tensor) -> Tensor:
        return F.conv2d(x, torch.ones(8, 4, 2, 2), stride=2).flatten(2).transpose(1, 2) + table

    assert begins(function, torch.randn(1, 4, 4, 6), torch.randn(1, 6, 8), dim=1) == [(6, {"reshape.2"})]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, ids, w: w,
        lambda x, ids, w: w.unsqueeze(0).expand(2, 6, 8) * 2,
        lambda x, ids, w: (ids.unsqueeze(-1) * torch.ones(8)).cos(),
        lambda x, ids, w: F.linear(torch.cat([ids.outer(torch.ones(4)).sin()] * 2, 1), torch.ones(8, 8)),
        lambda x, ids, w: torch.polar(torch.ones(6, 8), ids.outer(torch.ones(8))),
        lambda x, ids, w: (ids > 0).unsqueeze(-1).float().expand(6, 8),
        lambda x, ids, w: F.embedding((ids > 0).long(), w[:2]).cos(),
        lambda x, ids, w: F.embedding(torch.arange(6), w) * 2,
        lambda x, ids, w: x.mean(1, keepdim=True).expand(2, 6, 8),
        lambda x, ids, w: x.mean(1, keepdim=True).repeat(1, 6, 1),
        lambda x, ids, w: x.mean(1, keepdim=True).repeat_interleave(6, 1),
        lambda x, ids, w: x.mean(1, keepdim=True) + w,
    ],
)
def test_tables_weights_and_copies_carry_nothing(function: Callable[..., Tensor]) -> None:
    out = begins(function, torch.randn(X), torch.arange(6.0), torch.randn(6, 8), dim=-2, weights=1)
    assert out == [(6, set())]


def test_an_embedding_of_ids_begins_tokens() -> None:
    def function(ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(ids, table) * 2

    assert begins(function, torch.arange(6), torch.randn(9, 8), dim=0, weights=1) == [(6, {"embedding.0"})]


def flops(function: Callable[..., Any], *args: Tensor) -> dict[str, float]:
    graph = capture(function, *args).gm.graph
    inputs = placeholders(graph)
    found = Origins(graph, frozenset(n.name for n in inputs[1:])).flops
    return {f"x{inputs.index(node)}.{dim}": n for (node, dim), n in found.items() if node in inputs}


def test_flops_of_linear_layers() -> None:
    x, w = torch.randn(1, 6, 8), torch.randn(3, 8)
    one = 2 * 6 * 8 * 3
    assert flops(F.linear, x, w) == {"x0.1": one}
    assert flops(lambda x, w: x @ w.t(), x, w) == {"x0.1": one}
    assert flops(lambda x, w: F.conv1d(x.transpose(1, 2), w.unsqueeze(-1)), x, w) == {"x0.1": one}
    assert flops(lambda x, w: F.linear(torch.cat([x, w[:2].unsqueeze(0)], 1), w), x, w) == {"x0.1": one}
    assert flops(lambda x, w: F.linear(x.reshape(1, 2, 3, 8).flatten(1, 2), w), x, w) == {}
    assert flops(lambda x, w: x @ x.transpose(1, 2), x, w) == {}  # no layer
    both = flops(lambda x, w: F.linear(x.flatten(0, 1), w), torch.randn(4, 6, 8), w)  # a dimension made of two
    assert both == {"x0.0": 4 * one, "x0.1": 4 * one}


def test_values_of_unknown_size_carry_nothing() -> None:
    def function(x: Tensor) -> Tensor:
        chosen = x[x[:, 0] > 0]
        return torch.zeros(6, 8).index_put((torch.arange(6),), chosen.sum(0) + x)

    def covariance(x: Tensor) -> Tensor:
        chosen = x[x[:, 0] > 0]
        return chosen.t() @ chosen

    assert begins(function, torch.randn(6, 8), dim=0) == [(6, {"index_put.0"})]
    assert begins(covariance, torch.randn(6, 8), dim=0) == [(8, {"matmul.0"})]
