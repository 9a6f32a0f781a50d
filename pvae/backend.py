"""The backend: a graph and its inputs in, a callable out. Both entrances, Dynamo's and capture by running, meet here."""

from __future__ import annotations

import difflib
import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import CodeType
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from pvae.auto_shard import choose_sharding
from pvae.cache_key import KeyPass
from pvae.capture import Capture, capture_graph, tensor_constants
from pvae.options import OptionError, Options, parse_options
from pvae.passes import dump
from pvae.passes.ir import ConvNode, known, output_node, placeholders, value
from pvae.passes.main_rank import MAIN_RANK, has_regions, mark_modules
from pvae.passes.output_layout import in_strides
from pvae.passes.pipeline import Observer, run_pipeline
from pvae.passes.prepare_weights import split_weight_work
from pvae.passes.rule import Context, RewriteCounter
from pvae.passes.sequence import NO_TOKENS
from pvae.passes.shard import NO_PICTURE, collectives
from pvae.passes.shard_choice import Choice
from pvae.passes.tuning_store import store_path
from pvae.ranks import Ranks, ShardedGraph, all_ranks, ranks_of, stated, world_size
from pvae.report import GraphReport, Registry
from pvae.runtime.cuda_graph import CudaGraphed, release_all
from pvae.runtime.exchange import exchange
from pvae.runtime.frozen_weights import FrozenWeights
from pvae.runtime.sharded_tensor import ShardedTensor
from pvae.runtime.torch_compat import compile_fx, current_frame, inductor_settings, side_effect_outputs

WAIT_LATE = "sink_waits_iterative"  # Inductor's name for it
REGISTRY = Registry()
_COUNTERS: dict[int | None, RewriteCounter] = {}
_SHARED: dict[str, tuple[Callable[..., Any], GraphReport]] = {}
_CHOSEN: dict[CodeType | None, tuple[Options, Choice]] = {}
_SAID: set[tuple[str, str]] = set()
ABSENT = "absent"  # in the meta of a placeholder: a weight that this rank does not have


class PvaeWarning(UserWarning):
    """pvae did less than was asked, and says what and why."""


class PvaeError(RuntimeError):
    """pvae cannot do what was asked; the message says what would work."""


def complain(options: Options, where: str, text: str) -> None:
    """One warning for each place and text; with strict=on an error."""
    if options.strict == "on":
        raise PvaeError(f"{where}: {text}")
    if (where, text) not in _SAID:
        _SAID.add((where, text))
        warnings.warn(f"pvae: {where}: {text}", PvaeWarning, stacklevel=3)


def reset() -> None:
    """Forget every report, shared compile, rewrite count and CUDA graph of this process.

    With `cudagraphs` on several ranks call it before `torch.distributed.destroy_process_group()`, which waits for graphs.
    """
    release_all()
    REGISTRY.clear()
    _COUNTERS.clear()
    _SHARED.clear()
    _CHOSEN.clear()
    _SAID.clear()


def _process_counter(limit: int | None) -> RewriteCounter:
    """Graphs that Dynamo brings are numbered on through the process: no one says where a model begins."""
    return _COUNTERS.setdefault(limit, RewriteCounter(limit))


def _name(code: CodeType | None) -> str:
    return f"{code.co_qualname} ({code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno})" if code else "graph"


