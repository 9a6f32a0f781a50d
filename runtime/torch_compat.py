"""Every private name of torch that pvae uses, in one place, for torch 2.11 to 2.13."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import CodeType
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch._aot_autograd.functional_utils import from_fun, has_data_mutation, to_fun
from torch._guards import CompileContext, TracingContext, tracing
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    ShapeEnv,
    free_unbacked_symbols,
    statically_known_true,
)

__all__ = [
    "DATA_DEPENDENT",
    "CustomGraphPass",
    "FakeTensor",
    "FakeTensorMode",
    "argument_path",
    "autocast_enabled",
    "compile_fx",
    "conv_backend",
    "cpp_compiler",
    "current_frame",
    "default_store",
    "enable_python_dispatcher",
    "free_unbacked_symbols",
    "functional_graph",
    "group_devices",
    "inductor_cache_dir",
    "inductor_settings",
    "is_compiling",
    "new_fake_mode",
    "noting",
    "process_group",
    "side_effect_outputs",
    "static_fake",
    "statically_known_true",
    "traced_locals",
    "tracing_by_running",
    "wrapper_tensor",
]


DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
is_compiling = torch.compiler.is_compiling
autocast_enabled = torch._C._is_any_autocast_enabled


def default_store() -> torch.distributed.Store:
    """The default group's store, by a connection of our own: a client that waits blocks all who share it."""
    return torch.distributed.distributed_c10d._get_default_store().clone()


def process_group(name: str) -> torch.distributed.ProcessGroup:
    """The process group of that name, as functional collectives take it."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)


def group_devices(group: torch.distributed.ProcessGroup) -> list[str]:
    """The types of device whose tensors the group can move."""
    return [device.type for device in group._device_types]


def tracing_by_running() -> bool:
    """Whether `make_fx` traces what runs now (pvae.compile does, and torch.export)."""
    return get_proxy_mode() is not None


noting = fx_traceback.annotate  # `with noting({...})`: nodes traced inside have it in meta["custom"]; Dynamo knows it


def inductor_settings() -> str:
    """A key of what `torch._inductor.config` is set to now."""
    return torch._inductor.config.get_hash().hex()


def new_fake_mode() -> FakeTensorMode:
    """A mode whose tensors keep the sizes they are made with (`static_fake`); real tensors become constants."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def static_fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as a fake of `mode`: same sizes and strides, no data, no symbols. It may be a fake already."""
    if isinstance(tensor, FakeTensor) or tensor.is_inference():  # `from_tensor` fails on inference parameters
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return mode.from_tensor(tensor, static_shapes=True)


