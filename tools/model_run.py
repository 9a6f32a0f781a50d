"""From what a person asked for to a model, loaded and compiled: what every command of the CLI starts with.

A model is loaded either with values (`Request.load`) or as shapes alone (`Request.shapes`). Shapes are all that passes
look at, so a published model can be explained, dumped and diffed for a GPU in seconds on a machine that has none.
"""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from pvae.backend import REGISTRY
from pvae.module import compile_with, compiled_forwards
from pvae.options import Options
from pvae.passes import dump
from pvae.report import GraphReport
from pvae.runtime.torch_compat import DATA_DEPENDENT, FakeTensorMode, cpp_compiler
from pvae.tools.zoo import Case, load

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp64": "float64"}


class RequestError(ValueError):
    """What was asked for does not exist or cannot be had here; the message names what can."""


def one_of(what: str, text: str, valid: Mapping[str, Any] | tuple[str, ...]) -> str:
    """`text` if it is valid, else RequestError with the nearest value."""
    if text not in valid:
        near = difflib.get_close_matches(text, valid, 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise RequestError(f"{what} {text!r} does not exist{hint} Valid: {', '.join(valid)}")
    return text


def dtype_named(text: str) -> torch.dtype:
    return DTYPES[one_of("--dtype", _SHORT.get(text, text), DTYPES)]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def size_named(text: str) -> tuple[int, ...]:
    """`9x64x96` -> (9, 64, 96): frames, height and width in pixels, or height and width."""
    parts = text.split("x")
    if not all(p.isdecimal() for p in parts) or len(parts) not in (2, 3):
        raise RequestError(f"--size {text!r} is not written FRAMESxHEIGHTxWIDTH or HEIGHTxWIDTH, such as 9x64x96")
    return tuple(map(int, parts))


def options_named(pairs: list[str], flags: Mapping[str, str | None]) -> dict[str, str]:
    """`KEY=VALUE` texts and dedicated flags as one table; RequestError where the two disagree."""
    given: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise RequestError(f"--option {pair!r} is not written KEY=VALUE, such as conv3d=unfold2d")
        given[key.strip()] = value.strip()
    for key, flag in flags.items():
        if flag is None:
            continue
        if given.get(key, flag) != flag:
            raise RequestError(f"{key} is given twice: --option {key}={given[key]} and --{key} {flag}")
        given[key] = flag
    return given


def is_factory(model: str) -> bool:
    return ":" in model and not model.startswith("diffusers:")


@dataclass(frozen=True)
class Request:
    """A model and how to build it. `part` is the model's first one if None.

    `device` is `auto` (a GPU if there is one) or a torch device.
    """

    model: str
    part: str | None = None
    preset: str = "tiny"
    dtype: torch.dtype = torch.float32
    device: str = "auto"
    size: tuple[int, ...] | None = None
    seed: int = 0
    options: Options = field(default_factory=Options)

    @property
    def torch_device(self) -> torch.device:
        text = self.device
        if text == "auto":
            text = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            return torch.device(text)
        except RuntimeError as error:
            raise RequestError(f"--device {text!r} does not exist; valid: auto, cpu, cuda, cuda:0, ...") from error

    def to_dict(self) -> dict[str, Any]:
        """As JSON; of the options only those that differ from the defaults."""
        plain = asdict(self) | {"dtype": dtype_name(self.dtype), "device": str(self.torch_device)}
        default = asdict(Options())
        return plain | {"options": {k: v for k, v in asdict(self.options).items() if v != default[k]}}

    def _case(self, device: torch.device) -> Case:
        if is_factory(self.model) and "" not in sys.path:
            sys.path.append("")  # a person's own module lies where they stand
        try:
            return load(
                self.model,
                preset=self.preset,
                part=self.part,
                dtype=self.dtype,
                device=device,
                seed=self.seed,
                size=self.size,
            )
        except (ValueError, TypeError, ModuleNotFoundError) as error:
            raise RequestError(str(error)) from error

    def load(self) -> Case:
        """The model and its inputs with their values. RequestError also where the device or a compiler is missing;
        the zoo's `Unsupported` where torch lacks an op."""
        device = self.torch_device
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RequestError(f"--device {device}: torch sees no GPU here (explain, dump and diff do without one)")
        if device.type == "cpu" and self.options.engine == "inductor" and cpp_compiler() is None:
            raise RequestError("engine=inductor needs a C++ compiler on the CPU (see pvae doctor); or --engine eager")
        return self._case(device)

    def shapes(self) -> tuple[Case, FakeTensorMode]:
        """The model and its inputs as fake tensors on the device, which need not be here; run it in the mode."""
        case = self._case(torch.device("meta"))
        mode, device = FakeTensorMode(allow_non_fake_inputs=True), self.torch_device
        known: dict[
            int, tuple[Any, torch.Tensor]
        ] = {}  # tied weights stay tied; holding the old one keeps its id taken

        def fake(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) not in known:
                with mode:
                    new = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
                known[id(value)] = value, nn.Parameter(new, False) if isinstance(value, nn.Parameter) else new
            return known[id(value)][1]

        for module in case.model.modules():
            for table in (module._parameters, module._buffers, module.__dict__):
                for name, value in table.items():
                    table[name] = fake(value)
        inputs, kwargs = torch.utils._pytree.tree_map(fake, (case.inputs, dict(case.kwargs)))
        return replace(case, inputs=inputs, kwargs=kwargs), mode


@dataclass(frozen=True)
class Stage:
    """A graph after one pass (stage 0: as captured): its text, its convolutions, and whether it differs from before."""

    index: int
    name: str
    text: str
    forms: Counter[str]
    changed: bool


@dataclass
class Trace:
    """One graph on its way through the pipeline, and the report about it once it is compiled."""

    name: str
    stages: list[Stage] = field(default_factory=list)
    report: GraphReport | None = None

    def stage(self, name: str | None) -> Stage:
        """The last stage called `name`; None: the final one. RequestError lists those there are."""
        if name is None:
            return self.stages[-1]
        found = [s for s in self.stages if s.name == name]
        if not found:
            one_of("stage", name, tuple(s.name for s in self.stages))
        return found[-1]


def _forms(graph: Graph) -> Counter[str]:
    """How often each kind of convolution, and `linear`, stands in the graph."""
    names = [str(n.target).removeprefix("aten.").split(".") for n in graph.nodes if n.op == "call_function"]
    kinds = [name[1] if name[0] == "pvae" else name[0] for name in names]
    return Counter(kind for kind in kinds if kind.startswith(("conv1d", "conv2d", "conv3d", "conv_trans", "linear")))


def compile_traced(case: Case, options: Options, *, strides: bool = False) -> list[Trace]:
    """Compile the case's model in place. The list fills with a Trace a graph while the model runs."""
    compile_with(case.model, options)
    traces: list[Trace] = []
    for forward in compiled_forwards(case.model):

        def observe(stage: str, gm: GraphModule, name: str = forward.name) -> None:
            if stage == "captured":
                traces.append(Trace(name))
            stages = traces[-1].stages
            text = dump.text(gm.graph, strides=strides)
            changed = not stages or stages[-1].text != text
            stages.append(Stage(len(stages), stage, text, _forms(gm.graph), changed))

        forward.observe = observe
    return traces


def attach_reports(case: Case, traces: list[Trace]) -> list[Trace]:
    """Give each trace the report of its graph; both come in the order of capture."""
    reports = sorted((p.report for f in compiled_forwards(case.model) for p in f.programs), key=REGISTRY.index)
    for trace, report in zip(traces, reports, strict=True):
        trace.report = report
    return traces


@contextmanager
def shapes_only(request: Request) -> Iterator[None]:
    """Turns what running a model on fake tensors can raise into a RequestError that says what would work."""
    try:
        yield
    except DATA_DEPENDENT as error:
        raise RequestError(
            f"{request.model} decides by a tensor's value outside of what pvae compiles, "
            f"so shapes alone do not tell what runs: {error}"
        ) from error
    except RuntimeError as error:
        if "not linked with support for" not in str(error):
            raise
        raise RequestError(
            f"--device {request.torch_device}: this build of torch ({torch.__version__}) knows no such device; "
            "a CUDA build is needed, though no GPU; or --device cpu"
        ) from error


def trace_shapes(request: Request, *, strides: bool = False) -> list[Trace]:
    """What the pipeline does to every graph of the requested model, by shapes alone: no value is computed."""
    with shapes_only(request):
        case, mode = request.shapes()
        options = replace(request.options, engine="eager", strict="on")  # what no shape can tell is an error here
        traces = compile_traced(case, options, strides=strides)
        with mode:
            case.run()
    return attach_reports(case, traces)
