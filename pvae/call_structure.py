"""The arguments and results of a call, as flat tensors plus structure: the key of a capture, and the replay of its effects.

A model may write into lists that it is given (Wan's decoder keeps a cache per convolution so). The lists, dicts and plain
objects (GLM-Image's KV caches) among the arguments are therefore compared before and after the traced call, and what changed
is replayed into the caller's own objects at every later call.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pvae.runtime.sharded_tensor import ShardedTensor

CONSTANTS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.memory_format,
    enum.Enum,
)
Box = Any  # a list, a dict, or an object that `is_record`


def is_record(value: Any) -> bool:
    """Whether `value` is an object that is its attributes and no more, such as the KV caches of GLM-Image: its class has no
    bases, no slots and no state in C."""
    kind = type(value)
    plain = kind.__mro__ == (kind, object) and kind.__new__ is object.__new__ and "__slots__" not in vars(kind)
    return plain and hasattr(value, "__dict__") and not callable(value)


def content_of(box: Box) -> Any:
    """What a box holds: a list or dict itself, of an object its attributes."""
    return box if isinstance(box, (list, dict)) else vars(box)


is_dense = torch.ops.aten.is_non_overlapping_and_dense.default


def describe(value: Any, tensors: list[torch.Tensor], boxes: list[Box], *, strides: bool = True) -> Hashable:
    """A key for `value`; its tensors and its mutable containers are appended to the two lists, in order.

    A tensor with gaps in memory (a slice of a longer video) is appended as a dense copy, so that its strides, which tell
    of the whole that it was cut from, are no reason for another capture. Without `strides` tensors are told apart by shape,
    dtype and device alone, and appended as they are.
    Raises TypeError, naming the type, for what can be neither traced nor compared.
    """
    if isinstance(value, torch.Tensor) and not strides:
        tensors.append(value)
        return value.shape, value.dtype, value.device
    if isinstance(value, ShardedTensor):
        tensors.append(value)
        local = value.local
        return (local.shape, local.stride(), local.dtype, local.device), value.shape, value.pieces
    if isinstance(value, torch.Tensor):
        if not value.is_contiguous() and not is_dense(value):
            value = value.contiguous()
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device
    kind = type(value)
    if kind is list:
        boxes.append(value)
        return "list", *[describe(v, tensors, boxes, strides=strides) for v in value]
    if isinstance(value, tuple):
        return kind, *[describe(v, tensors, boxes, strides=strides) for v in value]
    if kind is dict:
        boxes.append(value)
        return "dict", *[(k, describe(v, tensors, boxes, strides=strides)) for k, v in value.items()]
    if isinstance(value, CONSTANTS):
        return kind, value
    if is_record(value) and not any(box is value for box in boxes):  # one that holds itself is not taken apart
        boxes.append(value)
        return kind, *[(k, describe(v, tensors, boxes, strides=strides)) for k, v in vars(value).items()]
    raise TypeError(f"{kind.__module__}.{kind.__qualname__}")


def argument_names(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """What `function` calls each tensor of a call, in the order of `describe((args, kwargs), ...)`.

    Tensors in lists, tuples and dicts have the position or key behind the name: `caches_0`, `attention_kwargs_mask`.
    """
    names = positional_names(function, len(args))
    return [n for name, v in (*zip(names, args, strict=True), *kwargs.items()) for n in _tensor_names(name, v)]


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # builtin functions may have no signature
        return []


def positional_names(function: Callable[..., Any], count: int) -> list[str]:
    """The parameters that take so many positional arguments; `args_0` and so on for those that `*args` takes.

    Of what decorators wrap, where they say so (`__wrapped__`).
    """
    parameters = _parameters(function)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    return [*names, *(f"{rest}_{i}" for i in range(count - len(names)))][:count]


def returned_caches(forward: Callable[..., Any], result: Any) -> frozenset[int]:
    """Which leaves of `result` are caches that the next call is given: those in a dict beside other results, of a forward
    that takes such a dict (`hidden, conv_cache = decoder(latents, conv_cache=conv_cache)`, CogVideoX and Mochi)."""
    found: set[int] = set()
    if isinstance(result, tuple) and any(p.name.endswith("_cache") for p in _parameters(forward)):
        start = 0
        for part in result:
            stop = start + len(torch.utils._pytree.tree_leaves(part))
            found.update(range(start, stop) if type(part) is dict else ())
            start = stop
    return frozenset(found)


def _tensor_names(name: str, value: Any) -> list[str]:
    if isinstance(value, torch.Tensor):
        return [name]
    items: Iterable[tuple[Any, Any]] = ()
    if type(value) is dict or is_record(value):
        items = content_of(value).items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    return [n for key, v in items for n in _tensor_names(f"{name}_{key}", v)]


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in `value` themselves, in the order of `describe`."""
    if isinstance(value, torch.Tensor):
        return [value]
    mapping = type(value) is dict or is_record(value)
    items = content_of(value).values() if mapping else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


