"""The options of the backend, where they come from and what they may be. The one place that reads PVAE_* variables."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pvae.passes.pipeline import Pipeline, pass_named

PREFIX = "PVAE_"


class OptionError(ValueError):
    """An unknown option, or a value that an option does not take; the message lists what is valid."""


@dataclass(frozen=True)
class Options:
    """What a user may ask of pvae; each is also an environment variable `PVAE_<NAME>`, which wins over the code.

    conv3d         form of 3-D convolutions: auto (by measured rule), native, channels_last, unfold2d
    conv_dtype     none, or bf16: compute convolutions in bf16 under fp32 activations (approximate)
    channels_last  auto (CUDA, half precision), on, off
    modulation     norm + scale + shift + gate chains as one Triton kernel each: auto (where it runs and wins), on, off
    weights        live: re-laid weights are computed in every call, so that any way of changing a weight is seen;
                   frozen: they are computed once and again when a weight's identity, storage or version changes
                   (a write through `.data` changes none of them: call `pvae.refresh(model)` after it)
    engine         inductor, or eager: the rewritten graph is interpreted, node by node
    shard          none (the other forms are not in this version)
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
    modulation: str = "auto"
    weights: str = "live"
    engine: str = "inductor"
    shard: str = "none"
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
    "conv3d": ("auto", "native", "channels_last", "unfold2d"),
    "conv_dtype": ("none", "bf16"),
    "channels_last": ("auto", "on", "off"),
    "modulation": ("auto", "on", "off"),
    "weights": ("live", "frozen"),
    "engine": ("inductor", "eager"),
    "shard": ("none",),
    "verify": ("on", "off"),
    "strict": ("off", "on"),
}
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


def _checked(name: str, value: Any) -> Any:
    """The value as the dataclass holds it, or OptionError."""
    if name in CHOICES:
        if isinstance(value, bool):
            value = "on" if value else "off"
        if value is None:
            value = "none"
        if value not in CHOICES[name]:
            raise OptionError(f"{name}={value!r} is not possible; valid values of {name}: {', '.join(CHOICES[name])}")
    elif name == "disable":
        names = value.split(",") if isinstance(value, str) else value
        value = tuple(pass_named(n.strip()).name for n in names if n.strip())
    elif name == "rewrite_limit":
        try:
            value = None if value in (None, "", "none") else int(value)
        except (TypeError, ValueError):
            raise OptionError(f"rewrite_limit={value!r} is not a whole number") from None
        if value is not None and value < 0:
            raise OptionError(f"rewrite_limit={value} is negative")
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
    return options