def _untouched_because(gm: GraphModule, inputs: Sequence[Any]) -> str | None:
    """Why Dynamo's graph must be handed to Inductor as it is, or None."""
    tensors = [i for i in inputs if isinstance(i, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "grad mode is on and an input requires grad; the passes are for inference (use torch.no_grad())"
    devices = {t.device.type for t in tensors}
    if any(torch.is_autocast_enabled(d) for d in devices if d != "meta"):
        return "autocast is on; cast the model and its inputs instead"
    if any(getattr(n.target, "__name__", "") == "_enter_autocast" for n in gm.graph.nodes):
        return "the model enters autocast; cast it and its inputs instead"
    if "meta" in devices:
        return "an input or weight is on the meta device and has no values; load the weights first"
    return None


def overlapping(inputs: Sequence[Any]) -> bool:
    """Whether two of the tensors share memory."""
    tensors = [i.local if isinstance(i, ShardedTensor) else i for i in inputs if isinstance(i, torch.Tensor)]
    storages = [t.untyped_storage().data_ptr() for t in tensors if t.numel() and not t.is_meta]
    return len(set(storages)) < len(storages)


def pvae_backend(
    gm: GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """What `torch.compile(model, backend="pvae", options={...})` calls for each graph.

    Raises OptionError or PipelineError for unknown options, values and passes. A graph that pvae must not touch goes to
    the engine as it is, with one PvaeWarning that says why.
    """
    parsed = parse_options(options)
    code, _ = current_frame()
    name = _name(code)
    watch_dynamo()
    if parsed.shard == "tile":
        raise PvaeError(
            "shard='tile' spreads the model's own tiles, which one compiled graph does not know: "
            "use pvae.compile(vae, shard='tile'); torch.compile takes shard='halo', 'patch', 'sequence' and 'auto'"
        )
    if (options or {}).get("regions", "auto") != "auto":
        raise PvaeError(
            f"regions={parsed.regions!r} is for pvae.compile(model); for torch.compile say it by what is compiled: the model, "
            "or its blocks by model.compile_repeated_blocks(backend='pvae', options=...)"
        )
    reason = _untouched_because(gm, inputs)
    capture = None
    owned = _mark_regions(gm, parsed)
    if reason is None:
        sharded = parsed.shard != "none" and world_size() > 1
        capture = capture_graph(gm, inputs, static=sharded or owned)
        if capture.mutated and overlapping(inputs):
            reason = "an input that is written shares memory with another input"
    if reason is not None and owned:
        raise PvaeError(f"{name}: a main-rank region needs pvae's passes, which must not touch this graph: {reason}")
    if reason is not None or capture is None:
        complain(parsed, name, f"handed on untouched: {reason}")
        REGISTRY.add(GraphReport(name, "torch.compile", "", notes=[f"untouched: {reason}"]), _weights(inputs), code)
        # Not traced anew, so there are no strides to keep: Dynamo's graph is what eager runs.
        return torch.fx.Interpreter(gm).run if parsed.engine == "eager" else _unboxed(_engine(gm, inputs, parsed, None))
    report = GraphReport(name, "torch.compile", str(parsed.pipeline), notes=[])
    REGISTRY.add(report, _weights(inputs), code)
    counter = _process_counter(parsed.rewrite_limit)
    try:
        if parsed.shard == "auto":
            parsed = _chosen_for(code, capture, parsed, report)
        ranks, world = ranks_of(parsed), region_ranks(capture, parsed)
        together = ranks or world
        caches = side_effect_outputs() if ranks is not None else None
        with nullcontext() if together is None else together.guarded(name):
            compiled = compile_capture(
                capture,
                _fake_pieces(gm, inputs),
                parsed,
                report,
                counter,
                inside_dynamo=True,
                free_strides=caches or frozenset(),
                ranks=ranks,
                world=world,
            )
        return _unboxed(compiled)
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        if notes:  # Dynamo reports an error's message and drops its notes
            raise PvaeError(f"{type(error).__name__}: {error}; {'; '.join(notes)}") from error
        raise


def _mark_regions(gm: GraphModule, options: Options) -> bool:
    """Mark what the option `main_rank` names; whether the graph has a region that is for one of several ranks."""
    if not (options.main_rank or has_regions(gm.graph)) or world_size() == 1:
        return False
    missing, known = mark_modules(gm.graph, options.main_rank)
    if missing:
        near = [n for m in missing for n in difflib.get_close_matches(m, known, 3)]
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
        raise PvaeError(
            f"main_rank: no node of this graph is of a submodule called {' or '.join(map(repr, missing))}{hint} Methods, "
            "and models that Dynamo cuts into several graphs: pvae.compile(model, main_rank=[...]), or "
            "pvae.main_rank(function or module) before torch.compile"
        )
    return has_regions(gm.graph)


def region_ranks(capture: Capture, options: Options) -> Ranks | None:
    """All ranks in a line, if the graph has main-rank regions and there are several ranks; all of them must call it."""
    if not has_regions(capture.gm.graph) or world_size() == 1:
        return None
    if options.shard == "tile":
        raise PvaeError(
            "a main-rank region inside what shard='tile' calls tile by tile, on each rank as often as it has tiles: give "
            "what is outside of encoder and decoder to rank 0, or use shard='halo'"
        )
    if not any(step.pass_ is MAIN_RANK for step in options.pipeline.steps):
        raise PvaeError(f"the graph has main-rank regions, and its pipeline no pass main_rank: {options.pipeline}")
    return all_ranks(options.timeout)


def _fake_pieces(gm: GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """The inputs, with the fakes that Dynamo made of `ShardedTensor`s in place of these."""
    examples = [n.meta.get("example_value") for n in placeholders(gm.graph)]
    return [e if isinstance(e, ShardedTensor) else i for e, i in zip(examples, inputs, strict=True)]


def _chosen_for(code: CodeType | None, capture: Capture, options: Options, report: GraphReport) -> Options:
    """What `shard="auto"` comes to, decided once for all graphs of a function: caches go from one to the other."""
    if code not in _CHOSEN:
        _CHOSEN[code] = choose_sharding(capture, options, world_size())
    chosen, choice = _CHOSEN[code]
    report.notes.append(f"shard=auto: {choice.reason}")
    return chosen


def _unboxed(run: Callable[[list[Any]], Any]) -> Callable[..., Any]:
    return lambda *inputs: run(list(inputs))


def _weights(inputs: Sequence[Any]) -> list[torch.Tensor]:
    return [i for i in inputs if isinstance(i, torch.nn.Parameter)]


def compile_capture(
    capture: Capture,
    inputs: Sequence[Any],
    options: Options,
    report: GraphReport,
    counter: RewriteCounter,
    *,
    inside_dynamo: bool = False,
    free_strides: frozenset[int] = frozenset(),
    returned_caches: frozenset[int] = frozenset(),
    ranks: Ranks | None = None,
    world: Ranks | None = None,
    observe: Observer | None = None,
) -> Callable[[list[Any]], Any]:
    """Run the pipeline on a captured graph and hand it to the engine. `inputs` match the graph's placeholders.

    The result takes its inputs as one list, and empties it.

    `ranks` are those that the options' `shard` is about. Inputs may then be `ShardedTensor`s, and outputs in `free_strides`
    come back as such. `world` are all ranks, where the graph has main-rank regions (`region_ranks`).

    `free_strides` are outputs that only compiled code will read again, so that their memory layout is ours to choose;
    `returned_caches` those that the caller hands back in the next call, which may stay channels_last.
    Outside Dynamo, equal rewritten graphs share one compiled function (layers of one class differ in weights only).
    """
    gm = capture.gm
    start = time.perf_counter()
    report.capture_seconds, report.nodes_before = capture.seconds, len(gm.graph.nodes)
    nodes = placeholders(gm.graph)
    held = {n.name: i.pieces for n, i in zip(nodes, inputs, strict=True) if isinstance(i, ShardedTensor)}
    for node, given in zip(nodes, inputs, strict=True):
        if isinstance(given, ShardedTensor):
            node.meta["local"] = given.local
    told = [stated(i) for i in inputs]
    mesh = None if ranks is None else ranks.mesh
    line = None if world is None else world.mesh
    context = Context(
        options,
        capture.weights,
        free_strides,
        counter,
        mesh,
        held,
        arguments=capture.arguments,
        world=line,
        returned_caches=returned_caches,
    )
    report.passes = run_pipeline(
        gm, options.pipeline, context, check=options.verify == "on", observe=observe, promised=capture.promised
    )
    report.nodes_after, report.pass_seconds = len(gm.graph.nodes), time.perf_counter() - start
    absent = [n.name for n in nodes if ABSENT in n.meta and n.users]
    if absent:
        raise PvaeError(
            f"{report.name}: {len(absent)} weights are on the meta device and have no values, such as {absent[0]}, and are "
            "read on this rank, outside of main-rank regions or on rank 0; load them first"
        )
    if options.cudagraphs == "on":
        _check_cuda_graph(capture, inputs, report.name)
    store = store_path(options.tuning_store) if options.tuning_store else None
    if store is not None and not store.exists():
        text = f"tuning_store={options.tuning_store}: there is no such file, and nothing is read; `pvae tune` writes it"
        complain(options, report.name, text)
    nothing = {NO_PICTURE: "pictures", NO_TOKENS: "tokens"}
    for note in {r.note for p in report.passes for r in p.refusals if ranks is not None and r.note in nothing}:
        text = f"shard={options.shard!r} splits {nothing[note]}, and {note}: every rank computes it all"
        complain(options, report.name, text)
    for pass_name, expected in options.expect.items():
        if report.matches(pass_name) < expected:
            gone = all(step.pass_.name != pass_name for step in options.pipeline.steps)
            why = "it is not in the pipeline (passes, disable)" if gone else "see pvae explain for what it refused"
            raise PvaeError(
                f"{report.name}: pass {pass_name!r} was expected to match {expected} times and matched "
                f"{report.matches(pass_name)} times; {why}"
            )
    if held:
        inputs = [n.meta["val"] if n.name in held else i for n, i in zip(nodes, inputs, strict=True)]

    def finished(run: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        if options.cudagraphs == "on":
            weights = [n.name in capture.weights for n in nodes]
            run = CudaGraphed(run, weights, frozen=options.weights == "frozen")
        together = ranks or world
        if together is None:
            return run
        given = {i: told[i] for i, n in enumerate(nodes) if n.name not in capture.weights}
        checked = options.check_inputs == "on"
        return ShardedGraph(report.name, run, together, context.left, tuple(collectives(gm.graph)), given, checked)

    key = None
    if not inside_dynamo and not tensor_constants(gm):
        text = options.key() + inductor_settings() + dump.text(gm.graph, strides=True, source=False)
        key = hashlib.sha256(text.encode()).hexdigest()
        if key in _SHARED:
            compiled, first = _SHARED[key]
            report.shared_with = REGISTRY.index(first)
            return finished(compiled)
    names = [n.name for n in placeholders(gm.graph)]
    frozen = split_weight_work(gm, capture.weights) if options.weights == "frozen" else None
    if frozen is None:
        compiled = _engine(gm, inputs, options, None if inside_dynamo else capture.fake_mode)
    else:
        prepare, indexes = frozen
        extra = [n.meta["val"] for n in placeholders(gm.graph)[len(names) :]]
        main = _engine(gm, [*inputs, *extra], options, None if inside_dynamo else capture.fake_mode)
        compiled = FrozenWeights(main, torch.fx.Interpreter(prepare).run, indexes)
    if key is not None:
        _SHARED[key] = (compiled, report)
    return finished(compiled)


def _check_cuda_graph(capture: Capture, inputs: Sequence[Any], name: str) -> None:
    """Raises PvaeError where `cudagraphs` cannot be honoured."""
    reason = None
    if capture.mutated:
        reason = "the graph writes its inputs, which a replay would do to copies"
    elif any(not isinstance(i, (torch.Tensor, int, float, bool)) for i in inputs):
        reason = "sizes are symbolic; compile with dynamic=False"
    elif not all(i.device.type == "cuda" for i in inputs if isinstance(i, torch.Tensor)):
        reason = "an input or weight is not on a GPU; move it there"
    if reason is not None:
        raise PvaeError(f"{name}: cudagraphs=on is not possible: {reason}")


def _engine(gm: GraphModule, inputs: Sequence[Any], options: Options, fake_mode: Any) -> Callable[[list[Any]], Any]:
    if options.engine == "eager":
        return _interpreter(gm)
    current = torch._inductor.config.post_grad_custom_post_pass
    patches: dict[str, Any] = {"post_grad_custom_post_pass": KeyPass(options.key(), current)}
    if any(node.target is exchange for node in gm.graph.nodes):  # waited for where its result is read
        patches |= {"reorder_for_compute_comm_overlap": True, "reorder_for_compute_comm_overlap_passes": [WAIT_LATE]}
    if _convolves_contiguous(gm.graph):
        patches["layout_optimization"] = False
    return compile_fx(gm, inputs, patches, fake_mode)


def _convolves_contiguous(graph: Graph) -> bool:
    """Whether most fp32 convolutions on the CPU are contiguous, which Inductor's layout optimization would change.

    Inductor would make them all channels_last, which oneDNN sums three times less exactly (conv3d_unfold.py). Where the
    model itself has channels innermost (AutoencoderDC: 27 of 28), oneDNN does so in any case, and without the optimization
    weights and activations are re-laid back and forth (0.89 of Inductor's speed).
    """
    convolutions = [(conv.ndim, value(conv.node)) for conv in map(ConvNode.of, graph.nodes) if conv is not None]
    fp32 = [(ndim, y) for ndim, y in convolutions if y.device.type == "cpu" and y.dtype is torch.float32]
    innermost = sum(known(y.stride(-1 - ndim) == 1) for ndim, y in fp32)  # channels
    return 2 * innermost < len(fp32)


def _interpreter(gm: GraphModule) -> Callable[[list[Any]], Any]:
    """Run `gm` node by node, with outputs in the strides that the graph states, as Inductor would return them.

    Fake tensors and ATen's kernels do not always agree on strides (`cat` of mixed layouts is one), and a cache that came
    back in another layout would be another kind of call.
    """
    leaves = torch.utils._pytree.tree_leaves(output_node(gm.graph).args)
    stated = [n.meta["val"] if isinstance(n, Node) and n.op == "call_function" else None for n in leaves]
    strides = [s.stride() if isinstance(s, torch.Tensor) else None for s in stated]

    def run(inputs: list[Any]) -> tuple[Any, ...]:
        outputs = torch.fx.Interpreter(gm).boxed_run(inputs)
        return tuple(o if s is None else in_strides(o, s) for o, s in zip(outputs, strides, strict=True))

    return run


class _DynamoWatch(logging.Handler):
    """Hears Dynamo say that it gives up on a function, which it tells nobody else, and says what would work."""

    def emit(self, record: logging.LogRecord) -> None:
        if not str(record.msg).startswith("torch._dynamo hit config.") or not isinstance(record.args, tuple):
            return
        limit, value, function = record.args[:3]
        for code in REGISTRY.codes():
            if f"'{code.co_name}' ({code.co_filename}:{code.co_firstlineno})" == function:
                text = (
                    f"Dynamo gave up after {value} compiles ({limit}): further kinds of call run eagerly. "
                    f"pvae.compile(model) captures each kind of call as one graph instead"
                )
                REGISTRY.note(code, f"{_name(code)}: {text}")
                complain(parse_options({"strict": "off"}, {}), _name(code), text)
                return


_WATCH = _DynamoWatch()


def watch_dynamo() -> None:
    """Listen to Dynamo's log once; idempotent."""
    logger = logging.getLogger("torch._dynamo.convert_frame")
    if _WATCH not in logger.handlers:
        logger.addHandler(_WATCH)


__all__ = ["OptionError", "PvaeError", "PvaeWarning", "compile_capture", "pvae_backend", "reset"]
