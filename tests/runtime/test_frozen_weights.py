"""FrozenWeights: one preparation for each set of weights that is alive, made anew when a stamp changes."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

from pvae.runtime.frozen_weights import FrozenWeights, forget


class Counting:
    """x + sum of what was prepared; counts preparations."""

    def __init__(self) -> None:
        self.prepared = 0
        self.frozen = FrozenWeights(lambda args: (args[0] + args[2], args[1]), self.prepare, [1])

    def prepare(self, w: Tensor) -> tuple[Tensor]:
        self.prepared += 1
        return (w * 10,)

    def __call__(self, w: Tensor, x: float = 0.0) -> Any:
        return self.frozen([torch.tensor(x), w])[0].item()


def test_once_for_each_weight() -> None:
    call = Counting()
    a, b = torch.tensor(1.0), torch.tensor(2.0)
    assert [call(w) for w in (a, b, a, b)] == [10, 20, 10, 20] and call.prepared == 2


def test_version_and_storage_are_stamps() -> None:
    call, w = Counting(), torch.tensor(1.0)
    call(w)
    w.add_(1)
    assert call(w) == 20
    w.data = torch.tensor(5.0)
    assert call(w) == 50 and call.prepared == 3
    w.data.add_(1)
    assert call(w) == 50 and call.prepared == 3
    forget([w])
    assert call(w) == 60
    forget([torch.tensor(6.0)])
    call(w)
    assert call.prepared == 4


def test_entries_die_with_their_weights() -> None:
    """Another tensor may get the same id and the same memory."""
    call = Counting()
    for value in range(50):
        w = torch.tensor(float(value))
        assert call(w) == 10 * value
        del w
    gc.collect()
    assert not call.frozen._entries


def test_tensors_of_inference_mode_have_no_version() -> None:
    call = Counting()
    with torch.inference_mode():
        w = torch.tensor(1.0)
        assert [call(w), call(w)] == [10, 10] and call.prepared == 1


def test_forget_finds_every_holder() -> None:
    calls, w = [Counting(), Counting()], torch.tensor(1.0)
    for call in calls:
        call(w)
    forget([w])
    assert [len(call.frozen._entries) for call in calls] == [0, 0]
