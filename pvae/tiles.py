"""The tile form: a model's own tiled decode and encode, its tiles spread over the ranks.

    plan       the model's Python on fake tensors: which calls of the regions there will be, and which feed which
    agree      the ranks compare their plans
    compute    the model's Python; each rank runs its own tasks, of the other calls it knows the shapes
    exchange   one collective a dtype, after which every rank has every result
    replay     the model's Python once more, its regions' calls answered from the results

The blending is thus the model's own and in the model's order, so the result is what one process computes, whatever the
model does with its tiles: nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from pvae.backend import REGISTRY, PvaeError, complain
from pvae.call_structure import Box, describe
from pvae.module_state import Absent, AttributeWatch
from pvae.options import Options
from pvae.runtime.fetch import fetch
from pvae.runtime.mesh import Mesh
from pvae.runtime.rank_agreement import RankAgreement
from pvae.runtime.torch_compat import is_compiling
from pvae.tile_blend import restore_blends, vectorise_blends
from pvae.tile_plan import Planner, RegionCall, Spec, TilePlan, Unplannable, intercepted

ENTRIES = ("encode", "decode", "tiled_encode", "tiled_decode")


def install_tiles(
    model: nn.Module,
    regions: Mapping[str, nn.Module],
    mesh: Mesh,
    options: Options,
    *,
    seconds: float = 300.0,
    check_values: bool = False,
) -> Tiles:
    """Turn the model's own tiling on and spread it over the ranks of `mesh`, which has one axis.

    Tile sizes stay as they are set. Every rank must then call `model.decode` (or `encode`, `tiled_decode`,
    `tiled_encode`) with the same input; each gets the whole result. Ranks wait at most `seconds` for one another before
    they compute; `check_values` makes them compare the inputs' values too.

    Raises PvaeError for a model without tiling. Undone by `remove_tiles`.
    """
    name = type(model).__name__
    if len(mesh.shape) != 1:
        raise ValueError(f"tiles are spread over a mesh of one axis, not of shape {mesh.shape}")
    if not (hasattr(model, "use_tiling") and callable(getattr(model, "enable_tiling", None))):
        raise PvaeError(f"{name} has no tiling of its own; shard='halo' (exact) or shard='patch' needs none")
    for path, region in regions.items():
        if getattr(region, "_compiled_call_impl", None) is not None:
            raise PvaeError(
                f"{name}.{path} was compiled by its method `compile`, past which no call can be seen; "
                f"use pvae.compile(model), or model.{path} = torch.compile(model.{path})"
            )
    remove_tiles(model)
    return Tiles(model, regions, mesh, options, seconds, check_values)


def tiles_of(model: nn.Module) -> Tiles | None:
    """What `install_tiles` put on this model."""
    entry = model.__dict__.get("decode")
    return entry.tiles if isinstance(entry, TiledEntry) else None


def remove_tiles(model: nn.Module) -> None:
    """Undo `install_tiles`; nothing where there is nothing."""
    tiles = tiles_of(model)
    if tiles is not None:
        tiles.remove()


class TiledEntry:
    """Stands as `model.decode`, `model.encode` and the like."""

    def __init__(self, tiles: Tiles, name: str, own: Callable[..., Any]) -> None:
        self.tiles = tiles
        self.name = name
        self.own = own
        self.__wrapped__ = own  # pipelines look at the signature of `decode`

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.tiles.world == 1 or self.tiles.running or is_compiling():
            return self.own(*args, **kwargs)
        return self.tiles.run(self, args, kwargs)


class Tiles:
    """One model's tiled calls on this rank."""

    def __init__(
        self,
        model: nn.Module,
        regions: Mapping[str, nn.Module],
        mesh: Mesh,
        options: Options,
        seconds: float,
        check_values: bool,
    ) -> None:
        self.model = model
        self.regions = dict(regions)
        self.mesh = mesh
        self.options = options
        self.seconds = seconds
        self.check_values = check_values
        self.running = False
        self._noted: set[str] = set()
        self.agreement: RankAgreement | None = None
        self.planner = Planner(model, self.regions)
        self._replaced = {n: model.__dict__.get(n, Absent.ABSENT) for n in ENTRIES if hasattr(model, n)}
        self._flags = enable_tiling(model)
        for blend, reason in vectorise_blends(model).items():
            self._note(f"{blend} {reason}")
        for name in self._replaced:
            setattr(model, name, TiledEntry(self, name, getattr(model, name)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"agreement": None, "planner": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.planner = Planner(self.model, self.regions)

    @property
    def world(self) -> int:
        return self.mesh.shape[0]

    def remove(self) -> None:
        for name, value in self._replaced.items():
            if value is Absent.ABSENT:
                delattr(self.model, name)
            else:
                setattr(self.model, name, value)
        restore_blends(self.model)
        for name, (before, after) in self._flags.items():
            if getattr(self.model, name, None) is after:
                setattr(self.model, name, before)

    def run(self, entry: TiledEntry, args: Any, kwargs: Any) -> Any:
        where = f"{type(self.model).__name__}.{entry.name} by tiles"
        if self.agreement is None:
            self.agreement = RankAgreement.of(None, self.seconds)
        with self._running(), self.agreement.guarded(where):
            found = self._plan(entry, args, kwargs)
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            texts = found.texts(self.world) if isinstance(found, TilePlan) else (f"computed whole: {found}",)
            self.agreement.agree(where, texts, tensors, check_values=self.check_values)
            shapes = " ".join(str(list(t.shape)) for t in tensors)
            if not isinstance(found, TilePlan):
                self._note(f"{entry.name} of {shapes} is computed whole by every rank: {found}")
                return entry.own(*args, **kwargs)
            owners = found.owners(self.world)
            self._note(
                f"{entry.name} of {shapes}: {len(found.calls)} calls in {len(owners)} tasks, by rank "
                f"{[owners.count(r) for r in range(self.world)]}; {found.bytes} bytes gathered"
            )
            results = self._exchange(found, owners, self._compute(found, owners, entry.own, args, kwargs))
            return self._replay(found, results, entry.own, args, kwargs)

    def _plan(self, entry: TiledEntry, args: Any, kwargs: Any) -> TilePlan | str:
        """The plan, or why there is none."""
        if torch.is_grad_enabled():
            values = (*args, *kwargs.values(), *self.model.parameters())
            if any(isinstance(t, torch.Tensor) and t.requires_grad for t in values):
                reason = "grad mode is on and an input or weight requires grad (use torch.no_grad())"
                complain(self.options, type(self.model).__name__, f"{entry.name} is not spread over ranks: {reason}")
                return reason
        try:
            plan = self.planner.plan(entry.name, entry.own, args, kwargs)
        except Unplannable as error:
            complain(self.options, type(self.model).__name__, f"{entry.name} is not spread over ranks: {error}")
            return str(error)
        if len(plan.costs) > 1:
            return plan
        return "it is one tile" if len(plan.calls) < 2 else f"its {len(plan.calls)} calls feed one another"

    def _compute(
        self, plan: TilePlan, owners: Sequence[int], own: Callable[..., Any], args: Any, kwargs: Any
    ) -> dict[torch.dtype, torch.Tensor]:
        """This rank's results end to end, a buffer a dtype. The model is left as it was."""
        packed = _Packed(plan, owners, self.mesh.rank)
        left = sum(owners[call.task] == self.mesh.rank for call in plan.calls)
        calls = iter(plan.calls)

        def take(name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            nonlocal left
            call, held, tensors, boxes = self._next(calls, name, args, kwargs)
            if owners[call.task] != self.mesh.rank:
                outputs = [
                    spec.empty() if i in call.sends else spec.nothing() for i, spec in enumerate(call.kind.outputs)
                ]
                value = call.kind.replay(outputs, tensors, boxes)
                self.planner.write_attributes(name, held)
                return value
            value = forward(*args, **kwargs)
            held[:] = self.planner.attributes(name)
            made = call.kind.made(value, boxes)
            for i in call.sends:  # now, because the model may write into its tiles
                packed.add(made[i], call.kind.outputs[i])
            left -= 1
            if not left:
                raise _Done
            return value

        if left:
            watch = AttributeWatch(self.model)
            try:
                with intercepted(self.regions, take):
                    own(*args, **kwargs)
            except _Done:
                pass
            finally:
                watch.restore()
        return packed.buffers

    def _exchange(
        self, plan: TilePlan, owners: Sequence[int], mine: dict[torch.dtype, torch.Tensor]
    ) -> dict[tuple[int, int], torch.Tensor]:
        """Everyone's results, by call and output."""
        results: dict[tuple[int, int], torch.Tensor] = {}
        for dtype, wanted in _by_dtype(plan).items():
            ordered = sorted(wanted, key=lambda item: owners[plan.calls[item[0]].task])
            sizes = [0] * self.world
            for call, output in ordered:
                sizes[owners[plan.calls[call].task]] += _size(plan.calls[call].kind.outputs[output])
            have = (0, *accumulate(sizes))
            everything = ((0, have[-1]),) * self.world
            whole = fetch(mine[dtype], 0, have, everything, self.mesh.rank, group=self.mesh.groups[0])
            specs = [plan.calls[call].kind.outputs[output] for call, output in ordered]
            for item, spec, piece in zip(ordered, specs, whole.split([*map(_size, specs)]), strict=True):
                results[item] = piece.view(spec.shape)
        return results

    def _replay(
        self,
        plan: TilePlan,
        results: Mapping[tuple[int, int], torch.Tensor],
        own: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        calls = iter(plan.calls)

        def take(name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            call, held, tensors, boxes = self._next(calls, name, args, kwargs)
            outputs = [
                results[call.number, i] if i in call.sends else spec.nothing()
                for i, spec in enumerate(call.kind.outputs)
            ]
            value = call.kind.replay(outputs, tensors, boxes)
            self.planner.write_attributes(name, held)
            return value

        with intercepted(self.regions, take):
            return own(*args, **kwargs)

    def _next(
        self, calls: Iterator[RegionCall], name: str, args: Any, kwargs: Any
    ) -> tuple[RegionCall, list[Any], list[torch.Tensor], list[Box]]:
        """The planned call that this one is, with its attributes, tensors and containers."""
        call = next(calls, None)
        tensors: list[torch.Tensor] = []
        boxes: list[Box] = []
        held = self.planner.attributes(name)
        key = name, describe((args, kwargs, held), tensors, boxes, strides=False)
        if call is None or call.key != key:
            planned = "no call" if call is None else call.text
            raise PvaeError(
                f"{type(self.model).__name__} calls {name} {[list(t.shape) for t in tensors]} where its run on fake "
                f"tensors made {planned}; after a change that is no plain attribute, call pvae.refresh(model)"
            )
        return call, held, tensors, boxes

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Entries called in here are the model's own. An offloading hook (accelerate's) brings the weights once, first."""
        hook = self.model.__dict__.get("_hf_hook")
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(self.model)
            del self.model.__dict__["_hf_hook"]
        self.running = True
        try:
            yield
        finally:
            self.running = False
            if hook is not None:
                self.model.__dict__["_hf_hook"] = hook

    def _note(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            REGISTRY.note(getattr(type(self.model).forward, "__code__", None), text)


class _Done(BaseException):
    """This rank has computed its last task: what the model would still do in this pass is wasted."""


class _Packed:
    """This rank's results end to end, a buffer a dtype."""

    def __init__(self, plan: TilePlan, owners: Sequence[int], rank: int) -> None:
        self.buffers: dict[torch.dtype, torch.Tensor] = {}
        for dtype, wanted in _by_dtype(plan).items():
            mine = [plan.calls[c].kind.outputs[o] for c, o in wanted if owners[plan.calls[c].task] == rank]
            device = plan.calls[wanted[0][0]].kind.outputs[wanted[0][1]].device
            self.buffers[dtype] = torch.empty(sum(map(_size, mine)), dtype=dtype, device=device)
        self._filled = dict.fromkeys(self.buffers, 0)

    def add(self, tensor: torch.Tensor, spec: Spec) -> None:
        if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype):
            raise PvaeError(f"a region made {tensor.dtype} {list(tensor.shape)}, on fake tensors {spec}")
        start, size = self._filled[spec.dtype], _size(spec)
        self.buffers[spec.dtype][start : start + size].view(spec.shape).copy_(tensor)
        self._filled[spec.dtype] += size


def _size(spec: Spec) -> int:
    return torch.Size(spec.shape).numel()


def _by_dtype(plan: TilePlan) -> dict[torch.dtype, list[tuple[int, int]]]:
    """The results that are exchanged, as numbers of call and output, in the order of the calls."""
    found: dict[torch.dtype, list[tuple[int, int]]] = {}
    for number, call in enumerate(plan.calls):
        for i in call.sends:
            found.setdefault(call.kind.outputs[i].dtype, []).append((number, i))
    return found


def enable_tiling(model: Any) -> dict[str, tuple[Any, Any]]:
    """Call the model's `enable_tiling`, keeping every size that was set. Returns the flags that changed, before and after.

    Some models work sizes out anew from others there (CogVideoX), so whatever is not a flag is put back.
    """
    before = dict(model.__dict__)
    if not model.use_tiling:
        model.enable_tiling()
    changed = {n: (before[n], v) for n, v in model.__dict__.items() if n in before and v is not before[n]}
    for name, (value, _) in changed.items():
        if not isinstance(value, bool):
            setattr(model, name, value)
    return {n: pair for n, pair in changed.items() if isinstance(pair[0], bool)}
