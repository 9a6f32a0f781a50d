"""Weights change under compiled code: in place, through `.data`, by LoRA-style merges, by replacement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae.runtime.frozen_weights import FrozenWeights

UNFOLD = {"engine": "eager", "conv3d": "unfold2d"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).relu()


def expected(block: Block, x: Tensor) -> Tensor:
    return x + nn.functional.conv3d(x, block.conv.weight, block.conv.bias, padding=1).relu()


def in_place(block: Block) -> None:
    block.conv.weight.add_(0.1)


def through_data(block: Block) -> None:
    block.conv.weight.data += 0.1


def merge_and_unmerge_twice(block: Block) -> None:
    low_rank = torch.ones_like(block.conv.weight)
    block.conv.weight.data += low_rank
    block.conv.weight.data -= 0.5 * low_rank


def new_data(block: Block) -> None:
    block.conv.weight.data = block.conv.weight.data + 0.1


def replacement(block: Block) -> None:
    block.conv.weight = nn.Parameter(torch.randn_like(block.conv.weight))


CHANGES = [in_place, through_data, merge_and_unmerge_twice, new_data, replacement]
ENTRANCES: list[Any] = [
    pytest.param(lambda block, **o: pvae.compile(block, **UNFOLD, **o), id="pvae.compile"),
    pytest.param(lambda block, **o: torch.compile(block, backend="pvae", options={**UNFOLD, **o}), id="torch.compile"),
]


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("change", CHANGES)
def test_live_weights_follow_every_change(change: Callable[[Block], None], entrance: Callable[..., Any]) -> None:
    block, x = Block(), torch.randn(1, 2, 3, 4, 4)
    with torch.no_grad():
        run = entrance(block)
        torch.testing.assert_close(run(x), expected(block, x))
        before = block.conv.weight.clone()
        change(block)
        assert not torch.equal(before, block.conv.weight)
        torch.testing.assert_close(run(x), expected(block, x))


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("change", CHANGES)
def test_frozen_weights_follow_changes_or_a_refresh(change: Callable[[Block], None], entrance: Callable[..., Any]) -> None:
    block, x = Block(), torch.randn(1, 2, 3, 4, 4)
    with torch.no_grad():
        run = entrance(block, weights="frozen")
        torch.testing.assert_close(run(x), expected(block, x))
        change(block)
        if change in (through_data, merge_and_unmerge_twice):  # leaves no trace: FACTS, "Weights"
            pvae.refresh(block)
        torch.testing.assert_close(run(x), expected(block, x))


def test_frozen_weights_are_prepared_once_for_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int] = []
    init = FrozenWeights.__init__

    def counted(self: FrozenWeights, compiled: Any, prepare: Any, indexes: Any) -> None:
        def counting(*weights: Tensor) -> Any:
            prepared.append(len(weights))
            return prepare(*weights)

        init(self, compiled, counting, indexes)

    monkeypatch.setattr(FrozenWeights, "__init__", counted)
    blocks, x = [Block() for _ in range(3)], torch.randn(1, 2, 3, 4, 4)
    with torch.no_grad():
        for block in blocks:
            pvae.compile(block, **UNFOLD, weights="frozen")
        for _ in range(3):
            for block in blocks:
                torch.testing.assert_close(block(x), expected(block, x))
        assert len(prepared) == 3
        blocks[1].conv.weight.mul_(2)
        torch.testing.assert_close(blocks[1](x), expected(blocks[1], x))
        assert len(prepared) == 4


def test_three_instances_share_one_compile_and_are_right() -> None:
    blocks, x = [Block() for _ in range(3)], torch.randn(1, 2, 3, 4, 4)
    with torch.no_grad():
        for block in blocks:
            torch.testing.assert_close(pvae.compile(block, **UNFOLD)(x), expected(block, x))
        shared = [pvae.report(block).graphs[0].shared_with for block in blocks]
        assert shared == [None, 0, 0]
        compiled = {id(block.forward.programs[0].compiled) for block in blocks}
        assert len(compiled) == 1


def test_tied_weights_stay_tied() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model, x = nn.Sequential(first, second), torch.randn(2, 3)
    with torch.no_grad():
        pvae.compile(model, engine="eager")
        torch.testing.assert_close(model(x), second(first(x)))
        first.weight.add_(1)
        torch.testing.assert_close(model(x), second(first(x)))
        second.weight = nn.Parameter(torch.zeros(3, 3))  # untied
        torch.testing.assert_close(model(x), second(first(x)))
