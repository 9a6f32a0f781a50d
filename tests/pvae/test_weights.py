"""Weights: one compile serves every instance of a class, and however a weight changes, the next call computes with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae.runtime import frozen_weights

X = torch.randn(1, 4, 3, 6, 6)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).relu()


def assert_right(got: Callable[[Tensor], Tensor], block: nn.Module, x: Tensor = X) -> None:
    torch.testing.assert_close(got(x), Block.forward(block, x), rtol=1e-4, atol=1e-5)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often weights were prepared."""
    calls: list[int] = []
    original = frozen_weights.FrozenWeights.__init__

    def init(self: Any, compiled: Any, prepare: Any, indexes: Any) -> None:
        original(self, compiled, lambda *weights: (calls.append(1), prepare(*weights))[1], indexes)

    monkeypatch.setattr(frozen_weights.FrozenWeights, "__init__", init)
    return calls


# --- several instances of one class ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["live", "frozen"])
@pytest.mark.parametrize("engine", ["eager", "inductor"])
def test_instances_share_one_compile(engine: str, weights: str) -> None:
    blocks = [Block() for _ in range(3)]
    for block in blocks:
        pvae.compile(block, engine=engine, weights=weights, conv3d="unfold2d")
    for _ in range(2):
        for block in blocks:
            assert_right(block, block)
    assert len({id(b.forward.programs[0].compiled) for b in blocks}) == 1
    assert [g.shared_with for g in pvae.report(None).graphs] == [None, 0, 0]
    assert [len(pvae.report(b).graphs) for b in blocks] == [1, 1, 1]


def test_other_inductor_settings_are_not_shared() -> None:
    first, second = Block(), Block()
    pvae.compile(first, conv3d="unfold2d")
    assert_right(first, first)
    pvae.compile(second, conv3d="unfold2d")
    with torch._inductor.config.patch(max_fusion_size=1):
        assert_right(second, second)
    assert [g.shared_with for g in pvae.report(None).graphs] == [None, None]


def test_other_options_and_other_graphs_are_not_shared() -> None:
    first, second, third = Block(), Block(), Block()
    third.conv = nn.Conv3d(4, 4, 3, padding=1, padding_mode="replicate")
    pvae.compile(first, engine="eager", conv3d="unfold2d")
    pvae.compile(second, engine="eager", conv3d="native")
    pvae.compile(third, engine="eager", conv3d="unfold2d")
    for block in (first, second, third):
        assert_right(block, block)
    assert [g.shared_with for g in pvae.report(None).graphs] == [None, None, None]


def test_blocks_of_a_transformer_share() -> None:
    class Transformer(nn.Module):
        _repeated_blocks = ("Block",)

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model = Transformer()
    eager = copy.deepcopy(model)
    pvae.compile(model, engine="eager", conv3d="unfold2d")
    torch.testing.assert_close(model(X), eager(X), rtol=1e-4, atol=1e-5)
    report = pvae.report(model)
    assert [g.shared_with for g in report.graphs] == [None, 0, 0] and report.matches("conv3d_unfold") == 3


@pytest.mark.parametrize("weights", ["live", "frozen"])
@pytest.mark.parametrize("engine", ["eager", "inductor"])
def test_torch_compile_compiles_a_class_once(engine: str, weights: str) -> None:
    """With in-lined modules Dynamo reuses the code for every instance; the weights must be inputs for that to be right."""
    options = {"engine": engine, "weights": weights, "conv3d": "unfold2d"}
    blocks = [Block() for _ in range(3)]
    compiled = [torch.compile(b, backend="pvae", options=options, dynamic=False) for b in blocks]
    for _ in range(2):
        for block, function in zip(blocks, compiled, strict=True):
            assert_right(function, block)
    assert len(pvae.report(None).graphs) == 1
    assert len(pvae.report(blocks[2]).graphs) == 1


# --- changes of a weight ---------------------------------------------------------------------------------------------


