"""A picture the way GLM-Image makes it, over several GPUs: an autoregressive model on rank 0, a sharded DiT, a sharded VAE.

    torchrun --nproc_per_node 4 -m pvae.tools.glm_image --preset full --check
    python -m pvae.tools.glm_image --check                                      # one device

1. `prior`, on rank 0 alone (`pvae.main_rank`): GlmImageForConditionalGeneration of transformers writes the picture as tokens,
   row by row, until it says that the picture ends, so that nobody knows its height before; a T5 encoder reads the prompt.
   On the other ranks both have their weights on `meta`; tokens and embeddings reach them by broadcast.
2. `denoise`: diffusers' GlmImageTransformer2DModel, by `pvae.compile(transformer, shard="sequence")`, with classifier-free
   guidance as a batch of two (`--mesh 2x2` gives each branch half of the ranks).
3. `decode`: AutoencoderKL, by `pvae.compile(vae, shard="halo")`.

Weights are random: there is nothing to see in the picture, but all to compare. `--check` runs the same without pvae on every
rank, from the same tokens, and compares latents and picture with float64. Exit code 1 where they differ by more than 1e-12 in
float64, or, in other types, err more than twice as much as the unsharded models do by themselves.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pvae
from pvae.options import OptionError, parse_options
from pvae.testing import Agreement, agreement
from pvae.tools.bench_ranks import World, joined
from pvae.tools.glm_image_stages import PRESETS, Prior, build, decode, denoise, prior
from pvae.tools.model_run import RequestError, dtype_name, dtype_named, one_of

T = TypeVar("T")
STEPS_RATIO = 2.0  # roundings of several steps add up: float32 by Inductor on one device was seen at 1.4


class Clock:
    """Seconds, with the device idle, and the peak of its memory in GiB (None on a CPU) since the last time it was asked."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.seconds()
        self.peak_gib()

    def seconds(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        passed, self._last = now - getattr(self, "_last", now), now
        return passed

    def peak_gib(self) -> float | None:
        if not self.on_gpu:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


@dataclass
class Work:
    """What one rank did. `written` counts the autoregressive model's forward passes, `main_mib` is the weights that this
    rank has of what rank 0 alone runs. The first of each list of seconds has the compilation in it."""

    rank: int
    written: int = 0
    main_mib: float = 0.0
    prior_s: float = 0.0
    denoise_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    peak_gib: dict[str, float | None] = field(default_factory=dict)

    def __str__(self) -> str:
        def later(seconds: Sequence[float]) -> str:
            rest = f", then {min(seconds[1:]) * 1e3:.2f} ms" if seconds[1:] else ""
            return f"{seconds[0]:.2f} s{rest}"

        did = f"{self.written} passes" if self.written else "received"
        text = f"rank {self.rank}: prior {did}, weights {self.main_mib:.1f} MiB, {self.prior_s:.2f} s"
        text += f" | denoise {later(self.denoise_s)} | decode {later(self.decode_s)}"
        peaks = [f"{stage} {gib:.2f}" for stage, gib in self.peak_gib.items() if gib is not None]
        return text + (f" | peak GiB {', '.join(peaks)}" if peaks else "")


@dataclass(frozen=True)
class Request:
    """What to run; as on the command line."""

    preset: str
    dtype: torch.dtype
    prompt: str
    steps: int
    guidance: float
    seed: int
    engine: str
    regions: str
    mesh: str | None


class Example:
    """One picture on one world."""

    def __init__(self, request: Request, rank: int, device: torch.device) -> None:
        self.request, self.preset = request, PRESETS[request.preset]
        self.pipeline = build(self.preset, device, request.dtype, seed=request.seed, main=rank == 0)
        self.work = Work(rank)
        self.clock = Clock(device)
        on_main: list[nn.Module] = [self.pipeline.vision_language_encoder, self.pipeline.text_encoder]
        here = [p for model in on_main for p in model.parameters() if not p.is_meta]
        self.work.main_mib = sum(p.numel() * p.element_size() for p in here) / 2**20
        on_main[0].register_forward_pre_hook(self._written)

    def _written(self, *_: object) -> None:
        self.work.written += 1

    def run(self) -> tuple[Prior, Tensor, Tensor]:
        """The prior, the latents and the picture, whole on every rank."""
        request, pipeline, work, clock = self.request, self.pipeline, self.work, self.clock
        common = {"engine": request.engine, "strict": "on"}
        pvae.compile(pipeline.transformer, shard="sequence", regions=request.regions, mesh=request.mesh, **common)
        pvae.compile(pipeline.vae, shard="halo", **common)
        clock.seconds()

        found = pvae.main_rank(prior)(pipeline, self.preset, request.prompt, request.seed)
        work.prior_s, work.peak_gib["prior"] = clock.seconds(), clock.peak_gib()
        for after in self.denoise(found):
            latents = after
            work.denoise_s.append(clock.seconds())
        work.peak_gib["denoise"] = clock.peak_gib()
        for _ in range(3):
            picture = decode(pipeline, latents)
            work.decode_s.append(clock.seconds())
        work.peak_gib["decode"] = clock.peak_gib()
        return found, latents, picture

    def denoise(self, found: Prior) -> Iterator[Tensor]:
        return denoise(self.pipeline, found, self.request.steps, self.request.guidance, self.request.seed)

    def exchanges(self) -> dict[str, Counter[str]]:
        """By model: what the shard pass put into its graphs, counted."""
        found = {}
        for name in ("transformer", "vae"):
            passes = [
                p for g in pvae.report(getattr(self.pipeline, name)).graphs for p in g.passes if p.name == "shard"
            ]
            found[name] = Counter(record.rule for p in passes for record in p.matches)
        return found

    def check(self, found: Prior, latents: Tensor, picture: Tensor) -> dict[str, Agreement]:
        """Compare with the same models without pvae, on this rank alone, from the same tokens. They stay in float64."""
        models = (self.pipeline.transformer, self.pipeline.vae)
        for model in models:
            pvae.restore(model)
        alone = self._alone(found)
        if self.request.dtype != torch.float64:
            for model in models:
                nn.Module.to(model, torch.float64)
        exact = self._alone(found)
        return {
            name: agreement(ours, eager, reference)
            for name, ours, eager, reference in zip(
                ("latents", "picture"), (latents, picture), alone, exact, strict=True
            )
        }

    def _alone(self, found: Prior) -> tuple[Tensor, Tensor]:
        *_, latents = self.denoise(found)
        return latents, decode(self.pipeline, latents)


def allowed(found: Agreement) -> float:
    """The error that a check lets pass."""
    if found.dtype == torch.float64:
        return found.bound
    return STEPS_RATIO * max(found.eager_error, torch.finfo(found.dtype).eps / 2)


@contextmanager
def world_or_one(on_gpu: bool) -> Iterator[World | None]:
    """The ranks that torchrun started, None for one device."""
    if dist.is_torchelastic_launched():
        with joined(on_gpu, timedelta(seconds=parse_options().timeout)) as world:
            yield world
    else:
        yield None


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help=", ".join(PRESETS))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: GPUs if there are any")
    parser.add_argument("--dtype", help="bfloat16 for full, float32 for tiny unless given")
    parser.add_argument("--prompt", default='a shop window, "open" in blue letters')
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and noise")
    parser.add_argument("--engine", help="inductor; eager for float64, where Inductor's float32 sines are 1e-8 off")
    parser.add_argument("--regions", default="auto", help="of the DiT: whole, or blocks, compiled one by one")
    parser.add_argument("--mesh", help="of the DiT: ranks, or branches x ranks")
    parser.add_argument("--check", action="store_true", help="compare with the unsharded models")
    parser.add_argument("--save", type=Path, help="write tokens, latents and picture (torch.save)")
    parser.add_argument("--json", type=Path)
    return parser


