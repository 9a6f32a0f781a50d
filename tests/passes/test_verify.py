"""The verifier: each way in which a pass can leave a graph wrong is caught, with the pass and the node named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pvae
from pvae.passes.ir import Builder, aten, output_node
from pvae.passes.pipeline import Pipeline, Step, run_pipeline
from pvae.passes.rule import Context, Match, Pass
from pvae.passes.verify import VerifyError, describe
from pvae.testing import capture

X = torch.randn(2, 4)


class Planted:
    """Does `damage(graph, node)` at the relu."""

    name = "planted"

    def __init__(self, damage: Callable[[Any, Any], None]) -> None:
        self.damage = damage

    def match(self, node: Any) -> Match | None:
        return Match(node) if node.target is aten.relu.default else None

    def rewrite(self, graph: Any, match: Match) -> None:
        self.damage(graph, match.node)


def compiled(damage: Callable[[Any, Any], None], check: bool = True) -> torch.fx.GraphModule:
    gm = capture(lambda x: (x.relu() + 1, x * 2), X).gm
    planted = Pass("wrong", "does damage", lambda context, settings: [Planted(damage)])
    run_pipeline(gm, Pipeline((Step(planted),)), Context(pvae.Options()), check=check)
    return gm


def other_dtype(graph: Any, node: Any) -> None:
    build = Builder(node)
    build.replace(build(aten.to.dtype, node.args[0], torch.bfloat16))


def other_dtype_refreshed(graph: Any, node: Any) -> None:
    other_dtype(graph, node)
    for n in graph.nodes:
        if n.target is aten.add.Tensor:
            n.meta["val"] = n.meta["val"].to(torch.bfloat16)


def other_shape(graph: Any, node: Any) -> None:
    (user,) = node.users
    build = Builder(user.next)
    new = build(aten.reshape.default, user, [4, 2])
    user.replace_all_uses_with(new, delete_user_cb=lambda n: n is not new)


def stale_meta(graph: Any, node: Any) -> None:
    node.meta["val"] = node.meta["val"].to(torch.float64)


def in_place(graph: Any, node: Any) -> None:
    build = Builder(node)
    build.replace(build(aten.relu_.default, node.args[0]))


def dropped_output(graph: Any, node: Any) -> None:
    out = output_node(graph)
    out.args = (out.args[0][:1],)


def swapped_outputs(graph: Any, node: Any) -> None:
    out = output_node(graph)
    build = Builder(out)
    out.args = ((out.args[0][0], build(aten.sum.default, out.args[0][1])),)


def impossible(graph: Any, node: Any) -> None:
    (user,) = node.users
    build = Builder(user)
    wide = build(aten.reshape.default, node, [8])
    user.args = (wide, build(aten.slice.Tensor, wide, 0, 0, 3))


def used_before_made(graph: Any, node: Any) -> None:
    (user,) = node.users
    node.append(user)
    user.append(node)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (other_dtype, r"after pass 'wrong': .*aten\.add\.Tensor.*: recorded f32\[2, 4\], computes bf16\[2, 4\]"),
        (other_dtype_refreshed, r"after pass 'wrong': output 0 was f32\[2, 4\], is bf16\[2, 4\]"),
        (other_shape, r"after pass 'wrong': output 0 was f32\[2, 4\], is f32\[4, 2\]"),
        (stale_meta, r"recorded f64\[2, 4\], computes f32\[2, 4\]"),
        (in_place, "after pass 'wrong': .*relu_.* writes in place"),
        (dropped_output, "after pass 'wrong': 1 outputs, 2 before"),
        (swapped_outputs, r"output 1 was f32\[2, 4\], is f32\[\]"),
        (impossible, "after pass 'wrong': .*add.* cannot be computed: "),
    ],
)
def test_planted(damage: Callable[[Any, Any], None], says: str) -> None:
    with pytest.raises(VerifyError, match=says):
        compiled(damage)


def test_lint() -> None:
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        compiled(used_before_made)


def test_off() -> None:
    assert compiled(stale_meta, check=False)(X)[0].shape == X.shape


def test_a_right_pass_passes_and_strides_are_refreshed() -> None:
    def transposed(graph: Any, node: Any) -> None:
        build = Builder(node)
        x = build(aten.contiguous.default, build(aten.t.default, node.args[0]))
        build.replace(build(aten.relu.default, build(aten.t.default, x)))

    gm = compiled(transposed)
    (add,) = [n for n in gm.graph.nodes if n.target is aten.add.Tensor]
    assert add.meta["val"].stride() == (1, 2)
    got, twice = gm(X)
    assert torch.equal(got, X.relu() + 1) and torch.equal(twice, X * 2)
    assert got.stride() == (4, 1), "the caller gets eager's layout back"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.empty(1, 2, dtype=torch.bfloat16), "bf16[1, 2]"),
        (torch.empty(3, dtype=torch.uint8), "u8[3]"),
        (torch.empty((), dtype=torch.complex64), "c64[]"),
        (torch.empty(0, dtype=torch.bool), "bool[0]"),
        (3, "3"),
    ],
)
def test_describe(value: Tensor | int, text: str) -> None:
    assert describe(value) == text
