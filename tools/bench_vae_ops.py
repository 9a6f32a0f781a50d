"""Kernels of autoencoders beside eager, at the shapes of real decoders: `python -m pvae.tools.bench_vae_ops`.

    norms      channel and group norms with their activation and border. TB/s count x once (twice for group norms: two
               reads), scale, shift and the result with its border once; `copy` moves as many bytes, half of them read.
    upsample   nearest 2x and a 3x3 convolution, as four 2x2 kernels (`conv_taps` with `phase_weight`). `written` is
               `conv_taps` with the 3x3 kernel on an enlargement that lies there already, `weight` the sums of the weights,
               which no other form needs. TFLOP/s count the arithmetic of the phases, 4/9 of the 3x3's.
    attention  one wide head, `wide_attention` beside SDPA (`eager`).

Activations are channels-last. Times are medians of CUDA graphs replayed in another order each round (`bench_conv`); norms
walk over inputs that exceed the L2 cache several times. Errors are relative (L2) to float64: of whole results, two corners
(upsample) or 64 queries (attention). A row fails where something raises or `pvae.testing.Agreement` is not met.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pvae.kernels import channel_norm_launch, conv_taps, phase_weight, wide_attention
from pvae.kernels.channel_norm_layout import Border, Operands
from pvae.kernels.channel_norm_reference import Norm, exact
from pvae.kernels.channels_last import FORMATS
from pvae.testing import Agreement, agreement
from pvae.tools.bench_conv import Replay, graph_pool, in_turn
from pvae.tools.model_run import dtype_name, dtype_named

CORNER, QUERIES = 48, 64  # where errors are taken: rows and columns of x of each corner; the first queries
ROTATE_BYTES = 400 * 2**20  # of norms' inputs and results
Sizes = tuple[int, ...]
Build = Callable[[torch.dtype, torch.device], "Trial"]


@dataclass(frozen=True)
class Trial:
    """What is timed of one shape: forms by name, each of which goes through all `inputs`; `work` is one input's."""

    calls: Mapping[str, Callable[[], object]]
    work: int  # bytes or floating-point operations
    agreement: Agreement
    refusal: str | None  # why `pvae` runs its reference
    inputs: int = 1