def in_place(block: Block, delta: Tensor) -> None:
    block.conv.weight += delta


def through_data(block: Block, delta: Tensor) -> None:
    block.conv.weight.data += delta


def copy_through_data(block: Block, delta: Tensor) -> None:
    block.conv.weight.data.copy_(block.conv.weight + delta)


def other_data(block: Block, delta: Tensor) -> None:
    block.conv.weight.data = block.conv.weight + delta


def other_parameter(block: Block, delta: Tensor) -> None:
    block.conv.weight = nn.Parameter(block.conv.weight + delta)


def state_dict(block: Block, delta: Tensor) -> None:
    block.load_state_dict({**block.state_dict(), "conv.weight": block.conv.weight + delta})


def assigned_state_dict(block: Block, delta: Tensor) -> None:
    block.load_state_dict({**block.state_dict(), "conv.weight": block.conv.weight + delta}, assign=True)


SEEN_BY_STAMP = [in_place, other_data, other_parameter, state_dict, assigned_state_dict]
SEEN_AFTER_REFRESH = [through_data, copy_through_data]


@pytest.mark.parametrize("entry", ["pvae.compile", "torch.compile"])
@pytest.mark.parametrize(
    ("weights", "change"),
    [("live", c) for c in SEEN_BY_STAMP + SEEN_AFTER_REFRESH] + [("frozen", c) for c in SEEN_BY_STAMP],
)
def test_changes_are_seen(weights: str, change: Callable[[Block, Tensor], None], entry: str) -> None:
    """LoRA's way: merged, unmerged, merged again."""
    block = Block()
    options = {"engine": "eager", "weights": weights, "conv3d": "unfold2d"}
    if entry == "pvae.compile":
        got = pvae.compile(block, **options)
    else:
        got = torch.compile(block, backend="pvae", options=options, dynamic=False)
    delta = torch.randn_like(block.conv.weight)
    original = got(X)
    for sign in (1, -1, 1):
        change(block, delta * sign)
        assert_right(got, block)
        assert sign == -1 or (got(X) - original).abs().max() > 0.1


@pytest.mark.parametrize("entry", ["pvae.compile", "torch.compile"])
@pytest.mark.parametrize("change", SEEN_AFTER_REFRESH)
def test_what_frozen_weights_cannot_see_refresh_tells(change: Callable[[Block, Tensor], None], entry: str) -> None:
    block = Block()
    options = {"engine": "eager", "weights": "frozen", "conv3d": "unfold2d"}
    got: Any = block
    if entry == "pvae.compile":
        pvae.compile(block, **options)
    else:
        got = torch.compile(block, backend="pvae", options=options)
    before = got(X)
    change(block, torch.randn_like(block.conv.weight))
    assert torch.equal(got(X), before), "seen after all: then the docs of weights=frozen are out of date"
    pvae.refresh(block)
    assert_right(got, block)


def test_prepared_once_and_again_only_when_changed(prepared: list[int]) -> None:
    blocks = [pvae.compile(Block(), engine="eager", weights="frozen", conv3d="unfold2d") for _ in range(2)]
    for _ in range(3):
        for block in blocks:
            assert_right(block, block)
    assert len(prepared) == 2
    blocks[0].conv.weight *= 2
    for _ in range(3):
        for block in blocks:
            assert_right(block, block)
    assert len(prepared) == 3


def test_live_weights_prepare_nothing(prepared: list[int]) -> None:
    block = pvae.compile(Block(), engine="eager", conv3d="unfold2d")
    assert_right(block, block)
    assert not prepared


@pytest.mark.parametrize("engine", ["eager", "inductor"])
def test_frozen_with_inductor_changes_and_kinds(engine: str, prepared: list[int]) -> None:
    block = pvae.compile(Block(), engine=engine, weights="frozen", conv3d="unfold2d")
    for x in (X, X[:, :, :2], X):
        assert_right(block, block, x)
        block.conv.weight += 1
        assert_right(block, block, x)
    assert len(block.forward.programs) == 2
