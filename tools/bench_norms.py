"""The norm kernels beside eager, Inductor, SGLang and a copy of the same bytes: `python -m pvae.tools.bench_norms`.

Times are medians of CUDA-graph replays (`triton.testing.do_bench_cudagraph`). A call walks over as many sets of inputs
and outputs as together exceed the L2 cache several times, so that nothing is found there that a model would not find.
TB/s count each input and each output once. "copy" is half of those bytes read and half written, between tensors of their
own, by memcpy or by an elementwise kernel (`torch.neg`), whichever is faster. Errors are root mean squares against
float64, relative to the result's.

    --quick                 four shapes instead of 40
    --forms norm,residual   some of the forms only
    --sweep                 instead: time the rule's configuration (`norm_config`) beside its neighbours
    --sglang DIR            SGLang's kernels too. Its files run without SGLang; fetch them with
                                pip download --no-deps --dest DIR sglang==0.5.23
                                cd DIR && unzip -q sglang-*.whl 'sglang/kernels/*'
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pvae.kernels import layer_norm_modulate, residual_gate, residual_gate_layer_norm_modulate, rms_norm_modulate
from pvae.kernels import residual_gate_rms_norm_modulate as residual_gate_rms
from pvae.kernels.norm_config import Config, candidates
from pvae.kernels.norm_examples import examples
from pvae.kernels.norm_launch import make_plan, run, work_of
from pvae.kernels.norm_layout import Operands
from pvae.kernels.norm_reference import reference
from pvae.tools.sglang_norms import sglang_norms

EPS = 1e-6
ROTATE_BYTES = 400 * 2**20
FOCUS = ((1, 32760, 5120), (1, 75600, 5120), (8, 4096, 3072))
QUICK = (*FOCUS, (1, 256, 1024))
SHAPES = tuple(
    (1, rows, c) for rows in (256, 1024, 4096, 32760, 75600) for c in (1024, 1536, 2048, 3072, 4096, 5120, 6144, 8192)
)


@dataclass(frozen=True)
class Form:
    """One op in one use. `inputs` names the operands that are passed; outputs are h, y or both."""

    norm: str  # "layer", "rms" or "none"
    residual: bool = False
    select: bool = False

    def outputs(self, x: Tensor) -> tuple[torch.dtype | None, torch.dtype | None]:
        return (x.dtype if self.residual else None), (x.dtype if self.norm != "none" else None)

    def ours(self, o: Operands) -> Any:
        choice = {"scale1": o.scale1, "shift1": o.shift1, "index": o.select}
        if self.norm == "none":
            return residual_gate.residual_gate(o.residual, o.x, o.gate, None, o.gate1, o.select)
        affine = (None, None) if self.norm == "layer" else (None,)
        if not self.residual:
            op = (
                layer_norm_modulate.layer_norm_modulate if self.norm == "layer" else rms_norm_modulate.rms_norm_modulate
            )
            return op(o.x, *affine, o.scale, o.shift, EPS, **choice)
        pair = (
            residual_gate_layer_norm_modulate.residual_gate_layer_norm_modulate
            if self.norm == "layer"
            else residual_gate_rms.residual_gate_rms_norm_modulate
        )
        return pair(o.residual, o.x, o.gate, *affine, o.scale, o.shift, EPS, gate1=o.gate1, **choice)

    def eager(self, o: Operands) -> Any:
        """As diffusers writes it."""

        def pick(first: Tensor, second: Tensor | None) -> Tensor:
            if second is None or o.select is None:
                return first
            return torch.where(o.select.unsqueeze(-1) == 0, first, second)

        h = o.x
        if o.residual is not None:
            h = o.residual + pick(o.gate, o.gate1) * o.x
        if self.norm == "none":
            return h
        shape = h.shape[-1:]
        y = F.layer_norm(h, shape, eps=EPS) if self.norm == "layer" else F.rms_norm(h, shape, eps=EPS)
        y = y * (1 + pick(o.scale, o.scale1)) + pick(o.shift, o.shift1)
        return (h, y) if self.residual else y


FORMS = {
    "norm": Form("layer"),
    "residual": Form("layer", residual=True),
    "select": Form("layer", select=True),
    "residual_select": Form("layer", residual=True, select=True),
    "gate": Form("none", residual=True),
    "rms": Form("rms"),
    "residual_rms": Form("rms", residual=True),
}


@dataclass
class Row:
    form: str
    shape: tuple[int, int, int]
    dtype: str
    bytes: int
    config: dict[str, Any]
    ms: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0  # what measuring took

    def line(self) -> str:
        """TB/s of each; ours over the copy; the fastest other's time over ours."""
        cells = [f"{name} {self.bytes / ms / 1e9:5.2f}" for name, ms in self.ms.items()]
        others = [ms for name, ms in self.ms.items() if name not in ("pvae", "copy")]
        text = f"{self.form:16} {'x'.join(map(str, self.shape)):14} " + "  ".join(cells)
        if "copy" in self.ms:
            text += f"  | {100 * self.ms['copy'] / self.ms['pvae']:3.0f}% of copy"
        if "max" in self.ms:
            text += f", {self.ms['max'] / self.ms['pvae']:.2f}x max-autotune"
        if others:
            text += f", {min(others) / self.ms['pvae']:.2f}x best other"
        return text + "  err " + " ".join(f"{name} {e:.2e}" for name, e in self.error.items())


