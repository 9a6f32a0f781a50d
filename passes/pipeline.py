"""The one ordered list of passes, and how it is written as text, run, verified and cut short.

A pipeline prints and parses: `canonicalize,conv3d_unfold{form=unfold2d},channels_last`.
"""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import GraphModule

from pvae.passes.canonicalize import CANONICALIZE
from pvae.passes.channels_last import CHANNELS_LAST
from pvae.passes.conv3d_unfold import CONV3D_UNFOLD
from pvae.passes.conv_dtype import CONV_DTYPE
from pvae.passes.conv_policy import CONV_POLICY
from pvae.passes.conv_taps import CONV_TAPS
from pvae.passes.depth_to_space import DEPTH_TO_SPACE
from pvae.passes.drop_zero_taps import DROP_ZERO_TAPS
from pvae.passes.fold_pad import FOLD_PAD
from pvae.passes.fold_upsample import FOLD_UPSAMPLE
from pvae.passes.fuse_modulation import FUSE_MODULATION, FUSE_RESIDUAL_GATE
from pvae.passes.fuse_norm_act import FUSE_NORM_ACT
from pvae.passes.join_chunks import JOIN_CHUNKS
from pvae.passes.main_rank import INLINE_MAIN_RANK, MAIN_RANK
from pvae.passes.output_layout import lay_out_outputs
from pvae.passes.pointwise_before_resample import POINTWISE_BEFORE_RESAMPLE
from pvae.passes.prefix_attention import PREFIX_ATTENTION
from pvae.passes.rule import Context, Pass, Report
from pvae.passes.shard import SHARD
from pvae.passes.split_cache import SPLIT_CACHE
from pvae.passes.verify import Signature, verify
from pvae.passes.wide_attention import WIDE_ATTENTION

PASSES: tuple[Pass, ...] = (
    CANONICALIZE,  # first: every later rule matches one spelling
    PREFIX_ATTENTION,  # early: what made the mask, thousands of nodes perhaps, is gone for the others
    JOIN_CHUNKS,  # before all that looks at what stands around a convolution
    DROP_ZERO_TAPS,  # before pads are folded or unfolded: it reads them, and what it drops need not be unfolded
    FOLD_PAD,  # before sharding, which then fetches a halo once; a convolution that pads itself has more forms
    POINTWISE_BEFORE_RESAMPLE,  # before sharding, between whose fetches it would have to look; fold_upsample may follow it
    MAIN_RANK,  # before sharding, which must find the same nodes on every rank
    SHARD,  # on ATen's own ops, before any becomes a kernel or takes a form of ours
    INLINE_MAIN_RANK,  # right after it: the passes that follow are for rank 0's regions too
    FUSE_MODULATION,  # on the norms as written
    FUSE_RESIDUAL_GATE,  # after the norms have taken the residuals before them
    WIDE_ATTENTION,  # after sharding, which knows ATen's attention, and before layouts are chosen
    CONV_DTYPE,  # before forms are chosen: they depend on the dtype
    FOLD_UPSAMPLE,  # before forms are chosen: what it takes needs none; its casts are the small picture's
    CONV_POLICY,  # which form each convolution takes; the next three rewrite by it
    CONV_TAPS,  # first of the forms: it takes in what stands around a convolution
    CONV3D_UNFOLD,  # the form of each convolution
    CHANNELS_LAST,  # last: the layout of what is left as a convolution
    DEPTH_TO_SPACE,  # after the layouts, which decide whether its copies are channels-last
    FUSE_NORM_ACT,  # after the layouts: its kernels are for channels-last activations
    SPLIT_CACHE,  # last: it reads convolutions and norms that are kernels of ours
)
BY_NAME: Mapping[str, Pass] = {p.name: p for p in PASSES}
_ITEM = re.compile(r"([A-Za-z0-9_]+)(?:\{([^}]*)\})?")


class PipelineError(ValueError):
    """A pipeline text or pass name that pvae does not know."""


def register(new: Pass, *, before: str | None = None) -> None:
    """Add a pass of your own to the default pipeline of this process: before the pass named, else at the end.

    A pass of the same name is replaced where it stands. Raises PipelineError if there is no pass `before`.
    """
    global PASSES, BY_NAME
    names = [p.name for p in PASSES]
    if new.name in names:
        PASSES = tuple(new if p.name == new.name else p for p in PASSES)
    else:
        position = len(PASSES) if before is None else names.index(pass_named(before).name)
        PASSES = (*PASSES[:position], new, *PASSES[position:])
    BY_NAME = {p.name: p for p in PASSES}


