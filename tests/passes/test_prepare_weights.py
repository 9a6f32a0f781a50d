"""split_weight_work: what depends on weights alone moves out, and only what costs something."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pvae.passes.ir import placeholders
from pvae.passes.prepare_weights import split_weight_work
from pvae.testing import rewrite

X, W, B = torch.randn(1, 4, 5, 8, 8), torch.randn(6, 4, 3, 3, 3), torch.randn(6)


def split(function: object, *args: Tensor, passes: str = "", weights: tuple[int, ...] = (1,)):  # type: ignore[no-untyped-def]
    gm, _ = rewrite(function, *args, passes=passes)  # type: ignore[arg-type]
    names = {n.name for i, n in enumerate(placeholders(gm.graph)) if i in weights}
    return gm, split_weight_work(gm, names)


def test_relaid_weights_are_prepared_once() -> None:
    gm, found = split(
        lambda x, w, b: F.conv3d(x, w, b, padding=1), X, W, B, passes="conv3d_unfold{form=unfold2d}", weights=(1, 2)
    )
    assert found is not None
    prepare, indexes = found
    assert indexes == [1], "the bias costs nothing to prepare"
    prepared = torch.fx.Interpreter(prepare).run(W)
    assert [tuple(p.shape) for p in prepared] == [(6, 12, 3, 3)]
    targets = {n.target for n in gm.graph.nodes}
    assert torch.ops.aten.contiguous.default not in targets and torch.ops.aten.permute.default not in targets
    got = torch.fx.Interpreter(gm).run(X, W, B, *prepared)[0]
    torch.testing.assert_close(got, F.conv3d(X, W, B, padding=1), rtol=1e-4, atol=1e-4)


def test_shared_and_chained_work_is_done_once() -> None:
    def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        wide = (w * 2).relu()
        return x @ wide, x @ wide.t()

    a = torch.randn(3, 3)
    gm, found = split(model, a, a)
    assert found is not None
    prepared = torch.fx.Interpreter(found[0]).run(a)
    assert len(prepared) == 2 or len(prepared) == 1
    for got, expected in zip(torch.fx.Interpreter(gm).run(a, a, *prepared), model(a, a), strict=True):
        torch.testing.assert_close(got, expected)


def test_views_alone_are_not_worth_it() -> None:
    _, found = split(lambda x, w: x @ w.t()[:2].reshape(2, 3).t(), torch.randn(3, 3), torch.randn(3, 3))
    assert found is None


def test_no_weights_no_split() -> None:
    gm, found = split(lambda x, w: x + w * 2, torch.randn(3), torch.randn(3), weights=())
    assert found is None and len(placeholders(gm.graph)) == 2


def test_a_result_that_is_returned_is_prepared_too() -> None:
    gm, found = split(lambda x, w: (x + 1, w * 2), torch.randn(3), B[:3])
    assert found is not None
    prepared = torch.fx.Interpreter(found[0]).run(B[:3])
    assert torch.equal(torch.fx.Interpreter(gm).run(torch.zeros(3), B[:3], *prepared)[1], B[:3] * 2)