def same_layout(key: Any) -> Any:
    """`key` with the strides that mean nothing, of dimensions of size 1 and of tensors of no elements, set to 0."""
    if isinstance(key, tuple) and len(key) == 4 and isinstance(key[0], torch.Size):
        none = 0 in key[0]
        return key[0], tuple(0 if none or n == 1 else s for n, s in zip(key[0], key[1], strict=True)), key[2], key[3]
    if isinstance(key, tuple):
        return tuple(map(same_layout, key))
    return key


def _like(value: Any, items: list[Any]) -> Any:
    """`items` in a list or tuple as `value` is; a named tuple keeps its type."""
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


class Rebuilder:
    """Makes `value` again with other tensors in place of its own, in the order of `describe`."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = iter(tensors)
        self.boxes: list[Box] = []

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return next(self._tensors)
        if type(value) is list:
            new: list[Any] = []
            self.boxes.append(new)
            new.extend(map(self, value))
            return new
        if isinstance(value, tuple):
            return _like(value, [self(v) for v in value])
        if type(value) is dict:
            table: dict[Any, Any] = {}
            self.boxes.append(table)
            table.update({k: self(v) for k, v in value.items()})
            return table
        if is_record(value):
            record = object.__new__(type(value))
            self.boxes.append(record)
            vars(record).update({k: self(v) for k, v in vars(value).items()})
            return record
        return value


@dataclass(frozen=True)
class Out:
    """The graph's output number `index`."""

    index: int


@dataclass(frozen=True)
class In:
    """The call's tensor number `index`, handed back as the same object."""

    index: int


@dataclass(frozen=True)
class BoxRef:
    """The call's own container number `index`."""

    index: int


class Unknown(Exception):
    """A value among a call's results that may hold tensors where they cannot be found; says its type."""


def _is_constant(value: Any) -> bool:
    return isinstance(value, CONSTANTS) or (isinstance(value, tuple) and all(map(_is_constant, value)))


class Templates:
    """Turns what the traced call returned or left in a container into a template, collecting the graph's outputs."""

    def __init__(self, inputs: Sequence[torch.Tensor], boxes: Sequence[Box]) -> None:
        self.inputs = {id(t): i for i, t in enumerate(inputs)}
        self.boxes = {id(b): i for i, b in enumerate(boxes)}
        self.outputs: list[Any] = []
        self._known: dict[int, int] = {}

    def leaf(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) in self.inputs:
                return In(self.inputs[id(value)])
            if id(value) not in self._known:
                self._known[id(value)] = len(self.outputs)
                self.outputs.append(value)
            return Out(self._known[id(value)])
        if not _is_constant(value):
            raise Unknown(f"{type(value).__module__}.{type(value).__qualname__}")
        return value

    def __call__(self, value: Any) -> Any:
        if id(value) in self.boxes:
            return BoxRef(self.boxes[id(value)])
        if type(value) in (list, tuple) or hasattr(value, "_fields"):
            return _like(value, [self(v) for v in value])
        if type(value) is dict:
            return {k: self(v) for k, v in value.items()}
        return self.leaf(value)

    def content(self, box: Box) -> Any:
        """What a container holds, item by item (the container itself is the caller's)."""
        held = content_of(box)
        return [self(v) for v in held] if isinstance(held, list) else {k: self(v) for k, v in held.items()}


def fill(template: Any, outputs: Sequence[Any], inputs: Sequence[Any], boxes: Sequence[Box]) -> Any:
    """The value that `template` stands for in this call."""
    kind = type(template)
    if kind is Out:
        return outputs[template.index]
    if kind is In:
        return inputs[template.index]
    if kind is BoxRef:
        return boxes[template.index]
    if kind in (list, tuple) or hasattr(template, "_fields"):
        return _like(template, [fill(t, outputs, inputs, boxes) for t in template])
    if kind is dict:
        return {k: fill(t, outputs, inputs, boxes) for k, t in template.items()}
    return template


def write_back(
    effects: Iterable[tuple[int, Any]], outputs: Sequence[Any], inputs: Sequence[Any], boxes: Sequence[Box]
) -> None:
    """Leave in the caller's own containers what a call left in them: `effects` are (number of the container, template)."""
    for index, template in effects:
        content, box = fill(template, outputs, inputs, boxes), content_of(boxes[index])
        box.clear()
        if isinstance(box, list):
            box.extend(content)
        else:
            box.update(content)