def pass_named(name: str) -> Pass:
    if name not in BY_NAME:
        near = difflib.get_close_matches(name, BY_NAME, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise PipelineError(f"there is no pass {name!r}{hint} The passes are: {', '.join(BY_NAME)}")
    return BY_NAME[name]


@dataclass(frozen=True)
class Step:
    """One pass with its settings."""

    pass_: Pass
    settings: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        inner = ",".join(f"{k}={v}" for k, v in self.settings.items())
        return self.pass_.name + (f"{{{inner}}}" if inner else "")


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they run."""

    steps: tuple[Step, ...]

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """`a,b{x=1,y=2}` -> Pipeline; PipelineError names what is wrong."""
        steps: list[Step] = []
        position = 0
        text = text.strip()
        while position < len(text):
            item = _ITEM.match(text, position)
            if item is None:
                raise PipelineError(
                    f"cannot read the pipeline at {text[position:]!r}; it is written a,b{{key=value}},c"
                )
            settings: dict[str, str] = {}
            for pair in filter(None, (item.group(2) or "").split(",")):
                key, equals, val = pair.partition("=")
                if not equals:
                    raise PipelineError(f"setting {pair!r} of pass {item.group(1)!r} is not written key=value")
                settings[key.strip()] = val.strip()
            step_pass = pass_named(item.group(1))
            unknown = set(settings) - set(step_pass.options)
            if unknown:
                valid = ", ".join(f"{k}={v}" for k, v in step_pass.options.items()) or "none"
                raise PipelineError(f"pass {step_pass.name!r} has no setting {sorted(unknown)[0]!r}; it has: {valid}")
            for key, val in settings.items():
                if val not in step_pass.options[key].split("|"):
                    raise PipelineError(
                        f"{step_pass.name}{{{key}={val}}}: the values of {key} are {step_pass.options[key]}"
                    )
            steps.append(Step(step_pass, settings))
            position = item.end()
            rest = text[position:].lstrip()
            if rest and not rest.startswith(","):
                raise PipelineError(f"expected ',' in the pipeline at {rest!r}")
            position = len(text) - len(rest) + 1 if rest else len(text)
        return cls(tuple(steps))

    @classmethod
    def default(cls, without: Sequence[str] = ()) -> Pipeline:
        for name in without:
            pass_named(name)
        return cls(tuple(Step(p) for p in PASSES if p.name not in without))

    def __str__(self) -> str:
        return ",".join(map(str, self.steps))

    def without(self, names: Sequence[str]) -> Pipeline:
        for name in names:
            pass_named(name)
        return Pipeline(tuple(s for s in self.steps if s.pass_.name not in names))


Observer = Callable[[str, GraphModule], None]


def run_pipeline(
    gm: GraphModule,
    pipeline: Pipeline,
    context: Context,
    *,
    check: bool = True,
    observe: Observer | None = None,
    promised: Signature | None = None,
) -> list[Report]:
    """Run `pipeline` on `gm` in place; `observe(name, gm)` sees the graph before the first pass and after each, and last
    as "lay_out_outputs" if any output was re-laid. `promised` are its outputs as the caller expects them, by default as they
    are.

    A pass that raises fails the compile, with its name; nothing is caught and carried on.
    """
    signature = promised or Signature.of(gm.graph)
    reports: list[Report] = []
    if observe is not None:
        observe("captured", gm)
    for step in pipeline.steps:
        try:
            report = step.pass_.run(gm.graph, context, step.settings)
        except Exception as error:
            error.add_note(f"in pvae pass {step.pass_.name!r}; PVAE_DISABLE={step.pass_.name} compiles without it")
            raise
        signature = signature.with_pieces(gm.graph, context.left)
        if report.changed and check:
            start = time.perf_counter()
            verify(gm.graph, signature, step.pass_.name)
            report.counters["verify_us"] = int(1e6 * (time.perf_counter() - start))
        reports.append(report)
        if observe is not None:
            observe(step.pass_.name, gm)
    relaid = lay_out_outputs(gm, signature, context)
    if relaid and reports:
        reports[-1].counters["outputs_relaid"] = relaid
    gm.graph.lint()
    gm.recompile()
    if relaid and observe is not None:
        observe("lay_out_outputs", gm)
    return reports
