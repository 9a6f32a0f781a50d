"""Weights that are prepared once: kept by the identity, storage and version of what they were made from.

A write through `.data` moves none of the three; `forget` is for that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_ALL: weakref.WeakSet[FrozenWeights] = weakref.WeakSet()


def _stamp(weights: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    # Tensors made in inference mode have no version: a write to one is not seen, as one through `.data` is not.
    return [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]


@dataclass
class _Entry:
    refs: list[weakref.ref[torch.Tensor]]
    stamp: list[tuple[int, int]]
    prepared: tuple[torch.Tensor, ...]


class FrozenWeights:
    """Calls `compiled([*args, *prepared])` with `prepared = prepare(*weights)`, made once for each set of weights.

    `args` is a list that the call empties; `indexes` are the positions in it of the weights that `prepare` takes. One
    compiled graph may serve many layers, so entries are kept for every set of weights that is alive; an entry is made anew
    when a stamp changes, and dropped when one of its weights dies.
    """

    def __init__(self, compiled: Callable[..., Any], prepare: Callable[..., Any], indexes: Sequence[int]) -> None:
        self.compiled = compiled
        self.prepare = prepare
        self.indexes = tuple(indexes)
        self._entries: dict[tuple[int, ...], _Entry] = {}
        _ALL.add(self)

    def __call__(self, args: list[Any]) -> Any:
        weights = [args[i] for i in self.indexes]
        key = tuple(map(id, weights))
        entry = self._entries.get(key)
        if entry is None or entry.stamp != _stamp(weights) or any(r() is None for r in entry.refs):
            with torch.no_grad():
                prepared = tuple(self.prepare(*weights))
            entry = _Entry([weakref.ref(w, self._dropper(key)) for w in weights], _stamp(weights), prepared)
            self._entries[key] = entry
        args += entry.prepared
        return self.compiled(args)

    def _dropper(self, key: tuple[int, ...]) -> Callable[[Any], None]:
        entries = self._entries

        def drop(_: Any) -> None:
            entries.pop(key, None)

        return drop

    def forget(self, ids: set[int]) -> None:
        for key in [k for k in self._entries if ids.intersection(k)]:
            del self._entries[key]


def forget(weights: Sequence[torch.Tensor]) -> None:
    """Drop everything prepared from any of `weights`; it is made anew at the next call."""
    ids = set(map(id, weights))
    for frozen in list(_ALL):
        frozen.forget(ids)
