"""The forms that a convolution can take, and the best of them in each layout.

    native         ATen's convolution on contiguous tensors
    channels_last  ATen's convolution on channels_last tensors
    unfold2d       conv2d on kt frames laid side by side as channels (kernels/conv3d_unfold.py)
    linear         stride = kernel: a product of patches; in groups, with a kernel of one: a batched product
    frames         one frame deep: conv2d on every frame
    taps           `pvae::conv_taps`: shifted matrix products on channels_last tensors

A form's time counts what it leaves to others, such as torch's pass for the bias (`conv_site.passes_besides`).
One form is the choice by rule (`conv_rules.py`). Another takes its place only with figures for both, from one source, and
where it wins by more than that source may err (`conv_figures.MARGINS`): what nobody knows stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pvae.kernels import conv_taps
from pvae.passes.conv_figures import Figures, Knowledge
from pvae.passes.conv_problem import ConvProblem
from pvae.passes.conv_rules import no_gain, unfold_pays
from pvae.passes.conv_site import passes_besides
from pvae.passes.ir import ConvNode, static, value
from pvae.passes.layout_cut import CHANNELS_LAST, CONTIGUOUS

FORMS = ("native", "channels_last", "unfold2d", "linear", "frames", "taps")
PASSES = {"unfold2d": "conv3d_unfold", "linear": "conv3d_unfold", "frames": "conv3d_unfold", "taps": "conv_taps"}
COPY_SHARE = 0.85  # of a large copy's rate, which Inductor's pointwise kernels reach


@dataclass(frozen=True)
class Wanted:
    """What the options ask for: a form or auto, a layout (auto, on, off), and which passes run."""

    form: str = "auto"
    layout: str = "auto"
    passes: frozenset[str] = frozenset(PASSES.values())
    interpreted: bool = False  # not compiled by Inductor

    @classmethod
    def of(cls, options: Any, form: str | None = None) -> Wanted:
        """`form` is asked for instead of the options' one."""
        chosen = options.conv3d if form is None else form
        passes = frozenset(s.pass_.name for s in options.pipeline.steps)
        return cls(chosen, layout_mode(chosen, options.channels_last), passes, options.engine == "eager")


def layout_mode(form: str, channels_last: str) -> str:
    """`auto`, `on` or `off`: what the options conv3d and channels_last ask for, taken together."""
    if form in ("channels_last", "taps") or channels_last == "on":
        return "on"
    return "off" if channels_last == "off" or form == "native" else "auto"


@dataclass(frozen=True)
class Form:
    """One form of one convolution: the layout that it reads and writes, and why it cannot be had or what it costs.

    `ms` is all that it takes, `besides_ms` of it in passes over memory beside the convolution, for what `besides` says.
    """

    name: str
    layout: str
    why_not: str | None = None
    ms: float | None = None
    source: str = ""
    config: tuple[int, ...] = ()
    besides_ms: float = 0.0
    besides: str = ""

    @property
    def time(self) -> str:
        """`0.471 ms, 0.147 of it for bias`."""
        text = f"{self.ms:.3g} ms"
        return f"{text}, {self.besides_ms:.3g} of it for {self.besides}" if self.besides else text


@dataclass(frozen=True)
class Forms:
    """All forms of a convolution; `ruled` is the one by rule, `figures` where the times are from."""

    conv: ConvNode
    every: tuple[Form, ...]
    ruled: Form
    figures: Figures
    forced: str | None = None  # why the form that was asked for cannot be had

    def best(self, layout: str | None = None) -> Form | None:
        """The form to take, in any layout or in that one; None if the layout has none, or none that anything is known of."""
        usual = self.ruled
        if self.figures.sure == "asked":
            return usual if layout in (None, usual.layout) else None
        there = [f for f in self.every if f.why_not is None and layout in (None, f.layout)]
        if usual.ms is None:
            return usual if usual in there else None
        timed = [f for f in there if f.ms is not None]
        fastest = min(timed, key=lambda f: f.ms or 0.0, default=None)
        if usual in there and (fastest is None or (fastest.ms or 0.0) >= self.figures.margin * usual.ms):
            return usual
        return fastest


