"""`pvae.compile(model)`: capture by running, in place. One graph for each kind of call, whatever Dynamo thinks of the code.

A call's kind is its shapes, dtypes, strides, list structure and plain arguments. The forward is run once on fake tensors;
what it returns and what it leaves in the lists that it was given become the graph's outputs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from types import MethodType
from typing import Any

import torch
from torch import nn

from pvae import eager_layout
from pvae.auto_shard import choose_sharding
from pvae.backend import ABSENT, REGISTRY, PvaeError, compile_capture, complain, overlapping, pvae_backend, region_ranks
from pvae.block_pieces import Pieces, WholeResults, cut_inputs, input_pieces
from pvae.call_structure import (
    Box,
    In,
    Out,
    Rebuilder,
    Templates,
    Unknown,
    argument_names,
    content_of,
    describe,
    fill,
    returned_caches,
    same_layout,
    tensors_of,
    write_back,
)
from pvae.capture import capture_run, lay_out_inputs, tensor_constants
from pvae.eager_layout import Strides, note
from pvae.main_rank import inside_region, unwrap, wrap_named
from pvae.module_state import Absent, Attribute, AttributeWatch, ModuleState, clean_caches, layout_key
from pvae.options import GRAPH_FORMS, Options, parse_options
from pvae.passes.ir import placeholders
from pvae.passes.output_layout import same_strides
from pvae.passes.pipeline import Observer
from pvae.passes.rule import RewriteCounter
from pvae.passes.shard_choice import Choice
from pvae.passes.verify import Signature
from pvae.ranks import Ranks, ranks_of, world_size
from pvae.regions import regions, repeated_blocks
from pvae.report import GraphReport
from pvae.runtime import frozen_weights
from pvae.runtime.sharded_tensor import ShardedTensor
from pvae.runtime.torch_compat import (
    DATA_DEPENDENT,
    FakeTensorMode,
    autocast_enabled,
    is_compiling,
    new_fake_mode,
    static_fake,
)
from pvae.tiles import install_tiles, remove_tiles, tiles_of

MAX_PROGRAMS = 64
_TRACING = threading.RLock()  # torch's tracing modes are the process's, not a thread's
NO_NUMPY = ".numpy() is not supported for tensor subclasses"  # torch's words where a traced tensor meets numpy


@dataclass(frozen=True)
class Program:
    """One captured kind of call: the compiled graph, and where its outputs go."""

    compiled: Callable[..., Any]
    result: list[Any]
    spec: Any
    effects: tuple[tuple[int, Any], ...]
    returns_inputs: bool
    mutated: tuple[int, ...]
    laid: tuple[tuple[int, Strides], ...]  # outputs that are not in eager's strides, and these
    report: GraphReport

    def __call__(self, call: Any, tensors: list[torch.Tensor], weights: list[torch.Tensor], boxes: list[Box]) -> Any:
        inputs = [*tensors, *weights]
        if not (self.returns_inputs or self.mutated):
            # What the call overwrites is freed as it is read: nobody but the compiled graph may hold it.
            for index, _ in self.effects:
                content_of(boxes[index]).clear()
            tensors.clear()
        outputs = self.compiled(inputs)
        for index, strides in self.laid:
            note(outputs[index], strides)
        if self.returns_inputs or self.mutated:
            own = tensors_of(call)
            for index in self.mutated:
                if index < len(own) and own[index] is not tensors[index]:  # `describe` made a dense copy of it
                    own[index].copy_(tensors[index])
            tensors = own
        write_back(self.effects, outputs, tensors, boxes)
        leaves = [fill(t, outputs, tensors, boxes) for t in self.result]
        return leaves[0] if self.spec.is_leaf() else torch.utils._pytree.tree_unflatten(leaves, self.spec)


class CompiledForward:
    """Stands as `module.forward`. Captures each kind of call once, then runs its compiled graph.

    Attributes that forward writes (Magvit's decoder keeps its causal caches so) are passed and returned like a list
    argument; attributes set between calls are part of a call's kind.
    """

    def __init__(
        self, module: nn.Module, name: str, options: Options, counter: RewriteCounter, *, takes_pieces: bool = False
    ) -> None:
        self.module = module
        self.takes_pieces = takes_pieces  # of a block: inputs that are whole are cut before the graph
        self.chosen: list[tuple[Options, Choice]] = []  # what shard="auto" came to, one for all blocks of a model
        self.original: Callable[..., Any] = module.forward
        self.name = name
        self.options = options
        self.counter = counter
        self.observe: Observer | None = None
        self.ranks: Ranks | None = None  # set before the first call, it stands for the world's
        self.forget()

    def forget(self) -> None:
        """Drop every capture; the next call of each kind captures anew."""
        self._programs: dict[Hashable, Program] = {}
        self._cuts: dict[Hashable, Mapping[int, Pieces]] = {}
        self._state: ModuleState | None = None
        self._layout: list[Any] = []
        self._where: tuple[torch.device, torch.device] | None = None
        self._written: list[Attribute] = []
        self._stays_eager = ""
        self._by_dynamo: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("module", "takes_pieces", "chosen", "original", "name", "options", "counter", "observe")
        state = {k: v for k, v in self.__dict__.items() if k in kept}
        if _is_own(self.original, self.module):  # pickle would look it up where this object stands
            state["original"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["original"] is None:
            self.original = MethodType(type(self.module).forward, self.module)
        self.ranks = None
        self.forget()

    @property
    def programs(self) -> list[Program]:
        return list({id(p): p for p in self._programs.values()}.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():  # an outer torch.compile takes the model's own forward
            return self.original(*args, **kwargs)
        if self._stays_eager:
            return self._eager(self._stays_eager, args, kwargs)
        if self._by_dynamo is not None:
            return self._by_dynamo(*args, **kwargs)
        if self.ranks is None and self.options.shard in GRAPH_FORMS:
            self.ranks = ranks_of(self.options)
        if self.ranks is not None and inside_region():
            raise PvaeError(
                f"{self.name}: it is sharded over all ranks, and called in a main-rank region, where only rank 0 comes: "
                "take it out of the region, or compile it with shard='none'"
            )
        state = self._state
        attributes = None if state is None or state.changed() else state.attributes()
        if state is None or attributes is None:
            state, attributes = self._fresh_state(), 0
        weights = state.current()
        if layout_key(weights) != self._layout or self._device(weights) != self._where:
            state, attributes = self._fresh_state(), 0
            weights = state.current()
        tensors: list[torch.Tensor] = []
        boxes: list[Box] = []
        call = (args, kwargs, [table.get(name, Absent.ABSENT) for table, name in self._written])
        try:
            key = describe(call, tensors, boxes)
            hash(key)
        except TypeError as error:
            return self._eager(f"an argument is a {error}, which a capture cannot compare", args, kwargs)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *weights)):
            reason = "grad mode is on and an input or weight requires grad; the passes are for inference"
            return self._eager(f"{reason} (use torch.no_grad())", args, kwargs)
        if autocast_enabled():
            return self._eager("autocast is on; cast the model and its inputs instead", args, kwargs)
        full = (key, attributes)
        if full in self._cuts:
            tensors = cut_inputs(tensors, self._cuts[full])
            full = (describe(Rebuilder(tensors)(call), [], []), attributes)
        program = self._programs.get(full)
        if program is None:
            plain = same_layout(full)
            program = self._programs.get(plain)
            if program is None:
                if len(self.programs) >= MAX_PROGRAMS:
                    return self._eager(f"more than {MAX_PROGRAMS} kinds of call were captured", args, kwargs)
                with _TRACING, nullcontext() if self.ranks is None else self.ranks.guarded(self.name):
                    found = self._capture(call, tensors, weights, state)
                if isinstance(found, dict):
                    self._cuts[full] = found
                    return self(*args, **kwargs)
                if found is None:
                    return self(*args, **kwargs)
                if isinstance(found, str):
                    self._stays_eager = found
                    eager_layout.put_back(self.module)
                    return self._eager(found, args, kwargs)
                program = self._programs[plain] = found
            self._programs[full] = program
        result = program(call, tensors, weights, boxes)
        self._write_attributes(call[2])
        return result

    def _write_attributes(self, values: Sequence[Any]) -> None:
        for (table, name), value in zip(self._written, values, strict=True):
            if value is Absent.ABSENT:
                table.pop(name, None)
            else:
                table[name] = value

    def _fresh_state(self) -> ModuleState:
        if self._state is not None:
            self.forget()
        self._state = ModuleState(self.module, self._written)
        weights = self._state.current()
        self._layout, self._where = layout_key(weights), self._device(weights)
        return self._state

    @staticmethod
    def _device(weights: Sequence[torch.Tensor]) -> tuple[torch.device, torch.device] | None:
        return (weights[0].device, weights[-1].device) if weights else None

    def _eager(self, reason: str, args: Any, kwargs: Any) -> Any:
        complain(self.options, self.name, f"runs eagerly: {reason}")
        with eager_layout.given_weights(self.module):
            return self.original(*args, **kwargs)

    def _capture(
        self, call: Any, tensors: list[torch.Tensor], weights: list[torch.Tensor], state: ModuleState
    ) -> Program | dict[int, Pieces] | str | None:
        """Trace and compile this kind of call.

        A string says why the module must stay eager; None that the call has to be made anew: forward was found to write
        attributes, or to be for Dynamo. A dict says the same, and which inputs are to be cut before it.
        """
        for path, sub in self.module.named_modules():
            if path and (sub._forward_hooks or sub._forward_pre_hooks):
                return f"submodule {path!r} has forward hooks, which a capture would run only once"
        absent = [t.is_meta for t in weights]  # in a main-rank region, perhaps: then this rank does not read them
        for what, found in (("an input", any(t.is_meta for t in tensors)), ("a weight", any(absent))):
            if found and (what == "an input" or world_size() == 1):
                raise PvaeError(f"{self.name}: {what} is on the meta device and has no values; load it first")
        device = next((t.device for t in (*tensors, *weights) if not t.is_meta), torch.get_default_device())
        mode = new_fake_mode()
        with torch.inference_mode(False), torch.no_grad():
            fakes = [_fake(mode, t, device) for t in (*tensors, *weights)]
            traced = _Traced()
            watch = AttributeWatch(self.module)
            try:
                with clean_caches(self.module):
                    capture = capture_run(
                        lambda *flat: self._traced_call(call, flat, len(tensors), state, traced),
                        fakes,
                        state.names,
                        mode,
                        argument_names(self.original, *call[:2]),
                    )
                known = {(id(table), name) for table, name in self._written}
                written = [(table, name) for table, name in watch.written() if (id(table), name) not in known]
            except Unknown as error:
                return f"forward returns or keeps a {error}, which a capture cannot take apart"
            except (*DATA_DEPENDENT, RuntimeError) as error:
                if not isinstance(error, DATA_DEPENDENT) and NO_NUMPY not in str(error):
                    raise
                self._leave_to_dynamo(error)
                return None
            finally:
                watch.restore()
            if written:
                self._programs.clear()
                self._written += written
                self._state = ModuleState(self.module, self._written)
                self._layout = layout_key(self._state.current())
                return None
            if capture.mutated and overlapping([*tensors, *weights]):
                return "an input that is written shares memory with another input"
            eager_layout.lay_out_weights(self.module, self.options)
            self._layout = layout_key(weights)
            lay_out_inputs(capture, [t.stride() for t in (*tensors, *weights)])
            for node, gone in zip(placeholders(capture.gm.graph)[len(tensors) :], absent, strict=True):
                if gone:
                    node.meta[ABSENT] = True
            report = GraphReport(self.name, "pvae.compile", str(self.options.pipeline))
            if self.options.shard == "auto":
                self.chosen[:] = self.chosen or [choose_sharding(capture, self.options, world_size())]
                self.options = self.chosen[0][0]
                self.ranks = ranks_of(self.options)
            report.notes += [f"shard=auto: {choice.reason}" for _, choice in self.chosen]
            if self.takes_pieces and self.ranks is not None and self.options.shard == "sequence":
                cuts = input_pieces(capture, tensors, self.options, self.ranks.mesh)
                if cuts:
                    return cuts
                before = {i for cuts in self._cuts.values() for i in cuts}
                names = [n.name for i, n in enumerate(placeholders(capture.gm.graph)) if i in before]
                report.notes += [f"cut before the graph: {', '.join(names)}"] if names else []
            constants = len(tensor_constants(capture.gm))
            if constants:
                report.notes.append(f"{constants} tensors made in forward are constants of the graph")
            REGISTRY.add(report, weights, None)
            result = frozenset(leaf.index for leaf in traced.result if isinstance(leaf, Out))
            effects = [leaf for _, template in traced.effects for leaf in _leaves(template)]
            free = frozenset(leaf.index for leaf in effects if isinstance(leaf, Out)) - result
            others = {
                leaf.index for i, leaf in enumerate(traced.result) if i not in traced.caches and isinstance(leaf, Out)
            }
            pieces = (_fake_piece(mode, t) for t in tensors)
            whole = [n.meta["val"] for n in placeholders(capture.gm.graph)]
            given = [w if p is None else p for w, p in zip(whole, (*pieces, *[None] * len(weights)), strict=True)]
            world = region_ranks(capture, self.options)
            with nullcontext() if self.ranks is not None or world is None else world.guarded(self.name):
                compiled = compile_capture(
                    capture,
                    given,
                    self.options,
                    report,
                    self.counter,
                    free_strides=free,
                    returned_caches=result - others,
                    ranks=self.ranks,
                    world=world,
                    observe=self.observe,
                )
        now = Signature.of(capture.gm.graph).outputs
        promised = [(i, capture.promised.outputs[i].stride()) for i in sorted(free | (result - others))]
        laid = tuple((i, strides) for i, strides in promised if not same_strides(now[i], strides))
        returns_inputs = any(isinstance(leaf, In) for leaf in (*traced.result, *effects))
        return Program(
            compiled, traced.result, traced.spec, tuple(traced.effects), returns_inputs, capture.mutated, laid, report
        )

    def _leave_to_dynamo(self, error: Exception) -> None:
        """Leave a forward that decides by a tensor's value to Dynamo, which breaks the graph there."""
        eager_layout.put_back(self.module)
        first = str(error).strip().splitlines()[0]
        complain(
            self.options,
            self.name,
            "forward decides by a tensor's value, which capture by running cannot follow; it is compiled as "
            f"torch.compile(model, backend='pvae') does, in several graphs ({first})",
        )
        names = [f.name for f in fields(self.options) if f.name not in ("regions", "main_rank")]
        options = {name: getattr(self.options, name) for name in names}
        self._by_dynamo = torch.compile(self.original, backend=functools.partial(pvae_backend, options=options))

    def _traced_call(
        self, call: Any, flat: Sequence[torch.Tensor], inputs: int, state: ModuleState, traced: _Traced
    ) -> list[Any]:
        """The module's forward on fakes; returns the graph's outputs and leaves in `traced` where they belong."""
        rebuild = Rebuilder(flat[:inputs])
        args, kwargs, held = rebuild(call)
        templates = Templates(flat[:inputs], rebuild.boxes)
        before = [templates.content(box) for box in rebuild.boxes]
        with state.replaced(flat[inputs:]):
            self._write_attributes(held)
            result = self.original(*args, **kwargs)
            held[:] = [table.get(name, Absent.ABSENT) for table, name in self._written]
        leaves, traced.spec = torch.utils._pytree.tree_flatten(result)
        traced.result = [templates.leaf(leaf) for leaf in leaves]
        traced.caches = returned_caches(self.original, result)
        after = [templates.content(box) for box in rebuild.boxes]
        traced.effects = [(i, a) for i, (a, b) in enumerate(zip(after, before, strict=True)) if a != b]
        return templates.outputs


def _fake(mode: FakeTensorMode, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The fake that a forward is traced with: in eager's strides, of a sharded tensor the whole one, of a weight that is
    absent one on `device`."""
    strides = eager_layout.eager_strides(tensor)
    if not isinstance(tensor, ShardedTensor) and not tensor.is_meta and tensor.stride() == strides:
        return static_fake(mode, tensor)
    with mode:
        where = device if tensor.is_meta else tensor.device
        return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=where)


def _fake_piece(mode: FakeTensorMode, tensor: torch.Tensor) -> ShardedTensor | None:
    """A sharded tensor with a fake piece, None for any other."""
    if not isinstance(tensor, ShardedTensor):
        return None
    return ShardedTensor(static_fake(mode, tensor.local), tensor.pieces, tensor.channels_last)


@dataclass
class _Traced:
    """What tracing learnt besides the graph: where each output goes."""

    result: list[Any] = field(default_factory=list)
    caches: frozenset[int] = frozenset()  # of result
    spec: Any = None
    effects: list[tuple[int, Any]] = field(default_factory=list)


def _leaves(template: Any) -> Iterator[Any]:
    if isinstance(template, (list, tuple)):
        for item in template:
            yield from _leaves(item)
    elif isinstance(template, dict):
        for item in template.values():
            yield from _leaves(item)
    else:
        yield template


def compile(model: nn.Module, **options: Any) -> nn.Module:
    """Compile `model` in place and return it: encoder and decoder of an autoencoder, blocks of a DiT, else the whole.

    Options are those of `pvae.Options`. Compiling again replaces the earlier choice. Where convolutions are to work
    channels_last the strides of their weights change in place, not their values, until `pvae.restore(model)`; results come
    in eager's strides. Each kind of call is captured when it first comes; module attributes are read at that time (after
    changing one, call `pvae.refresh(model)`).

    Raises OptionError or PipelineError for what it does not know; PvaeError where a forward cannot be captured.
    """
    return compile_with(model, parse_options(options))


def compile_with(model: nn.Module, options: Options) -> nn.Module:
    """`compile` with options that are already parsed; the environment is not read again."""
    if options.shard == "tile":
        asked = [n for n in ("mesh", "shard_dims", "gather", "regions") if getattr(options, n) != getattr(Options, n)]
        if asked:
            raise PvaeError(
                f"{', '.join(asked)}: shard='tile' spreads whole tiles over all ranks and gathers their results; "
                "shard='halo' and 'patch' take these options"
            )
    found = regions(model, options.regions)
    counter = RewriteCounter(options.rewrite_limit)
    restore(model)
    wrap_named(model, options.main_rank, options.timeout)
    blocks = options.shard in ("sequence", "auto") and found == repeated_blocks(model)
    inner = replace(options, gather="off") if blocks else options
    forwards = []
    for name, module in found.items():
        where = f"{type(model).__name__}.{name}" if name else type(model).__name__
        module.forward = CompiledForward(module, where, inner, counter, takes_pieces=blocks)
        forwards.append(module.forward)
    if blocks:
        for forward in forwards:
            forward.chosen = forwards[0].chosen
        if options.gather == "on":
            model.register_forward_hook(WholeResults(forwards[0]))
    if options.shard == "tile":
        ranks = ranks_of(options)
        assert ranks is not None
        checked = options.check_inputs == "on"
        install_tiles(model, found, ranks.mesh, options, seconds=options.timeout, check_values=checked)
    return model


def _is_own(forward: Callable[..., Any], module: nn.Module) -> bool:
    """Whether that is the forward of the module's class, and not one that was put in its place."""
    return getattr(forward, "__func__", None) is type(module).forward


def compiled_forwards(model: nn.Module) -> list[CompiledForward]:
    """The compiled regions of `model`."""
    found = [m.__dict__.get("forward") for m in model.modules()]
    return [f for f in found if isinstance(f, CompiledForward)]


def restore(model: nn.Module) -> nn.Module:
    """Undo `compile`: every region gets the forward that it had, and its weights the strides that they had."""
    remove_tiles(model)
    for key in [key for key, hook in model._forward_hooks.items() if isinstance(hook, WholeResults)]:
        del model._forward_hooks[key]
    for forward in compiled_forwards(model):
        module = forward.module
        if _is_own(forward.original, module):
            del module.__dict__["forward"]
        else:
            module.forward = forward.original
        eager_layout.put_back(module)
    unwrap(model)
    return model


def refresh(model: nn.Module) -> None:
    """Forget what was captured or prepared from `model`: call it after writing weights through `.data` under
    `weights="frozen"`, or after changing a plain attribute of a module."""
    frozen_weights.forget([*model.parameters(), *model.buffers()])
    tiles = tiles_of(model)
    if tiles is not None:
        tiles.planner.forget()
    for forward in compiled_forwards(model):
        forward.forget()
