"""What a captured graph depends on besides its arguments: a module's weights, its plain attributes, its submodules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch import nn

PLAIN = (bool, int, float, str, type(None), torch.dtype)
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__) - {"training"}
Attribute = tuple[nn.Module, str]


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


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
        skip = {(id(m), name) for m, name in written}
        for path, sub in module.named_modules():
            if sub._modules:
                self._children.append((sub._modules, tuple(sub._modules.values())))
            plain = [
                name
                for name, value in sub.__dict__.items()
                if name not in _OF_EVERY_MODULE and (id(sub), name) not in skip and _is_plain(value)
            ]
            if plain:
                self._getters.append((sub.__dict__, itemgetter(*plain)))
            for table in (sub._parameters, sub._buffers, sub.__dict__):
                for name, tensor in table.items():
                    if not isinstance(tensor, torch.Tensor) or (table is sub.__dict__ and (id(sub), name) in skip):
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
        """Whether submodules were added, removed or replaced, or tied weights untied."""
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
        """Within the block the module computes with `tensors`, one for each of `current()`."""
        own = self.current()
        everywhere = [(t, n, i) for i, (t, n) in enumerate(self._slots)] + self._aliases
        try:
            for table, name, index in everywhere:
                table[name] = tensors[index]
            yield
        finally:
            for table, name, index in everywhere:
                table[name] = own[index]


def layout_key(weights: Sequence[torch.Tensor]) -> list[Any]:
    """What of the weights a compiled graph depends on besides their values."""
    return [(w.dtype, w.stride()) for w in weights]


class AttributeWatch:
    """Which attributes a forward writes: a snapshot of every submodule's own attributes, compared and restored."""

    def __init__(self, module: nn.Module) -> None:
        self._before = [(m, self._own(m)) for m in module.modules()]

    @staticmethod
    def _own(module: nn.Module) -> dict[str, Any]:
        return {k: v for k, v in module.__dict__.items() if k not in _OF_EVERY_MODULE and k != "forward"}

    def written(self) -> list[Attribute]:
        """The attributes that are no longer the object they were, are new, or are gone."""
        found: list[Attribute] = []
        for module, before in self._before:
            now = self._own(module)
            names = [n for n in {**before, **now} if now.get(n, self) is not before.get(n, self)]
            found += [(module, n) for n in names]
        return found

    def restore(self) -> None:
        for module, before in self._before:
            for name in self._own(module).keys() - before.keys():
                del module.__dict__[name]
            module.__dict__.update(before)