def forms_of(conv: ConvNode, wanted: Wanted, knowledge: Knowledge) -> Forms:
    """What `conv`, of 2 or 3 spatial dimensions, can be computed as."""
    figures = knowledge.figures(ConvProblem.of(conv))
    usual = default_layout(conv, wanted)
    every: list[Form] = []
    there = possible(conv, wanted)
    no_unfold = unfold_pays(conv) if there.get("unfold2d", "") is None and wanted.form != "unfold2d" else None
    for name, why_not in there.items():
        layout, found = _layout(name, conv, wanted, usual), figures.of(name)
        timed = found is not None and figures.sure != "rule"
        if why_not is None and name == "unfold2d" and not timed:
            why_not = no_unfold
        elif why_not is None and name == "channels_last" and name != wanted.form and usual == CONTIGUOUS:
            why_not = _against_last(conv, timed)
        if why_not is not None or found is None:
            every.append(Form(name, layout, why_not))
        else:
            form = Form(name, layout, found.why_not, found.ms, figures.source, found.config)
            every.append(_whole(form, conv, wanted, knowledge))
    asked = next((f for f in every if f.name == wanted.form), None)
    if asked is not None and asked.why_not is None:
        return Forms(conv, tuple(every), asked, replace(figures, sure="asked"))
    return Forms(
        conv, tuple(every), _ruled(every, usual, no_unfold is None), figures, None if asked is None else asked.why_not
    )


def _whole(form: Form, conv: ConvNode, wanted: Wanted, knowledge: Knowledge) -> Form:
    """The form with the passes that it needs beside itself, on a GPU."""
    if form.ms is None or knowledge.copy is None or knowledge.device.kind not in ("cuda", "hip"):
        return form
    moved = passes_besides(conv, form.name, wanted.interpreted)
    ms = 1e3 * sum(moved.values()) / (COPY_SHARE * knowledge.copy)
    return replace(form, ms=form.ms + ms, besides_ms=ms, besides=", ".join(moved))


def default_layout(conv: ConvNode, wanted: Wanted) -> str:
    """The layout by rule alone: of device and dtype, the same on all ranks."""
    if wanted.layout == "auto":
        return CHANNELS_LAST if no_gain(value(conv.weight)) is None else CONTIGUOUS
    return CHANNELS_LAST if wanted.layout == "on" else CONTIGUOUS


def _layout(name: str, conv: ConvNode, wanted: Wanted, usual: str) -> str:
    """The layout that a form reads and writes."""
    if name == "native":
        return CONTIGUOUS
    if name == "unfold2d":
        on_gpu = wanted.layout == "auto" and value(conv.x).device.type == "cuda"
        return CHANNELS_LAST if wanted.layout == "on" or on_gpu else CONTIGUOUS
    return usual if name in ("linear", "frames") else CHANNELS_LAST


def possible(conv: ConvNode, wanted: Wanted) -> dict[str, str | None]:
    """The forms of such a convolution, each with None or why it cannot be had: by what it is, its device, or the options."""
    own = ["native", "channels_last", "taps"]
    if is_grouped_pointwise(conv):
        own += ["linear", "frames"] if conv.ndim == 3 else ["linear"]
    elif conv.ndim == 3:
        own += ["linear"] if is_patches(conv) else ["frames"] if conv.kernel[0] == 1 else ["unfold2d"]
    return {name: _why_not(name, conv, wanted) for name in FORMS if name in own}


def is_patches(conv: ConvNode) -> bool:
    """Whether the windows tile the input: a product of patches, in any number of dimensions."""
    if conv.kernel != conv.stride or any(p != (0, 0) for p in conv.padding) or conv.groups != 1:
        return False
    return all(d == 1 for d, k in zip(conv.dilation, conv.kernel, strict=True) if k > 1)


