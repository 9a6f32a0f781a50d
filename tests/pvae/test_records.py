"""Objects that are their attributes and no more, as arguments: captured like dicts, written like dicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae.call_structure import is_record
from pvae.module import compiled_forwards


class Cache:
    """As diffusers' GlmImageLayerKVCache."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.mode: str | None = None

    def store(self, x: Tensor) -> None:
        if self.kept:
            self.kept[0] = torch.cat([self.kept[0], x])
        else:
            self.kept.append(x)


class Caches:
    def __init__(self, count: int) -> None:
        self.caches = [Cache() for _ in range(count)]


class Model(nn.Module):
    def forward(self, x: Tensor, caches: Caches | None = None) -> Tensor:
        for cache in caches.caches if caches is not None else ():
            if cache.mode == "write":
                cache.store(x.sin())
            elif cache.mode == "read":
                x = x + cache.kept[0].sum(0)
        return x


def _three_calls(model: nn.Module, caches: Caches, x: Tensor) -> list[Tensor]:
    results = []
    for mode in (None, "write", "write", "read"):
        for cache in caches.caches:
            cache.mode = mode
        results.append(model(x, caches=caches))
    return results


def test_a_cache_is_written_and_read() -> None:
    x = torch.randn(2, 3)
    wanted, theirs = Caches(2), Caches(2)
    expected = _three_calls(Model(), wanted, x)
    model = pvae.compile(Model(), engine="eager", strict="on")
    layers = list(theirs.caches)
    for _ in range(2):
        for cache in layers:
            cache.kept.clear()
        got = _three_calls(model, theirs, x)
        assert all(g.equal(e) for g, e in zip(got, expected, strict=True))
        assert theirs.caches[0] is layers[0] and theirs.caches[1] is layers[1], "the caller's own objects"
        for cache, want in zip(layers, wanted.caches, strict=True):
            assert cache.kept[0].equal(want.kept[0]) and cache.mode == "read"
    (forward,) = compiled_forwards(model)
    assert len(forward.programs) == 4  # unused, first write, second write, read


def test_what_is_no_record(tmp_path: Any) -> None:
    class Slots:
        __slots__ = ("__dict__", "x")

    for value in (Slots(), Model(), torch, len, Cache, tmp_path, {}, [], "x", 3, torch.Generator(), Exception()):
        assert not is_record(value), value
    assert is_record(Cache())


def test_an_object_that_cannot_be_compared_says_what_in_it() -> None:
    model = pvae.compile(Model(), engine="eager", strict="on")
    odd, ring = Caches(0), Caches(0)
    odd.generator = torch.Generator()  # type: ignore[attr-defined]
    ring.ring = ring  # type: ignore[attr-defined]
    with pytest.raises(pvae.PvaeError, match=r"an argument is a torch.*Generator, which a capture cannot compare"):
        model(torch.ones(2), caches=odd)
    with pytest.raises(pvae.PvaeError, match=r"an argument is a .*Caches, which a capture cannot compare"):
        model(torch.ones(2), caches=ring)