def main() -> int:
    """Exit code 0, or 1 if the check failed; 2 for usage."""
    p = parser()
    args = p.parse_args()
    torch.set_grad_enabled(False)
    try:
        one_of("--preset", args.preset, PRESETS)
        if args.steps < 1:
            raise RequestError(f"--steps {args.steps} makes no picture")
        dtype = dtype_named(args.dtype or {"tiny": "float32", "full": "bfloat16"}[args.preset])
        engine = args.engine or ("eager" if dtype == torch.float64 else "inductor")
        request = Request(
            args.preset, dtype, args.prompt, args.steps, args.guidance, args.seed, engine, args.regions, args.mesh
        )
        on_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
        with world_or_one(on_gpu) as world:
            return _run(request, world, on_gpu, args)
    except (RequestError, OptionError) as error:
        p.error(str(error))


def _run(request: Request, world: World | None, on_gpu: bool, args: argparse.Namespace) -> int:
    rank = world.rank if world else 0
    device = world.device if world else torch.device("cuda" if on_gpu else "cpu")

    def every(value: T) -> list[T]:
        return world.gather(value) if world else [value]

    example = Example(request, rank, device)
    found, latents, picture = example.run()
    exchanges = example.exchanges()
    checks = every(example.check(found, latents, picture) if args.check else {})
    worst = {name: max((c[name] for c in checks), key=lambda a: (a.error != a.error, a.error)) for name in checks[0]}
    right = all(a.error <= allowed(a) for a in worst.values())  # False for NaN
    works = every(example.work)
    if rank:
        return int(not right)
    height, width = picture.shape[-2:]
    print(f"{len(works)} rank{'s' * (len(works) > 1)} on {device.type}, {request.preset}, {dtype_name(request.dtype)}")
    print(f"{found.written} tokens -> {found.rows} rows of {found.columns} -> {height}x{width} pixels")
    for work in works:
        print(work)
    for name, kinds in exchanges.items():
        print(f"{name}: " + (", ".join(f"{kind} {count}" for kind, count in kinds.items()) or "not sharded"))
    for name, against in worst.items():
        errors = f"error {against.error:.2e}, eager's {against.eager_error:.2e}, allowed {allowed(against):.2e}"
        print(f"{name} against one device: {errors}")
    if args.save:
        torch.save({"tokens": found.tokens.cpu(), "latents": latents.cpu(), "picture": picture.cpu()}, args.save)
    if args.json:
        about = {
            "preset": request.preset,
            "dtype": dtype_name(request.dtype),
            "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
            "torch": torch.__version__,
            "written": found.written,
            "pixels": [height, width],
            "ranks": [asdict(work) for work in works],
            "exchanges": exchanges,
            "check": {n: {"error": a.error, "eager": a.eager_error, "allowed": allowed(a)} for n, a in worst.items()},
        }
        args.json.write_text(json.dumps(about, indent=1))
    return int(not right)


if __name__ == "__main__":
    raise SystemExit(main())
