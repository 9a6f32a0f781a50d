"""What a captured graph depends on besides its arguments: a module's weights, its plain attributes, its submodules."""

from __future__ import annotations

import enum
import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from types import CellType
from typing import Any

import torch
from torch import nn

PLAIN = (bool, int, float, str, type(None), torch.dtype)
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__) - {"training"}
Attribute = tuple[dict[str, Any], str]  # a module's own dict, or its buffers, and a name in it


class Absent(enum.Enum):
    """The value of an attribute that is not there."""

    ABSENT = "absent"


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


@contextmanager
def clean_caches(module: nn.Module) -> Iterator[None]:
    """Empty every `functools.lru_cache` that was filled inside: what tracing puts there are tensors without values.

    Caches are looked for where diffusers keeps them: on the classes of the submodules and in their Python modules, as they
    are or in the closure of a function around them (diffusers' `lru_cache_unless_export`).
    """
    found: dict[int, tuple[Any, int]] = {}
    for cls in {c for m in module.modules() for c in type(m).__mro__}:
        for table in (vars(cls), vars(sys.modules[cls.__module__])):
            for value in table.values():
                cells = [cell for cell in getattr(value, "__closure__", None) or () if cell != CellType()]
                for cache in (value, *(cell.cell_contents for cell in cells)):
                    if isinstance(cache, functools._lru_cache_wrapper):
                        found[id(cache)] = cache, cache.cache_info().misses
    try:
        yield
    finally:
        for cache, misses in found.values():
            if cache.cache_info().misses != misses:
                cache.cache_clear()


class ModuleState:
    """Where the tensors of a module live: parameters, buffers and plain tensor attributes of it and its submodules.

    `current()` reads them afresh, so a parameter that was replaced is seen; `changed()` says whether submodules came or
    went, which calls for a new capture; `attributes()` numbers what the plain attributes are now, so that a flag set
    between two calls selects another capture. `written` are attributes that forward itself writes, which the caller
    treats as arguments and results; they are neither.
    """

    def __init__(self, module: nn.Module, written: Sequence[Attribute] = ()) -> None:
        self._slots: list[tuple[dict[str, Any], str]] = []
        self.names: list[str] = []
        self._children: list[tuple[dict[str, Any], tuple[Any, ...]]] = []
        self._getters: list[tuple[dict[str, Any], Any]] = []
        self._aliases: list[tuple[dict[str, Any], str, int]] = []
        seen: dict[int, int] = {}
        skip = {(id(table), name) for table, name in written}
        self._empty: list[Any] = []
        for path, sub in module.named_modules():
            if path:
                self._empty += [sub._forward_hooks, sub._forward_pre_hooks]
            if sub._modules:
                self._children.append((sub._modules, tuple(sub._modules.values())))
            else:
                self._empty.append(sub._modules)
            plain = [
                name
                for name, value in sub.__dict__.items()
                if name not in _OF_EVERY_MODULE and (id(sub.__dict__), name) not in skip and _is_plain(value)
            ]
            if plain:
                self._getters.append((sub.__dict__, itemgetter(*plain)))
            for table in (sub._parameters, sub._buffers, sub.__dict__):
                for name, tensor in table.items():
                    if not isinstance(tensor, torch.Tensor) or (id(table), name) in skip:
                        continue
                    if id(tensor) in seen:
                        self._aliases.append((table, name, seen[id(tensor)]))
                        continue
                    seen[id(tensor)] = len(self._slots)
                    self._slots.append((table, name))
                    self.names.append(f"{path}.{name}" if path else name)
        self._last = self._read_attributes()
        self._number = 0
        self._numbers: dict[Any, int] = {self._key(self._last): 0}

    def current(self) -> list[torch.Tensor]:
        """The tensors, in a fixed order. KeyError if one is gone."""
        return [table[name] for table, name in self._slots]

    def changed(self) -> bool:
        """Whether submodules were added (a parametrization too), removed, replaced or got a hook, or tied weights untied."""
        if any(self._empty):
            return True
        for table, children in self._children:
            if tuple(table.values()) != children:
                return True
        return any(table.get(name) is not self._slot(i) for table, name, i in self._aliases)

    def attributes(self) -> int | None:
        """A number for the values that the plain attributes have now; None if one is no longer plain or is gone."""
        try:
            now = self._read_attributes()
        except KeyError:
            return None
        if now != self._last:
            if not all(_is_plain(value) for value in now):
                return None
            self._last = now
            self._number = self._numbers.setdefault(self._key(now), len(self._numbers))
        return self._number

    def _read_attributes(self) -> list[Any]:
        return [getter(table) for table, getter in self._getters]

    @staticmethod
    def _key(values: list[Any]) -> str:
        return repr(values)  # tells True from 1 and 1 from 1.0, as equality does not

    def _slot(self, index: int) -> Any:
        table, name = self._slots[index]
        return table.get(name)

    @contextmanager
    def replaced(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within the block the module computes with `tensors`, one for each of `current()`.

        What the block itself puts in a tensor's place stays there, for `AttributeWatch` to find.
        """
        own = self.current()
        everywhere = [(t, n, i) for i, (t, n) in enumerate(self._slots)] + self._aliases
        try:
            for table, name, index in everywhere:
                table[name] = tensors[index]
            yield
        finally:
            for table, name, index in everywhere:
                if table.get(name) is tensors[index]:
                    table[name] = own[index]


def layout_key(weights: Sequence[torch.Tensor]) -> list[Any]:
    """What of the weights a compiled graph depends on besides their values."""
    return [(w.dtype, w.shape, w.stride()) for w in weights]


def _snapshot(value: Any) -> tuple[Any, Any]:
    """`value` itself and, for a list or dict, what it holds."""
    if type(value) is list:
        return value, [_snapshot(v) for v in value]
    if type(value) is dict:
        return value, {k: _snapshot(v) for k, v in value.items()}
    return value, None


def _intact(value: Any, snapshot: tuple[Any, Any]) -> bool:
    same, held = snapshot
    if value is not same or held is None:
        return value is same
    if isinstance(held, dict):
        return value.keys() == held.keys() and all(_intact(value[k], held[k]) for k in held)
    return len(value) == len(held) and all(map(_intact, value, held))


def _put_back(snapshot: tuple[Any, Any]) -> Any:
    value, held = snapshot
    if isinstance(held, list):
        value[:] = map(_put_back, held)
    elif isinstance(held, dict):
        value.clear()
        value.update({k: _put_back(v) for k, v in held.items()})
    return value


class AttributeWatch:
    """Which attributes and buffers a forward writes: a snapshot of every submodule's own, compared and restored.

    Lists and dicts, and those inside them, are compared by what they hold.
    """

    def __init__(self, module: nn.Module) -> None:
        self._before = [
            (table, {name: _snapshot(value) for name, value in self._own(table).items()})
            for m in module.modules()
            for table in (m.__dict__, m._buffers)
        ]

    @staticmethod
    def _own(table: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in table.items() if k not in _OF_EVERY_MODULE and k != "forward"}

    def written(self) -> list[Attribute]:
        """The attributes that are no longer what they were, are new, or are gone."""
        found: list[Attribute] = []
        for table, before in self._before:
            now = self._own(table)
            found += [(table, n) for n in now.keys() - before.keys()]
            found += [(table, n) for n, s in before.items() if not _intact(now.get(n, Absent.ABSENT), s)]
        return found

    def restore(self) -> None:
        for table, before in self._before:
            for name in self._own(table).keys() - before.keys():
                del table[name]
            table.update({name: _put_back(s) for name, s in before.items()})
