"""The options of the backend, where they come from and what they may be. The one place that reads PVAE_* variables."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pvae.passes.machine import machine_named
from pvae.passes.pipeline import Pipeline, pass_named

PREFIX = "PVAE_"


class OptionError(ValueError):
    """An unknown option, or a value that an option does not take; the message lists what is valid."""


@dataclass(frozen=True)
class Options:
    """What a user may ask of pvae; each is also an environment variable `PVAE_<NAME>`, which wins over the code.

    conv3d         form of convolutions: auto (by what was measured), native, channels_last, unfold2d, taps (`conv_taps`; both
                   also of 2-D ones, but unfold2d). One that a convolution cannot take is refused, with the reason; taps asked
                   for where its kernel does not run (a CPU, fp32 without tf32) is computed by plain torch
    conv_dtype     none, or bf16: compute convolutions in bf16 under fp32 activations (approximate)
    channels_last  auto (by what was measured; by rule CUDA in half precision), on, off
    tuning_store   file of measured times that `pvae tune` writes; "": $XDG_CACHE_HOME/pvae/tuning.json or
                   ~/.cache/pvae/tuning.json; off: none is read
    upsample_conv  3x3 convolutions of pictures enlarged twice as four 2x2 phases: auto (where it pays), on, off
    modulation     norm + scale + shift + gate chains as one Triton kernel each: auto (where it runs and wins), on, off
    norm_act       norm + activation + border of autoencoders' activations as one Triton kernel each: auto (on a GPU, where
                   they are channels-last), on (wherever they are; without a kernel plain torch runs), off
    weights        live: re-laid weights are computed in every call, so that any way of changing a weight is seen;
                   frozen: they are computed once and again when a weight's identity, storage or version changes
                   (a write through `.data` changes none of them: call `pvae.refresh(model)` after it)
    cudagraphs     on: from its second call on a compiled graph is replayed as one CUDA graph, for sizes at which launching
                   kernels takes longer than running them. Inputs and results are copied; weights are read where they are
    engine         inductor, or eager: the rewritten graph is interpreted, node by node
    shard          over the ranks of torch.distributed: none; halo (exact); patch (approximate: pieces with context);
                   tile (approximate: the model's own tiles, spread; pvae.compile only); sequence (exact: tokens of a
                   transformer); auto (an exact form by cost)
    shard_dims     what is split: auto, h (rows), w (columns), hw (both)
    shard_inputs   sequence: {argument: dimension that is split}; for a mesh of two axes a tuple of two, None for an axis
                   that does not split it (one number is the last axis's, the tokens'). What is not named stays whole. In the
                   environment: `hidden_states=1,mask=0:none`. auto: found from the attention
    mesh           ranks along each split dimension, such as 4 or 2x2 (sequence: batch x tokens); auto: a line, or for hw
                   as square as can be
    patch_context  rows of the first input around a patch, in latents for a decoder
    gather         on: results are whole on every rank; off: they stay pieces (`ShardedTensor`, whose `.local` is this
                   rank's and `.whole()` the result)
    approximate    on: auto may choose approximate forms
    machine        what auto's predictions are for: h200, or with constants replaced, such as h200,memory=4e12
    regions        what pvae.compile takes: auto (encoder and decoder, or the repeated blocks, or the model), whole, blocks
    main_rank      names of submodules (their forward) and methods that run on rank 0 only, as a list or with commas between;
                   the others get the results (see `pvae.main_rank`; torch.compile takes submodules alone)
    timeout        seconds that ranks wait for each other before it is an error that names who is missing
    check_inputs   on: every call compares the inputs' values over ranks (off: shapes, when the kind of call changes)
    passes         pipeline text instead of the default one, such as `canonicalize,conv3d_unfold{form=unfold2d}`
    disable        names of passes to leave out, separated by commas
    rewrite_limit  stop rewriting after this many rewrites (bisection turns it)
    expect         {pass: at least so many matches}; fewer is an error. In the environment: `conv3d_unfold=1,...`
    verify         on, off: the verifier after every pass that changed something
    strict         off, on: an error instead of a warning where a graph is handed on untouched or Dynamo gives up
    """

    conv3d: str = "auto"
    conv_dtype: str = "none"
    channels_last: str = "auto"
    tuning_store: str = ""
    upsample_conv: str = "auto"
    modulation: str = "auto"
    norm_act: str = "auto"
    weights: str = "live"
    cudagraphs: str = "off"
    engine: str = "inductor"
    shard: str = "none"
    shard_dims: str = "auto"
    shard_inputs: Mapping[str, int | tuple[int | None, ...]] | None = None
    mesh: tuple[int, ...] | None = None
    patch_context: int = 4
    gather: str = "on"
    approximate: str = "off"
    machine: str = "h200"
    regions: str = "auto"
    main_rank: tuple[str, ...] = ()
    timeout: float = 300.0
    check_inputs: str = "off"
    passes: str = "default"
    disable: tuple[str, ...] = ()
    rewrite_limit: int | None = None
    expect: Mapping[str, int] = field(default_factory=dict)
    verify: str = "on"
    strict: str = "off"

    @property
    def pipeline(self) -> Pipeline:
        whole = Pipeline.default() if self.passes == "default" else Pipeline.parse(self.passes)
        return whole.without(self.disable)

    def key(self) -> str:
        """Text that is equal for two options objects only if they ask for the same compile."""
        return repr([(f.name, getattr(self, f.name)) for f in fields(self)])


CHOICES: Mapping[str, tuple[str, ...]] = {
    "conv3d": ("auto", "native", "channels_last", "unfold2d", "taps"),
    "conv_dtype": ("none", "bf16"),
    "channels_last": ("auto", "on", "off"),
    "upsample_conv": ("auto", "on", "off"),
    "modulation": ("auto", "on", "off"),
    "norm_act": ("auto", "on", "off"),
    "weights": ("live", "frozen"),
    "cudagraphs": ("off", "on"),
    "engine": ("inductor", "eager"),
    "shard": ("none", "halo", "patch", "tile", "sequence", "auto"),
    "shard_dims": ("auto", "h", "w", "hw"),
    "gather": ("on", "off"),
    "approximate": ("off", "on"),
    "regions": ("auto", "whole", "blocks"),
    "check_inputs": ("off", "on"),
    "verify": ("on", "off"),
    "strict": ("off", "on"),
}
GRAPH_FORMS = ("halo", "patch", "sequence")  # forms that a graph is rewritten to; tiles are calls of whole graphs
NAMES = tuple(f.name for f in fields(Options))


def _unknown(name: str, valid: tuple[str, ...], what: str) -> OptionError:
    near = difflib.get_close_matches(name, valid, 1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return OptionError(f"pvae has no {what} {name!r}{hint} It has: {', '.join(valid)}")


def _counts(value: Any) -> dict[str, int]:
    if isinstance(value, str):
        pairs = [item.partition("=") for item in value.split(",") if item]
        value = {name.strip(): int(count or 1) for name, _, count in pairs}
    if not isinstance(value, Mapping):
        raise OptionError(f"expect takes a dict such as {{'conv3d_unfold': 1}}, not {value!r}")
    return {pass_named(name).name: int(count) for name, count in value.items()}


def _whole_number(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise OptionError(f"{name}={value!r} is not a whole number") from None
    if number < 0:
        raise OptionError(f"{name}={number} is negative")
    return number


def _mesh(value: Any) -> tuple[int, ...] | None:
    """`4`, `"2x2"` or `(2, 2)` as a tuple; None and "auto" leave the shape to pvae."""
    if value in (None, "", "auto"):
        return None
    try:
        shape = tuple(
            map(
                int, value.split("x") if isinstance(value, str) else (value if isinstance(value, Sequence) else [value])
            )
        )
    except (TypeError, ValueError):
        shape = ()
    if not 1 <= len(shape) <= 2 or min(shape) < 1:
        raise OptionError(f"mesh={value!r} is not a number of ranks such as 4, or rows x columns such as 2x2")
    return shape


def _split_dims(name: str, value: Any) -> int | tuple[int | None, ...]:
    """`1`, `(0, 1)`, or as text `0:1` and `none:1`: one dimension, or one for each axis of the mesh."""
    parts = value.split(":") if isinstance(value, str) else value if isinstance(value, (tuple, list)) else [value]
    dims = [None if part in (None, "none") else part for part in parts]
    try:
        whole = [None if d is None else int(d) for d in dims]
    except (TypeError, ValueError):
        whole = []
    exact = all(isinstance(d, (str, type(None))) or (type(d) is int) for d in dims)
    if not exact or not 1 <= len(whole) <= 2 or set(whole) == {None}:
        raise OptionError(
            f"shard_inputs: {name!r} is split along {value!r}, which is not a dimension such as 1, or one for each axis "
            "of the mesh such as (0, 1), with None where an axis does not split it"
        )
    if len(whole) == 2 and whole[0] == whole[1]:
        raise OptionError(f"shard_inputs: both axes of the mesh split dimension {whole[0]} of {name!r}")
    return whole[0] if len(parts) == 1 and whole[0] is not None else tuple(whole)


def _shard_inputs(value: Any) -> dict[str, int | tuple[int | None, ...]] | None:
    """`{"hidden_states": 1}`, or the text `hidden_states=1,mask=0:none`; None and "auto" leave it to pvae."""
    if value in (None, "", "auto"):
        return None
    if isinstance(value, str):
        value = {name.strip(): dims.strip() for name, _, dims in (item.partition("=") for item in value.split(","))}
    if not isinstance(value, Mapping) or not value or not all(isinstance(n, str) and n for n in value):
        raise OptionError(
            f"shard_inputs takes a dict from arguments to dimensions such as {{'hidden_states': 1}}, not {value!r}"
        )
    return {name: _split_dims(name, dims) for name, dims in value.items()}


def _paths(name: str, value: Any) -> tuple[str, ...]:
    """`["text_encoder", "vqvae.decode"]`, or both in one text with a comma between."""
    paths = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(path, str) for path in paths):
        raise OptionError(f"{name} takes names of submodules and methods such as ['text_encoder'], not {value!r}")
    return tuple(dict.fromkeys(path.strip() for path in paths if path.strip()))


def _checked(name: str, value: Any) -> Any:
    """The value as the dataclass holds it, or OptionError."""
    if name in CHOICES:
        if isinstance(value, bool) or (value in ("0", "1") and "on" in CHOICES[name]):
            value = "on" if value in (True, "1") else "off"
        given, value = value, "none" if value is None else value
        if value not in CHOICES[name]:
            raise OptionError(f"{name}={given!r} is not possible; valid values of {name}: {', '.join(CHOICES[name])}")
    elif name == "mesh":
        value = _mesh(value)
    elif name == "shard_inputs":
        value = _shard_inputs(value)
    elif name == "machine":
        machine_named(value)
    elif name == "tuning_store":
        if not isinstance(value, (str, os.PathLike)):
            raise OptionError(f"tuning_store={value!r} is not the path of a file, nor off")
        value = os.fspath(value)
    elif name == "patch_context":
        value = _whole_number(name, value)
    elif name == "timeout":
        try:
            value = float(value)
        except (TypeError, ValueError):
            raise OptionError(f"timeout={value!r} is not a number of seconds") from None
        if value <= 0:
            raise OptionError(f"timeout={value} is not a time to wait")
    elif name == "main_rank":
        value = _paths(name, value)
    elif name == "disable":
        names = value.split(",") if isinstance(value, str) else value
        value = tuple(pass_named(n.strip()).name for n in names if n.strip())
    elif name == "rewrite_limit":
        value = None if value in (None, "", "none") else _whole_number(name, value)
    elif name == "expect":
        value = _counts(value)
    elif name == "passes":
        if value is None:
            value = "default"
        if value != "default":
            value = str(Pipeline.parse(value))
    return value


def parse_options(given: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None) -> Options:
    """Options from what the code gave and from the environment, which wins; `disable` is the union of both.

    Raises OptionError or PipelineError, which name the valid options, values or passes.
    """
    environment = os.environ if environment is None else environment
    options = Options()
    for name, value in (given or {}).items():
        if name not in NAMES:
            raise _unknown(name, NAMES, "option")
        options = replace(options, **{name: _checked(name, value)})
    for variable, text in environment.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in NAMES:
            variables = tuple(PREFIX + n.upper() for n in NAMES)
            raise _unknown(variable, variables, "environment variable")
        value = _checked(name, text)
        if name == "disable":
            value = tuple(dict.fromkeys(options.disable + value))
        options = replace(options, **{name: value})
    _consistent(options)
    return options


def _consistent(options: Options) -> None:
    """Raise OptionError for options that contradict each other, or mean nothing beside each other."""
    if options.channels_last == "off" and options.conv3d in ("channels_last", "taps"):
        raise OptionError(
            f"channels_last='off' and conv3d={options.conv3d!r} contradict each other: that form is in channels_last; "
            "conv3d='native' and 'unfold2d' work contiguous, or leave channels_last='auto'"
        )
    asked = [n for n in ("shard_dims", "patch_context") if getattr(options, n) != getattr(Options, n)]
    if options.shard == "sequence" and asked:
        raise OptionError(
            f"{', '.join(asked)}: shard='sequence' splits tokens, not pictures; shard_inputs says which dimensions of "
            "which arguments, mesh over how many ranks"
        )
    if options.shard_inputs is None:
        return
    if options.shard not in ("sequence", "auto"):
        raise OptionError(f"shard_inputs is for shard='sequence' and 'auto'; shard={options.shard!r} does not read it")
    for name, dims in options.shard_inputs.items():
        axes, mesh = len(dims) if isinstance(dims, tuple) else 1, options.mesh or (1,)
        if axes > len(mesh):
            raise OptionError(
                f"shard_inputs: {name!r} is split along {dims}, for a mesh of {axes} axes; say mesh='2x2' or so, "
                "ranks along the first x ranks along the second"
            )
