"""A module's weights as a flat list, looked up anew at every call, and what tells that the module is no longer the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class ModuleState:
    """Where the tensors of a module live: parameters, buffers and plain tensor attributes of it and its submodules.

    `current()` reads them afresh, so a parameter that was replaced is seen; `changed()` says whether submodules came or
    went, which calls for a new capture.
    """

    def __init__(self, module: nn.Module) -> None:
        self._slots: list[tuple[dict[str, Any], str]] = []
        self.names: list[str] = []
        self._children: list[tuple[dict[str, Any], tuple[Any, ...]]] = []
        seen: dict[int, int] = {}
        self._aliases: list[tuple[dict[str, Any], str, int]] = []
        for path, sub in module.named_modules():
            if sub._modules:
                self._children.append((sub._modules, tuple(sub._modules.values())))
            for table in (sub._parameters, sub._buffers, sub.__dict__):
                for name, tensor in table.items():
                    if not isinstance(tensor, torch.Tensor):
                        continue
                    if id(tensor) in seen:
                        self._aliases.append((table, name, seen[id(tensor)]))
                        continue
                    seen[id(tensor)] = len(self._slots)
                    self._slots.append((table, name))
                    self.names.append(f"{path}.{name}" if path else name)

    def current(self) -> list[torch.Tensor]:
        """The tensors, in a fixed order. KeyError if one is gone."""
        return [table[name] for table, name in self._slots]

    def changed(self) -> bool:
        for table, children in self._children:
            if tuple(table.values()) != children:
                return True
        return any(table.get(name) is not self._slot(i) for table, name, i in self._aliases)

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


def python_state(module: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The plain attributes of a module and its submodules, for telling whether forward writes any."""
    hidden = ("_parameters", "_buffers", "_modules")
    return [(m, {k: v for k, v in m.__dict__.items() if k not in hidden}) for m in module.modules()]


def written_attribute(before: Sequence[tuple[nn.Module, dict[str, Any]]]) -> str | None:
    """The first attribute, as `Class.name`, that is no longer the object it was; None if all are."""
    for module, attributes in before:
        now = module.__dict__
        for name, old in attributes.items():
            if now.get(name) is not old:
                return f"{type(module).__name__}.{name}"
        for name in now:
            if name not in attributes and name not in ("_parameters", "_buffers", "_modules"):
                return f"{type(module).__name__}.{name}"
    return None
