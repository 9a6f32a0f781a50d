"""What a model's own tiled decode or encode calls, and what depends on what: its Python run once on fake tensors.

The calls of the regions (`vae.decoder`, `vae.encoder`) are recorded. Calls that feed one another are a *task*: a causal
cache in a list or on a module, a dict returned by one call and given to the next, or a result that Python works on before
it comes back. Tasks are independent, so ranks share them. A region itself runs on fakes once for each kind of call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef  # equal for all views of a storage
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pvae.backend import PvaeError
from pvae.call_structure import CONSTANTS, Box, Out, Rebuilder, Templates, Unknown, describe, fill, write_back
from pvae.module_state import Absent, Attribute, AttributeWatch, ModuleState, clean_caches
from pvae.runtime.torch_compat import DATA_DEPENDENT, FakeTensorMode, autocast_enabled, new_fake_mode, static_fake

MAX_PLANS = 64


class Unplannable(Exception):
    """The calls cannot be known before they are made; says why."""


@dataclass(frozen=True)
class Spec:
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, t: torch.Tensor) -> Spec:
        return cls(tuple(t.shape), t.stride(), t.dtype, t.device)

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)

    def nothing(self) -> torch.Tensor:
        """A tensor of that shape, in the memory of one element, for what is passed on and never read."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)


@dataclass(frozen=True)
class Kind:
    """What one kind of call returns and leaves in containers, without values."""

    outputs: tuple[Spec, ...]
    result: tuple[Any, ...]
    structure: Any
    effects: tuple[tuple[int, Any], ...]

    def replay(self, outputs: Sequence[Any], tensors: Sequence[torch.Tensor], boxes: Sequence[Box]) -> Any:
        """Return and write what such a call would, with `outputs` for the tensors that it makes."""
        write_back(self.effects, outputs, tensors, boxes)
        return pytree.tree_unflatten([fill(t, outputs, tensors, boxes) for t in self.result], self.structure)

    def made(self, result: Any, boxes: Sequence[Box]) -> dict[int, torch.Tensor]:
        """The tensors that a real call made, by number, out of what it returned and left in its containers."""
        found: dict[int, torch.Tensor] = {}
        leaves, structure = pytree.tree_flatten(result)
        if structure != self.structure:
            raise PvaeError(f"a region returned {structure}, where its run on fake tensors returned {self.structure}")
        _match(list(self.result), leaves, found)
        for index, template in self.effects:
            _match(template, boxes[index], found)
        return found


def _match(template: Any, value: Any, found: dict[int, torch.Tensor]) -> None:
    if isinstance(template, Out):
        found[template.index] = value
    elif isinstance(template, (list, tuple)):
        for t, v in zip(template, value, strict=True):
            _match(t, v, found)
    elif isinstance(template, dict):
        for name, t in template.items():
            _match(t, value[name], found)


@dataclass(frozen=True)
class RegionCall:
    """One call of a region. `sends` are the outputs that the model's Python reads; caches, say, are not among them."""

    number: int
    region: str
    key: Hashable
    kind: Kind
    task: int
    sends: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class TilePlan:
    """The calls of the regions in order, and the cost of each task: elements that go in and come out."""

    calls: tuple[RegionCall, ...]
    costs: tuple[int, ...]

    def owners(self, world: int) -> tuple[int, ...]:
        """The rank of each task: the longest first, each to the rank that has least to do (the lowest of these)."""
        load = [0] * world
        owner = [0] * len(self.costs)
        for task in sorted(range(len(self.costs)), key=lambda t: (-self.costs[t], t)):
            owner[task] = min(range(world), key=lambda r: (load[r], r))
            load[owner[task]] += self.costs[task]
        return tuple(owner)

    def texts(self, world: int) -> tuple[str, ...]:
        """A line a call, the same on every rank that is about to do the same."""
        owner = self.owners(world)
        return tuple(f"{call.text} task {call.task} of rank {owner[call.task]}" for call in self.calls)

    @property
    def bytes(self) -> int:
        """Bytes of the results that every rank ends up with."""
        specs = [call.kind.outputs[i] for call in self.calls for i in call.sends]
        return sum(torch.Size(s.shape).numel() * s.dtype.itemsize for s in specs)


@dataclass
class _Recorded:
    region: str
    key: Hashable
    kind: Kind
    outputs: list[torch.Tensor]
    feeds: frozenset[int]  # earlier calls whose results go into this one
    cost: int
    text: str