def conv_backend(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str:
    """The name of the implementation that ATen would choose for a convolution, such as `Mkldnn` or `Slow3d`."""
    sizes = None if bias is None else list(bias.shape)
    zeros = [0] * len(stride)
    found = torch._C._select_conv_backend(
        x, weight, bias, list(stride), list(padding), list(dilation), False, zeros, groups, sizes
    )
    return str(found).rpartition(".")[2]


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor would use on the CPU, or None if it finds none."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def inductor_cache_dir() -> str:
    """Where Inductor keeps compiled code on disk; the folder may not exist yet."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())


def current_frame() -> tuple[CodeType | None, int | None]:
    """Within a Dynamo backend: the code object being compiled and how often it was compiled before."""
    code = TracingContext.get_traced_code() if TracingContext.try_get() else None
    compile_id = CompileContext.current_compile_id()
    return (code[0] if code else None), (compile_id.frame_compile_id if compile_id else None)


def traced_locals() -> Mapping[str, Any]:
    """Within a Dynamo backend: the local variables with which the traced function was called; else none."""
    from torch._dynamo.symbolic_convert import tls  # slow to import

    tx = getattr(tls, "current_tx", None)
    return {} if tx is None else tx.f_locals


def argument_path(placeholder: torch.fx.Node) -> tuple[Any, ...] | None:
    """Where a placeholder of Dynamo's graph was among the arguments: the parameter, then the indexes and keys down to it.

    `("caches", 0)`. None for what is no argument or item of one: weights, attributes, sizes.
    """
    from torch._dynamo.source import ChainedSource, DictGetItemSource, GetItemSource, LocalSource  # slow to import

    source, keys = getattr(placeholder, "_dynamo_source", None), []
    while isinstance(source, ChainedSource):
        if not isinstance(source, (DictGetItemSource, GetItemSource)):
            return None
        keys.append(source.index)
        source = source.base
    return (source.local_name, *reversed(keys)) if isinstance(source, LocalSource) and source.is_input else None


def functional_graph(
    run: Callable[..., list[Any]], inputs: Sequence[Any], *, stack_traces: bool
) -> tuple[torch.fx.GraphModule, list[int]]:
    """Trace `run(*inputs)` to ATen before decomposition, with in-place writes turned into functional ones.

    `inputs` are fake tensors, SymInts or plain values; `run` returns a flat list. Returns the graph and the indexes of
    the inputs that `run` writes; the graph ends with one `copy_` to each of them.

    This is the tracing that `torch.export` does (pre-dispatch functionalization), by the parts it is made of, because
    export itself neither takes Dynamo's graph nor keeps SymInt inputs.
    """
    mutated: list[int] = []

    def functional(*args: Any) -> list[Any]:
        mode = FunctionalTensorMode(pre_dispatch=True, export=True)
        functionalize = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
        with torch._C._ExcludeDispatchKeyGuard(functionalize), mode:
            wrapped = [to_fun(a) if isinstance(a, torch.Tensor) else a for a in args]
            outputs = [from_fun(o) if isinstance(o, FunctionalTensor) else o for o in run(*wrapped)]
            for index, (plain, functional_arg) in enumerate(zip(args, wrapped, strict=True)):
                if isinstance(plain, torch.Tensor) and has_data_mutation(functional_arg):
                    mutated.append(index)
                    outputs.append(from_fun(functional_arg))
        return outputs

    with torch.no_grad(), fx_traceback.preserve_node_meta():
        graph_module = make_fx(
            functional, pre_dispatch=True, _allow_non_fake_inputs=True, record_stack_traces=stack_traces
        )(*inputs)
    return graph_module, mutated


def compile_fx(
    graph_module: torch.fx.GraphModule,
    inputs: Sequence[Any],
    config_patches: dict[str, Any],
    fake_mode: FakeTensorMode | None,
) -> Callable[..., Any]:
    """Inductor. `fake_mode` is given where there is no Dynamo around the call that has one.

    The result takes its inputs as one list, which it empties: an input that nobody else holds is freed when it was read
    for the last time (a causal decoder's old caches, while the new ones are made).
    """
    from torch._inductor.compile_fx import compile_fx as inductor  # slow to import, and not needed by engine="eager"

    read = {node.target for node in graph_module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in graph_module.named_buffers() if name not in read]:
        delattr(graph_module, name)  # AOTAutograd would take it for an input
    with tracing(TracingContext(fake_mode)) if fake_mode is not None else nullcontext():
        compiled = inductor(graph_module, inputs, config_patches=config_patches)
    taking_a_list = None if read else _taking_a_list(compiled)
    return (lambda inputs: compiled(*inputs)) if taking_a_list is None else taking_a_list


def _taking_a_list(compiled: Callable[..., Any]) -> Callable[[list[Any]], Any] | None:
    """The function of one list inside the one of many arguments, which AOTAutograd wraps around it.

    That wrapper holds on to its arguments; all it adds to them are the graph's own tensors (here there are none).
    """
    found: Any = compiled
    while found is not None:
        inner = getattr(found, "__wrapped__", None)
        if getattr(getattr(found, "__code__", None), "co_qualname", "") == "aot_module_simplified.<locals>.forward":
            return inner
        found = inner
    return None


def wrapper_tensor(cls: type, shape: Sequence[int], strides: Sequence[int], like: torch.Tensor) -> Any:
    """A `cls`, subclass of tensor, without memory of its own, with the dtype and device of `like`."""
    return torch.Tensor._make_wrapper_subclass(
        cls, tuple(shape), strides=tuple(strides), dtype=like.dtype, device=like.device, layout=like.layout
    )


def side_effect_outputs() -> frozenset[int] | None:
    """Within a Dynamo backend: the graph's outputs, by index, that are tensors and leave the function as side effects alone.

    Those are items of lists and dicts and attributes of objects that were there before the call. An output that is also
    returned, or alive after a graph break, is none of them. None where it cannot be told, and outside Dynamo.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator, tls  # slow to import
    from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting, VariableTracker

    tx: InstructionTranslator | None = getattr(tls, "current_tx", None)
    if tx is None:
        return None
    effects, reason = tx.output.side_effects, tx.output.compile_subgraph_reason
    if reason.graph_break and torch._dynamo.config.nested_graph_breaks:
        return None  # the frames below, which are alive as well, are not known here

    def reached(roots: list[VariableTracker]) -> set[torch.fx.Node]:
        """The nodes behind all variables that these are made of. `VariableTracker.visit` omits the keys of dicts and sets."""
        nodes: set[torch.fx.Node] = set()
        seen: dict[int, Any] = {}
        todo: list[Any] = [*roots]
        while todo:
            value = todo.pop()
            if isinstance(value, VariableTracker):
                value = value.unwrap()
            if id(value) in seen:
                continue
            seen[id(value)] = value
            if isinstance(value, VariableTracker):
                todo += [field for name, field in vars(value).items() if name not in value._nonvar_fields]
                todo += effects.store_attr_mutations.get(value, {}).values()
                if isinstance(proxy := getattr(value, "proxy", None), torch.fx.Proxy):
                    nodes.add(proxy.node)
            elif type(value).__module__.startswith("torch._dynamo.variables."):  # keys and views of dicts
                todo += vars(value).values()
            elif type(value) in (dict, OrderedDict):
                todo += [*value.keys(), *value.values()]
            elif type(value) in (list, tuple, set):
                todo += value
        return nodes

    alive = [v for name, v in tx.symbolic_locals.items() if getattr(v.source, "local_name", None) != name]
    existing = (AttributeMutationExisting, ValueMutationExisting)
    returned = reached([*tx.stack, *alive])
    written = reached([v for v in effects._get_modified_vars() if isinstance(v.mutation_type, existing)])
    (output,) = tx.output.graph.find_nodes(op="output")
    nodes = [(i, node) for i, node in enumerate(output.args[0]) if isinstance(node, torch.fx.Node)]
    tensors = [(i, node) for i, node in nodes if isinstance(node.meta.get("example_value"), torch.Tensor)]
    if not all(node in returned or node in written for _, node in tensors):
        return None
    return frozenset(i for i, node in tensors if node not in returned)
