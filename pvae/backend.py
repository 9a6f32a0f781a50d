"""The backend: a graph and its inputs in, a callable out. Both entrances, Dynamo's and capture by running, meet here."""

from __future__ import annotations

import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import CodeType
from typing import Any

import torch
from torch.fx import GraphModule, Node

from pvae.auto_shard import choose_sharding
from pvae.cache_key import KeyPass
from pvae.capture import Capture, capture_graph, tensor_constants
from pvae.options import OptionError, Options, parse_options
from pvae.passes import dump
from pvae.passes.ir import ConvNode, output_node, placeholders
from pvae.passes.pipeline import Observer, run_pipeline
from pvae.passes.prepare_weights import split_weight_work
from pvae.passes.rule import Context, RewriteCounter
from pvae.passes.shard import NO_PICTURE, collectives
from pvae.passes.shard_choice import Choice
from pvae.ranks import Ranks, ShardedGraph, ranks_of, world_size
from pvae.report import GraphReport, Registry
from pvae.runtime.frozen_weights import FrozenWeights
from pvae.runtime.sharded_tensor import ShardedTensor
from pvae.runtime.torch_compat import compile_fx, current_frame, inductor_settings, side_effect_outputs

REGISTRY = Registry()
_COUNTERS: dict[int | None, RewriteCounter] = {}
_SHARED: dict[str, tuple[Callable[..., Any], GraphReport]] = {}
_CHOSEN: dict[CodeType | None, tuple[Options, Choice]] = {}
_SAID: set[tuple[str, str]] = set()


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
    """Forget every report, shared compile and rewrite count of this process."""
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
    storages = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
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
            "use pvae.compile(vae, shard='tile'); torch.compile takes shard='halo', 'patch' and 'auto'"
        )
    reason = _untouched_because(gm, inputs)
    capture = None
    if reason is None:
        sharded = parsed.shard != "none" and world_size() > 1
        capture = capture_graph(gm, inputs, static=sharded)
        if capture.mutated and overlapping(inputs):
            reason = "an input that is written shares memory with another input"
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
        ranks = ranks_of(parsed)
        caches = side_effect_outputs() if ranks is not None else None
        with nullcontext() if ranks is None else ranks.guarded(name):
            compiled = compile_capture(
                capture,
                _fake_pieces(gm, inputs),
                parsed,
                report,
                counter,
                inside_dynamo=True,
                free_strides=caches or frozenset(),
                ranks=ranks,
            )
        return _unboxed(compiled)
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        if notes:  # Dynamo reports an error's message and drops its notes
            raise PvaeError(f"{type(error).__name__}: {error}; {'; '.join(notes)}") from error
        raise


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
    ranks: Ranks | None = None,
    observe: Observer | None = None,
) -> Callable[[list[Any]], Any]:
    """Run the pipeline on a captured graph and hand it to the engine. `inputs` match the graph's placeholders.

    The result takes its inputs as one list, and empties it.

    `ranks` are those that the options' `shard` is about. Inputs may then be `ShardedTensor`s, and outputs in `free_strides`
    come back as such.

    `free_strides` are outputs that only compiled code will read again, so that their memory layout is ours to choose.
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
    mesh = None if ranks is None else ranks.mesh
    context = Context(options, capture.weights, free_strides, counter, mesh, held)
    report.passes = run_pipeline(gm, options.pipeline, context, check=options.verify == "on", observe=observe)
    report.nodes_after, report.pass_seconds = len(gm.graph.nodes), time.perf_counter() - start
    if ranks is not None and any(r.note == NO_PICTURE for p in report.passes for r in p.refusals):
        complain(
            options,
            report.name,
            f"shard={options.shard!r} splits pictures, and {NO_PICTURE}: every rank computes it all",
        )
    for pass_name, expected in options.expect.items():
        if report.matches(pass_name) < expected:
            raise PvaeError(
                f"{report.name}: pass {pass_name!r} was expected to match {expected} times and matched "
                f"{report.matches(pass_name)} times; see pvae explain for what it refused"
            )
    if held:
        inputs = [n.meta["val"] if n.name in held else i for n, i in zip(nodes, inputs, strict=True)]

    def sharded(run: Callable[..., Any]) -> Callable[..., Any]:
        if ranks is None:
            return run
        weights = [n.name in capture.weights for n in nodes]
        checked = options.check_inputs == "on"
        return ShardedGraph(report.name, run, ranks, context.left, tuple(collectives(gm.graph)), weights, checked)

    key = None
    if not inside_dynamo and not tensor_constants(gm):
        text = options.key() + inductor_settings() + dump.text(gm.graph, strides=True, source=False)
        key = hashlib.sha256(text.encode()).hexdigest()
        if key in _SHARED:
            compiled, first = _SHARED[key]
            report.shared_with = REGISTRY.index(first)
            return sharded(compiled)
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
    return sharded(compiled)


def _engine(gm: GraphModule, inputs: Sequence[Any], options: Options, fake_mode: Any) -> Callable[[list[Any]], Any]:
    if options.engine == "eager":
        return _interpreter(gm)
    current = torch._inductor.config.post_grad_custom_post_pass
    patches: dict[str, Any] = {"post_grad_custom_post_pass": KeyPass(options.key(), current)}
    if any(map(_convolves_fp32_on_cpu, gm.graph.nodes)):
        # Inductor would make these channels_last, which oneDNN sums three times less exactly (conv3d_unfold.py).
        patches["layout_optimization"] = False
    return compile_fx(gm, inputs, patches, fake_mode)


def _convolves_fp32_on_cpu(node: Node) -> bool:
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor) or val.device.type != "cpu" or val.dtype is not torch.float32:
        return False
    return ConvNode.of(node) is not None


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
        return tuple(o if s is None else _in_strides(o, s) for o, s in zip(outputs, strides, strict=True))

    return run


def _in_strides(tensor: torch.Tensor, strides: tuple[Any, ...]) -> torch.Tensor:
    symbolic = not all(isinstance(s, int) for s in strides)
    if symbolic or all(n == 1 or a == b for n, a, b in zip(tensor.shape, tensor.stride(), strides, strict=True)):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


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