def operands_for(form: Form, shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> Operands:
    o = examples(shape, dtype, residual=form.residual, select=form.select, seed=seed, device="cuda")
    return o if form.norm != "none" else o._replace(scale=None, scale1=None, shift=None, shift1=None)


def traffic(form: Form, o: Operands) -> int:
    outputs = sum(dtype is not None for dtype in form.outputs(o.x))
    return sum(t.numel() * t.element_size() for t in o if t is not None) + outputs * o.x.numel() * o.x.element_size()


def rotation(form: Form, shape: tuple[int, int, int], dtype: torch.dtype, first: Operands, size: int) -> list[Operands]:
    """`first` and as many more inputs as make a call of each move ROTATE_BYTES."""
    count = min(256, max(1, math.ceil(ROTATE_BYTES / size)))
    return [first] + [operands_for(form, shape, dtype, seed) for seed in range(1, count)]


def timed(call: Callable[[Any], Any], sets: list[Any], rep: int = 10) -> float:
    """Milliseconds of one call, over all sets in turn; results are held, so that each call writes fresh memory."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(lambda: [call(s) for s in sets], rep=rep, return_mode="median") / len(sets)


def rms_error(got: Any, o: Operands, form: Form) -> float:
    """Of the last output (y where there is one), over the first 2048 rows of each batch entry."""
    got = got[-1] if isinstance(got, tuple) else got
    long = {"x": o.x, "residual": o.residual, "select": o.select}
    part = o._replace(**{name: None if t is None else t[:, :2048] for name, t in long.items()})
    want = reference(form.norm, part, EPS, 1.0, torch.float64)[1]
    return float((got[:, :2048].double() - want).square().mean().sqrt() / want.square().mean().sqrt())


@torch.no_grad()
def measure(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, baselines: list[str], sglang: Path | None
) -> Row:
    form = FORMS[name]
    first = operands_for(form, shape, dtype, 0)
    size = traffic(form, first)
    sets = rotation(form, shape, dtype, first, size)
    plan = make_plan(form.norm, first, *form.outputs(first.x))
    assert not isinstance(plan, str), plan
    row = Row(name, shape, str(dtype).removeprefix("torch."), size, plan.constants | {"num_warps": plan.warps})
    calls: dict[str, Callable[[Any], Any]] = {}
    for baseline in baselines:
        if baseline == "eager":
            calls["eager"] = form.eager
        elif baseline in ("inductor", "max"):
            torch._dynamo.reset()
            mode = "default" if baseline == "inductor" else "max-autotune-no-cudagraphs"
            calls[baseline] = torch.compile(form.eager, mode=mode, dynamic=False, fullgraph=True)
            calls[baseline](first)
    if sglang is not None:
        calls |= {f"sglang:{label}": call for label, call in sglang_norms(sglang, name, first, EPS).items()}
    calls["pvae"] = form.ours
    for label, call in calls.items():
        row.ms[label] = timed(call, sets)
        if label in ("eager", "pvae"):
            row.error[label] = rms_error(call(first), first, form)
    if "copy" in baselines:
        row.ms["copy"] = copy_time(size, len(sets))
    return row


def copy_time(size: int, count: int) -> float:
    """Milliseconds to read `size` / 2 bytes and write as many, by the faster of memcpy and an elementwise kernel."""
    pairs = [[torch.randn(size // 4, device="cuda").bfloat16() for _ in range(2)] for _ in range(count)]
    memcpy = timed(lambda pair: pair[1].copy_(pair[0]), pairs)
    return min(memcpy, timed(lambda pair: torch.neg(pair[0], out=pair[1]), pairs))


def sweep(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, list[tuple[float, Config]]]:
    """Time the candidates for one form and shape: bytes of a call, and (milliseconds, config) of each, the rule's first."""
    import triton

    from pvae.kernels.norm_kernel import norm_kernel

    form = FORMS[name]
    first = operands_for(form, shape, dtype, 0)
    outputs = form.outputs(first.x)
    size = traffic(form, first)
    sets = rotation(form, shape, dtype, first, size)
    configs = candidates(work_of(first))
    with ThreadPoolExecutor(16) as pool, triton.AsyncCompileMode(pool):
        for config in configs:
            plan = make_plan(form.norm, first, *outputs, config)
            assert not isinstance(plan, str), plan
            results = [None if d is None else torch.empty_like(first.x, dtype=d) for d in outputs]
            norm_kernel.warmup(
                *first, *results, *plan.integers, EPS, 1.0, grid=plan.grid, **plan.constants, num_warps=plan.warps
            )
    call = functools.partial(run, form.norm, eps=EPS, scale_constant=1.0, h_dtype=outputs[0], y_dtype=outputs[1])
    return size, [(timed(functools.partial(call, config=config), sets, 8), config) for config in configs]


def host_time(form: Form, dtype: torch.dtype) -> float:
    """Microseconds of host time to issue one call of our op."""
    o = operands_for(form, (1, 16, 1024), dtype, 0)
    with torch.inference_mode():
        for _ in range(100):
            form.ours(o)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(1000):
            form.ours(o)
        elapsed = time.perf_counter() - start
        torch.cuda.synchronize()
    return elapsed * 1e3


def within(budget: float, jobs: list[Any]) -> Iterator[Any]:
    """The jobs, until the time is up; says what was left out."""
    start = time.monotonic()
    for done, job in enumerate(jobs):
        if time.monotonic() - start > budget:
            print(f"stopped after {budget:.0f} s: {len(jobs) - done} of {len(jobs)} not run, from {job} on", flush=True)
            return
        yield job


def parse_shapes(text: str) -> list[tuple[int, int, int]]:
    """`BxLxC` or `LxC`, separated by commas."""
    found = []
    for item in text.split(","):
        batch, rows, channels = ([1] + [int(n) for n in item.split("x")])[-3:]
        found.append((batch, rows, channels))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--shapes", type=parse_shapes, help="such as 32760x5120,8x4096x3072")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--baselines", default="eager,inductor,max,copy", help="any of eager, inductor, max, copy")
    parser.add_argument("--sglang", type=Path, help="the folder that holds the unpacked sglang/ folder")
    parser.add_argument(
        "--json", type=Path, help="write the rows, or the sweep's figures, here; rows that are there stay"
    )
    parser.add_argument("--budget", type=float, default=480, help="seconds after which no new shape is begun")
    args = parser.parse_args()
    names, dtype = args.forms.split(","), getattr(torch, args.dtype)
    if unknown := set(names) - set(FORMS):
        parser.error(f"no form {', '.join(sorted(unknown))}; they are {', '.join(FORMS)}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if args.sweep:
        figures = []
        for name, shape in within(args.budget, [(n, s) for s in args.shapes or SHAPES for n in names]):
            size, found = sweep(name, shape, dtype)
            figures.append({"form": name, "shape": shape, "ms": [(ms, asdict(config)) for ms, config in found]})
            best, config = min(found, key=lambda pair: pair[0])
            print(
                f"{name:16} {'x'.join(map(str, shape)):14} rule {size / found[0][0] / 1e9:5.2f}  best "
                f"{size / best / 1e9:5.2f} TB/s  {found[0][0] / best:.3f}x  {config}",
                flush=True,
            )
        if args.json:
            args.json.write_text(json.dumps(figures))
        return
    for name in names:
        print(f"host time of one {name}: {host_time(FORMS[name], dtype):.1f} us", flush=True)
    shapes = args.shapes or (QUICK if args.quick else (*FOCUS, *(s for s in SHAPES if s not in FOCUS)))
    rows = [Row(**row) for row in json.loads(args.json.read_text())] if args.json and args.json.exists() else []
    done = [(row.form, tuple(row.shape), row.dtype) for row in rows]
    jobs = [(n, s) for n in names for s in shapes if (n, s, args.dtype) not in done]
    for name, shape in within(args.budget, jobs):
        start = time.monotonic()
        rows.append(measure(name, shape, dtype, args.baselines.split(","), args.sglang))
        rows[-1].seconds = time.monotonic() - start
        print(rows[-1].line(), flush=True)
        if args.json:
            args.json.write_text(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