def is_grouped_pointwise(conv: ConvNode) -> bool:
    """Whether each position's channels are multiplied with one matrix a group, more than one channel each."""
    ones = (1,) * conv.ndim
    plain = conv.kernel == conv.stride == ones and all(p == (0, 0) for p in conv.padding)
    return plain and 1 < conv.groups < conv.in_channels


def _why_no_batched_product(x: torch.Tensor) -> str | None:
    """Why a convolution of groups with a kernel of one is left to ATen, or None.

    GPU: always. With channels innermost cuDNN launches three kernels a group (H200, AutoencoderDC: 2160 of 2432 launches).
    CPU: fp32 and fp64, in which ATen computes group by group (EPYC, fp32, 1.0 to 17 times as fast with the same error, of
    20 shapes); oneDNN takes bf16 in one product, 5 times as fast as bmm where channels are innermost.
    """
    if x.device.type == "cuda":
        return None
    if x.device.type == "cpu":
        return f"oneDNN's grouped convolution is kept for {x.dtype}" if x.dtype.itemsize < 4 else None
    return f"no measurement for device type {x.device.type!r}"


def why_no_frames(conv: ConvNode) -> str | None:
    """Why a convolution of one frame is not a conv2d on frames, or None."""
    if conv.padding[0] != (0, 0):
        return "pads time with a kernel of one frame"
    if conv.stride[0] != 1 and static(value(conv.x).shape[2]) is None:
        return "strides over a symbolic number of frames"
    if any(front != back for front, back in conv.padding):
        return "padding='same' is uneven here"
    return None


def _why_not(name: str, conv: ConvNode, wanted: Wanted) -> str | None:
    """Why the convolution cannot take the form, or may not by the options."""
    x, weight = value(conv.x), value(conv.weight)
    if name in PASSES:
        if not conv.batched:
            return "no batch dimension"
        if not x.dtype.is_floating_point:
            return f"{x.dtype} is not a floating-point type"
        if PASSES[name] not in wanted.passes:
            return f"the pipeline has no pass {PASSES[name]}"
        if wanted.form in ("native", "channels_last"):
            return f"conv3d={wanted.form} was asked for"
    if name == "native" and wanted.layout == "on":
        return "channels_last was asked for"
    if name in ("channels_last", "taps") and wanted.layout == "off":
        return "contiguous tensors were asked for"
    if name == "taps":
        supported = conv_taps.supports(x, weight, conv.groups)
        return supported if name == wanted.form else supported or conv_taps.refusal(x, weight)
    if name == "linear" and conv.groups > 1:
        return _why_no_batched_product(x)
    if name == "frames":
        return why_no_frames(conv)
    if name in ("native", "channels_last") and name != wanted.form and conv.ndim == 3 and conv.batched:
        if is_patches(conv) and PASSES["linear"] in wanted.passes:
            return "a product of patches is the same sums"
        if conv.kernel[0] == 1 and why_no_frames(conv) is None and PASSES["frames"] in wanted.passes:
            return "conv2d on frames is the same sums"
    return None


def _against_last(conv: ConvNode, timed: bool) -> str | None:
    """Why channels_last is not considered where contiguous tensors are usual, or None."""
    x = value(conv.x)
    if timed and x.device.type == "cpu" and x.dtype == torch.float32:
        # oneDNN is a little faster so, but three times less exact (C = 64: 7.2e-7 against 2.5e-7; contiguous 2.2e-7).
        return "oneDNN sums float32 less exactly so"
    return None if timed else no_gain(value(conv.weight))


def _ruled(every: Sequence[Form], layout: str, unfolds: bool) -> Form:
    """The form that is taken where nothing is known to be faster."""
    can = {f.name: f for f in every if f.why_not is None}
    for name in ("linear", "frames"):
        if name in can:
            return can[name]
    if "unfold2d" in can and unfolds:
        return can["unfold2d"]
    usual = "channels_last" if layout == CHANNELS_LAST else "native"
    return can[usual] if usual in can else next(f for f in every if f.name == usual)