def drawing(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *sizes: torch.randn(sizes, dtype=dtype, device=device, generator=generator)


def eager_norm(norm: Norm, border: Border, o: Operands) -> Tensor:
    """As diffusers writes it, in the dtype of x."""
    x, y = o.x, o.x
    if norm.kind == "l2" and o.weight is not None:
        y = F.normalize(x.float(), dim=1).to(x.dtype) * norm.factor * o.weight.view(-1, *[1] * (x.dim() - 2))
    elif norm.kind == "rms":
        y = x / torch.sqrt((x**2).mean(1, keepdim=True) + norm.eps)
    elif norm.per_frame:  # Mochi, eight frames at a time
        parts = x.transpose(1, 2).flatten(0, 1).split(8)
        y = torch.cat([F.group_norm(part, norm.groups, o.weight, o.bias, norm.eps) for part in parts])
        y = y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
    else:
        y = F.group_norm(x, norm.groups, o.weight, o.bias, norm.eps)
    y = F.silu(y if o.scale is None or o.shift is None else y * o.scale + o.shift)
    if border == AROUND:
        return F.pad(y, (1, 1, 1, 1, 2, 0), mode="replicate")
    y = y if border.empty else torch.cat([y[:, :, :1], y[:, :, :1], y], 2)
    return F.pad(y, (1, 1, 1, 1, 0, 0), mode="reflect") if border == REFLECT else y


GROUP, PLAIN = Norm("group", 1e-6, "silu", groups=32), Border()
AROUND, FRAMES = Border((2, 0, 1, 1, 1, 1), ("replicate",) * 3), Border((2, 0, 0, 0, 0, 0), ("replicate",) * 3)
REFLECT = Border((2, 0, 1, 1, 1, 1), ("replicate", "reflect", "reflect"))
NORMS: Mapping[str, tuple[Norm, Border, str, str]] = {  # operands besides x; C, (T,) H, W of x
    "wan": (Norm("l2", 1e-12, "silu"), PLAIN, "weight", "96x4x480x832 192x4x240x416 384x2x120x208 384x1x60x104"),
    "flux": (GROUP, PLAIN, "weight bias", "128x1024x1024 256x1024x1024 512x512x512 512x128x128"),
    "hunyuan": (GROUP, AROUND, "weight bias", "128x17x360x640 256x17x180x320 512x9x90x160 512x5x45x80"),
    "cogvideox": (GROUP, FRAMES, "weight bias scale shift", "128x9x480x720 256x9x240x360 512x3x60x90"),
    "ltx2": (Norm("rms", 1e-8, "silu"), REFLECT, "", "128x49x120x176 256x25x60x88 512x13x30x44 1024x7x15x22"),
    "mochi": (replace(GROUP, eps=1e-5, per_frame=True), AROUND, "weight bias", "128x13x480x848 512x7x120x212"),
}


def norm_trial(model: str, shape: Sizes, dtype: torch.dtype, device: torch.device) -> Trial:
    (norm, border, given, _), draw = NORMS[model], drawing(dtype, device)
    norm = replace(norm, factor=math.sqrt(shape[0])) if norm.kind == "l2" else norm

    def operands() -> Operands:
        names = given.split()
        drawn = {name: draw(shape[0]) for name in names[:2]}
        for name in ("x", *names[2:]):
            drawn[name] = draw(1, *shape).contiguous(memory_format=FORMATS[len(shape) + 1])
        return Operands(**drawn | {"x": drawn["x"] + 0.5})

    ours, eager = (lambda o: channel_norm_launch.run(norm, o, border)), partial(eager_norm, norm, border)
    first = operands()
    y = ours(first)
    met = agreement(y, eager(first), exact(norm, first, border, torch.float64))
    reads = (2 if norm.kind == "group" else 1) + sum(t is not None for t in (first.scale, first.shift))
    size = (elements := y.numel() + reads * first.x.numel()) * y.element_size()
    count = min(256, math.ceil(ROTATE_BYTES / size)) if device.type == "cuda" else 1
    sets = [first, *(operands() for _ in range(count - 1))]
    copies = [(draw(elements // 2), draw(elements // 2)) for _ in sets]
    calls = {
        "pvae": lambda: [ours(o) for o in sets],  # held, so that each writes memory of its own
        "copy": lambda: [torch.neg(source, out=target) for source, target in copies],
        "eager": lambda: [eager(o) for o in sets],
    }
    return Trial(calls, size, met, channel_norm_launch.refusal(norm, first, border), count)


def norms(tiny: bool) -> Iterator[tuple[str, Build]]:
    for model, (*_, texts) in NORMS.items():
        shapes = [tuple(map(int, text.split("x"))) for text in texts.split()]
        for shape in [(64, *shapes[0][1:-2], 6, 8)] if tiny else shapes:
            yield f"{model} {'x'.join(map(str, shape))}", partial(norm_trial, model, shape)


UPSAMPLES = (  # N, C, O, H, W of x: Wan at 480x832, Qwen-Image and FLUX.1 at 1024x1024, a narrow one
    (2, 384, 192, 60, 104), (4, 384, 192, 120, 208), (4, 192, 96, 240, 416), (1, 384, 192, 128, 128),
    (1, 384, 192, 256, 256), (1, 192, 96, 512, 512), (1, 512, 512, 128, 128), (1, 512, 512, 256, 256), (1, 256, 256, 512, 512),
    (1, 64, 64, 512, 512),
)  # fmt: skip


def upsample_trial(shape: Sizes, dtype: torch.dtype, device: torch.device) -> Trial:
    n, c, o, h, w = shape
    draw, last = drawing(dtype, device), torch.channels_last
    x, weight = draw(n, c, h, w).contiguous(memory_format=last), draw(o, c, 3, 3).contiguous(memory_format=last)
    weight, bias = weight / math.sqrt(9 * c), draw(o)
    phases, written = phase_weight.OP(weight), F.interpolate(x, scale_factor=2.0).contiguous(memory_format=last)
    geometry = [1, 1], [1] * 4, [1, 1]
    calls: dict[str, Callable[[], Tensor]] = {
        "pvae": lambda: conv_taps.OP(x, None, phases, bias, None, *geometry, True, "none", []),
        "written": lambda: conv_taps.OP(written, None, weight, bias, None, *geometry, False, "none", []),
        "weight": lambda: phase_weight.OP(weight),
        "eager": lambda: F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1),
    }

    def corners(y: Tensor, size: int = 2 * CORNER) -> list[Tensor]:
        return [y[:1, :, :size, :size], y[:1, :, -size:, -size:]]

    parts = [F.interpolate(part.double(), scale_factor=2.0) for part in corners(x, CORNER + 1)]
    wide = [F.conv2d(part, weight.double(), bias.double(), padding=1) for part in parts]
    want = [corners(y)[i] for i, y in enumerate(wide)]  # without what lies beside the cut
    met = agreement(corners(calls["pvae"]()), corners(calls["eager"]()), want)
    return Trial(calls, 2 * n * o * c * 4 * 4 * h * w, met, conv_taps.refusal(x, phases))


def upsamples(tiny: bool) -> Iterator[tuple[str, Build]]:
    for n, c, o, *size in ((1, 32, 16, 8, 10), (2, 16, 16, 50, 60)) if tiny else UPSAMPLES:
        yield f"{c}-{o} {n}x{'x'.join(map(str, size))}", partial(upsample_trial, (n, c, o, *size))


ATTENTIONS = ((1, 1, 6240, 384), (1, 1, 16384, 384), (1, 1, 16384, 512), (1, 1, 65536, 384), (1, 8, 4096, 320))


def attention_trial(shape: Sizes, dtype: torch.dtype, device: torch.device) -> Trial:
    draw, scale = drawing(dtype, device), shape[-1] ** -0.5
    q, k, v = draw(*shape), draw(*shape), draw(*shape) + 1  # so that the mean of many values is not 0
    calls: dict[str, Callable[[], Tensor]] = {
        "pvae": lambda: wide_attention.OP(q, k, v, scale),
        "eager": lambda: F.scaled_dot_product_attention(q, k, v, scale=scale),
    }
    want = (q[..., :QUERIES, :].double() @ k.double().mT * scale).softmax(-1) @ v.double()
    met = agreement(calls["pvae"]()[..., :QUERIES, :], calls["eager"]()[..., :QUERIES, :], want)
    return Trial(calls, 4 * math.prod(shape) * shape[-2], met, wide_attention.refusal(q, k, v))


def attentions(tiny: bool) -> Iterator[tuple[str, Build]]:
    for shape in ((1, 2, 96, 320),) if tiny else ATTENTIONS:
        yield "x".join(map(str, shape)), partial(attention_trial, shape)


class Kind(NamedTuple):
    cases: Callable[[bool], Iterator[tuple[str, Build]]]
    forms: tuple[str, ...]
    unit: str  # of `Row.rate`


KINDS = {
    "norms": Kind(norms, ("pvae", "copy", "eager"), "TB/s"),
    "upsample": Kind(upsamples, ("pvae", "written", "weight", "eager"), "TFLOP/s"),
    "attention": Kind(attentions, ("pvae", "eager"), "TFLOP/s"),
}


@dataclass
class Row:
    """One shape: milliseconds by form, pvae's rate in 10^12 of its kind's unit a second, errors; `failure` is why it failed."""

    kind: str
    case: str
    ms: dict[str, float] = field(default_factory=dict)
    rate: float = 0.0
    error: float = 0.0
    eager_error: float = 0.0
    note: str = ""
    failure: str = ""

    def __str__(self) -> str:
        cells = [f"{self.ms[form]:10.4f}" if form in self.ms else f"{'-':>10s}" for form in KINDS[self.kind].forms]
        text = f"{self.case:28s} {' '.join(cells)} {self.rate:8.2f}  {self.error:.2e} {self.eager_error:.2e}"
        return text + "".join(f"  ({said})" for said in (self.note, self.failure) if said)


@torch.no_grad()
def measure(kind: str, case: str, build: Build, dtype: torch.dtype, device: torch.device, rounds: int) -> Row:
    """The row of one shape. What it raises is its failure: the other rows are still measured."""
    row = Row(kind, case)
    try:
        trial, pool = build(dtype, device), graph_pool(device)
        row.error, row.eager_error = (met := trial.agreement).error, met.eager_error
        row.failure = "" if met.ok else str(met)
        row.note = f"not the kernel: {trial.refusal}" if trial.refusal else ""
        found = in_turn({name: Replay.of(call, device, pool) for name, call in trial.calls.items()}, rounds)
        row.ms = {name: ms / trial.inputs for name, ms in found.items()}
        row.rate = trial.work / row.ms["pvae"] / 1e9
    except Exception as error:
        row.failure = f"{type(error).__name__}: {error}"
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 if a row failed; 2 for usage."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kinds", default=",".join(KINDS), help="some of them, with commas between")
    p.add_argument("--dtype", default="bf16", choices=("bf16", "fp16"))
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--tiny", action="store_true", help="a small shape or two of each instead, such as a CPU runs")
    p.add_argument("--json", type=Path)
    args = p.parse_args(arguments)
    dtype, device, kinds = dtype_named(args.dtype), torch.device(args.device), args.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        p.error(f"no kind {', '.join(sorted(unknown))}; they are {', '.join(KINDS)}")
    if args.rounds < 1:
        p.error(f"--rounds {args.rounds} measures nothing")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    about = {"device": name, "torch": torch.__version__, "dtype": dtype_name(dtype)}
    print(", ".join(about.values()), flush=True)
    rows: list[Row] = []
    for kind in kinds:
        forms = " ".join(f"{form + ' ms':>10s}" for form in KINDS[kind].forms)
        print(f"\n{kind:28s} {forms} {KINDS[kind].unit:>8s}  error    eager's", flush=True)
        for case, build in KINDS[kind].cases(args.tiny):
            rows.append(measure(kind, case, build, dtype, device, args.rounds))
            print(rows[-1], flush=True)
            if args.json:
                args.json.write_text(json.dumps({**about, "rows": [asdict(r) for r in rows]}, indent=1))
            torch.cuda.empty_cache()  # nothing where CUDA was not used
    return int(any(row.failure for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