class Planner:
    """Makes and keeps the plans of one model. `regions` by name."""

    def __init__(self, model: nn.Module, regions: Mapping[str, nn.Module]) -> None:
        self.model = model
        self.regions = regions
        self.forget()

    def forget(self) -> None:
        """Drop every plan and kind of call."""
        self._written: dict[str, list[Attribute]] = {name: [] for name in self.regions}
        self._drop()

    def _drop(self) -> None:
        self._plans: dict[Hashable, TilePlan | Unplannable] = {}
        self._kinds: dict[Hashable, Kind] = {}
        self._state: ModuleState | None = None

    def plan(self, name: str, own: Callable[..., Any], args: Any, kwargs: Any) -> TilePlan:
        """The plan of `own(*args, **kwargs)`, the model's method `name`. Raises Unplannable."""
        try:
            key = name, autocast_enabled(), describe((args, kwargs), [], [], strides=False)
            hash(key)
        except TypeError as error:
            raise Unplannable(f"an argument is a {error}, which cannot be compared") from None
        state = self._state
        number = None if state is None or state.changed() else state.attributes()
        found = self._plans.get((number, key))
        while found is None:
            if state is None or number is None:
                self._drop()
                state = self._state = ModuleState(self.model, [a for known in self._written.values() for a in known])
                number = 0
            try:
                found = self._dry_run(state, number, own, args, kwargs)
            except _NewlyWritten:
                number = None
            except Unplannable as error:
                found = error
        self._plans[number, key] = found
        if len(self._plans) > MAX_PLANS:
            self._plans.pop(next(iter(self._plans)))  # the oldest
        if isinstance(found, Unplannable):
            raise found
        return found

    def attributes(self, name: str) -> list[Any]:
        """What the attributes that region `name` writes are now: one more argument of a call, and one more result."""
        return [table.get(attribute, Absent.ABSENT) for table, attribute in self._written[name]]

    def write_attributes(self, name: str, held: Sequence[Any]) -> None:
        """Set the attributes that region `name` writes to what `held` has."""
        for (table, attribute), value in zip(self._written[name], held, strict=True):
            if value is Absent.ABSENT:
                table.pop(attribute, None)
            else:
                table[attribute] = value

    def _dry_run(self, state: ModuleState, number: int, own: Callable[..., Any], args: Any, kwargs: Any) -> TilePlan:
        mode, reads = new_fake_mode(), _Reads()
        calls: list[_Recorded] = []

        def record(name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            with reads.inside_a_region():
                tensors: list[torch.Tensor] = []
                boxes: list[Box] = []
                call = args, kwargs, self.attributes(name)
                key = name, describe(call, tensors, boxes, strides=False)
                kind = self._kinds.get((number, autocast_enabled(), key))
                if kind is None:
                    kind = self._kinds[number, autocast_enabled(), key] = self._learn(name, forward, call, mode)
                outputs = [spec.empty() for spec in kind.outputs]
                feeds = frozenset().union(*map(reads.sources, tensors))
                fresh = [t for t in tensors if not reads.sources(t)]
                reads.made(outputs, len(calls))
                value = kind.replay(outputs, tensors, boxes)
                self.write_attributes(name, call[2])
            shapes = " ".join(str(list(t.shape)) for t in fresh)
            calls.append(_Recorded(name, key, kind, outputs, feeds, sum(t.numel() for t in fresh), f"{name} {shapes}"))
            return value

        watch = AttributeWatch(self.model)
        with ExitStack() as stack:
            stack.callback(watch.restore)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(clean_caches(self.model))
            fakes = [static_fake(mode, t) for t in state.current()]
            tensors: list[torch.Tensor] = []
            describe((args, kwargs), tensors, [], strides=False)
            inputs = [static_fake(mode, t) for t in tensors]
            args, kwargs = Rebuilder(inputs)((args, kwargs))
            versions = [t._version for t in inputs]
            stack.enter_context(state.replaced(fakes))
            stack.enter_context(intercepted(self.regions, record))
            stack.enter_context(mode)
            stack.enter_context(reads)
            try:
                result = own(*args, **kwargs)
            except DATA_DEPENDENT as error:
                first = str(error).strip().splitlines()[0]
                raise Unplannable(f"its Python decides by a tensor's value ({first})") from None
        if [t._version for t in inputs] != versions:
            raise Unplannable("it writes its input")
        for tensor in _tensors_within(result):
            reads.read(tensor)
        return _plan_of(calls, reads)

    def _learn(self, name: str, forward: Callable[..., Any], call: Any, mode: FakeTensorMode) -> Kind:
        """Run a region on fakes. `call` is its arguments and the list of the attributes that it is known to write."""
        tensors: list[torch.Tensor] = []
        describe(call, tensors, [], strides=False)
        inputs = [static_fake(mode, t) for t in tensors]
        rebuild = Rebuilder(inputs)
        args, kwargs, held = rebuild(call)
        templates = Templates(inputs, rebuild.boxes)
        before = [templates.content(box) for box in rebuild.boxes]
        versions = [t._version for t in inputs]
        watch = AttributeWatch(self.regions[name])
        try:
            self.write_attributes(name, held)
            value = eager(self.regions[name], forward)(*args, **kwargs)
            held[:] = self.attributes(name)
            known = {(id(table), attribute) for table, attribute in self._written[name]}
            new = [(t, attribute) for t, attribute in watch.written() if (id(t), attribute) not in known]
        finally:
            watch.restore()
        if new:
            self._written[name] += new
            raise _NewlyWritten
        if [t._version for t in inputs] != versions:
            raise Unplannable(f"{name} writes a tensor that it is given")
        leaves, structure = pytree.tree_flatten(value)
        try:
            result = tuple(map(templates.leaf, leaves))
            after = [templates.content(box) for box in rebuild.boxes]
        except Unknown as error:
            raise Unplannable(f"{name} returns or keeps a {error}, which cannot be taken apart") from None
        effects = tuple((i, a) for i, (a, b) in enumerate(zip(after, before, strict=True)) if a != b)
        return Kind(tuple(map(Spec.of, templates.outputs)), result, structure, effects)


class _NewlyWritten(Exception):
    """A region was found to write attributes: they are arguments and results from now on, and planning starts anew."""


def eager(region: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The model's own forward of a region that `pvae.compile` or `torch.compile` took."""
    module = getattr(region, "_orig_mod", None)  # of torch.compile(module)
    forward = forward if module is None else module.forward
    return getattr(forward, "original", forward)  # of CompiledForward


Take = Callable[[str, Callable[..., Any], Any, Any], Any]


@contextmanager
def intercepted(regions: Mapping[str, nn.Module], take: Take) -> Iterator[None]:
    """Within the block a call of a region's forward is `take(name, forward, args, kwargs)`."""
    absent = object()
    before = {name: module.__dict__.get("forward", absent) for name, module in regions.items()}

    def stand_in(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: take(name, forward, args, kwargs)

    try:
        for name, module in regions.items():
            module.__dict__["forward"] = stand_in(name, module.forward)
        yield
    finally:
        for name, module in regions.items():
            if before[name] is absent:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before[name]


def _plan_of(calls: Sequence[_Recorded], reads: _Reads) -> TilePlan:
    task = list(range(len(calls)))
    for number, call in enumerate(calls):
        joined = {task[number], *(task[feed] for feed in call.feeds)}
        task = [min(joined) if t in joined else t for t in task]
    numbers = {first: i for i, first in enumerate(dict.fromkeys(task))}
    costs = [0] * len(numbers)
    planned = []
    for number, call in enumerate(calls):
        sends = tuple(i for i, t in enumerate(call.outputs) if reads.is_read(t))
        mine = numbers[task[number]]
        costs[mine] += call.cost + sum(call.outputs[i].numel() for i in sends)
        planned.append(RegionCall(number, call.region, call.key, call.kind, mine, sends, call.text))
    return TilePlan(tuple(planned), tuple(costs))


def _tensors_within(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """The tensors that `value` holds in containers and attributes, however deep."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (*CONSTANTS, nn.Module, type)):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    items: Iterable[Any] = value.values() if isinstance(value, Mapping) else ()
    if isinstance(value, (list, tuple, set)):
        items = value
    for item in (*items, *getattr(value, "__dict__", {}).values()):
        yield from _tensors_within(item, seen)


@dataclass
class _Made:
    sources: frozenset[int] = frozenset()  # calls of regions that the values in this storage come from
    output: bool = False
    read: bool = False


class _Reads(TorchDispatchMode):
    """Follows the results of regions through the operations of the model's Python, storage by storage."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[StorageWeakRef, _Made] = {}
        self._inside = False

    @contextmanager
    def inside_a_region(self) -> Iterator[None]:
        """Operations in here read nothing."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def _of(self, tensor: torch.Tensor) -> _Made | None:
        return self._storages.get(StorageWeakRef(tensor.untyped_storage()))

    def sources(self, tensor: torch.Tensor) -> frozenset[int]:
        made = self._of(tensor)
        return made.sources if made else frozenset()

    def made(self, outputs: Sequence[torch.Tensor], call: int) -> None:
        for tensor in outputs:
            self._storages[StorageWeakRef(tensor.untyped_storage())] = _Made(frozenset((call,)), output=True)

    def read(self, tensor: torch.Tensor) -> None:
        made = self._of(tensor)
        if made:
            made.read = True

    def is_read(self, tensor: torch.Tensor) -> bool:
        made = self._of(tensor)
        return made is not None and made.read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attention = "dot_product" in func.name() or "sdp" in func.name()  # tagged for a dropout that is off
        if torch.Tag.nondeterministic_seeded in func.tags and not attention:
            raise Unplannable(f"it draws random numbers ({func.name()}), which ranks would draw differently")
        result = func(*args, **(kwargs or {}))
        if self._inside:
            return result
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        sources = frozenset().union(*map(self.sources, tensors))
        if sources:
            for tensor in tensors:
                self.read(tensor)
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    made = self._storages.setdefault(StorageWeakRef(tensor.untyped_storage()), _Made())
                    made.sources |= sources
        return result
