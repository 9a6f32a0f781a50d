"""Random convolutional models for the sharding pass. The last two dimensions of `[N, C, H, W]` or `[N, C, T, H, W]` are split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.passes import shard_mixers  # registers its kinds
from tests.passes.shard_blocks import KINDS, SMALL, CausalConv, Shape, blocks_for

__all__ = ["KINDS", "Inputs", "ShardModel", "shard_mixers", "shard_models"]


class ShardModel(nn.Module):
    """Blocks in a row. After block i, value `joins[i][1]` (0 is the input) is joined to its result: a residual, a skip.

    `forward(x, caches)` overwrites the list `caches`, which has `model.caches` entries, None before the first call.
    """

    def __init__(self, blocks: Sequence[nn.Module], joins: Sequence[tuple[str, int] | None]) -> None:
        super().__init__()
        self.blocks, self.joins = nn.ModuleList(blocks), tuple(joins)
        self.caches = sum(isinstance(block, CausalConv) for block in blocks)

    def forward(self, x: Tensor, caches: list[Tensor | None]) -> Tensor:
        values, at = [x], 0
        for block, join in zip(self.blocks, self.joins, strict=True):
            if isinstance(block, CausalConv):
                x, caches[at] = block(x, caches[at])
                at += 1
            else:
                x = block(x)
            if join is not None:
                how, other = join
                if how == "cat":
                    x = torch.cat([x, values[other]], 1)
                else:
                    x = x + values[other] if how == "add" else x * values[other].sigmoid()
            values.append(x)
        return x

    def extra_repr(self) -> str:
        return f"joins={self.joins}"


class Inputs(list[Tensor]):
    """Tensors of one shape, which a failing example prints instead of their values."""

    def __repr__(self) -> str:
        return f"{len(self)} inputs {tuple(self[0].shape)}"


def shape_after(block: nn.Module, shape: Shape) -> Shape:
    x = torch.zeros(shape, dtype=torch.float64)
    with torch.no_grad():
        return tuple((block(x, None)[0] if isinstance(block, CausalConv) else block(x)).shape)


@st.composite
def shapes(draw: Any) -> Shape:
    side = st.integers(2, 17) | st.sampled_from([4, 8, 12, 16]) | st.integers(1, 5)
    frames = [draw(SMALL)] if draw(st.booleans()) else []
    return draw(st.integers(1, 2)), draw(st.sampled_from([2, 4, 1, 3, 6])), *frames, draw(side), draw(side)


@st.composite
def shard_models(draw: Any, kinds: Sequence[str] = tuple(KINDS), max_blocks: int = 4) -> tuple[ShardModel, Inputs]:
    """A model of `kinds` in float64 and eval mode, and its inputs for successive calls (one, or three where it has caches).

    No result is larger than some ten thousand numbers.
    """
    torch.manual_seed(0)
    shape = draw(shapes().filter(lambda s: any(KINDS[k].fits(s) for k in kinds)))
    first, seen = shape, [shape]
    blocks: list[nn.Module] = []
    joins: list[tuple[str, int] | None] = []
    for _ in range(draw(st.integers(1, max_blocks))):
        if not any(KINDS[k].fits(shape) for k in kinds):
            break
        block = draw(blocks_for(shape, kinds))
        shape = shape_after(block, shape)
        same = [i for i, other in enumerate(seen) if other == shape]
        join = None
        if same and draw(st.booleans()):
            how = draw(st.sampled_from(["add", "gate", *(["cat"] if shape[1] <= 4 else [])]))
            join = how, draw(st.sampled_from(same))
            shape = (shape[0], 2 * shape[1], *shape[2:]) if how == "cat" else shape
        blocks.append(block)
        joins.append(join)
        seen.append(shape)
    model = ShardModel(blocks, joins).to(torch.float64).eval()
    return model, Inputs(torch.randn(first, dtype=torch.float64) for _ in range(3 if model.caches else 1))
