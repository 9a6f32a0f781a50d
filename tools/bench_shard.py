"""Decode or encode on several ranks, by pvae's forms and by other packages, side by side: time, memory, error.

    torchrun --nproc_per_node 4 -m pvae.tools.bench_shard wan2.1 --rows halo,patch,tile,distvae,vllm-omni-fused

`eager` and `pvae` are unsharded: every rank computes it all. `halo`, `patch`, `tile` and `auto` are
`pvae.compile(vae, shard=...)`. The others are packages that are installed beside pvae; a row whose package is missing, or
which does not take the model, fails alone (exit code 1). Every call starts and ends with all ranks: a time is the wall time
until the last one has its result, the median over `--runs` after two calls; memory is the fullest rank's peak; the ratio is
the first row's time over this one's. pvae's rows run under `strict=on` (where a graph would stay eager the row fails),
unless `-o strict=off`. With `--error-size` every row also runs at that size, on the same ranks and in the form that `auto`
chose at the full size, and is compared with float64, as is eager; choose more pixels than one tile there for `tile`.
"""

from __future__ import annotations

import argparse
import gc
import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import pvae
from pvae.module import compile_with, compiled_forwards
from pvae.options import OptionError, Options, parse_options
from pvae.passes.pipeline import PipelineError
from pvae.tools.bench_ranks import Comparison, Figures, RowError, World, add_arguments, joined, started, write_json
from pvae.tools.model_run import Request, RequestError, dtype_named, options_named, size_named
from pvae.tools.timing import Timing, measure
from pvae.tools.zoo import Case, Unsupported

# Rows ------------------------------------------------------------------------------------------------------------------


def _peer(module: str, install: str) -> Any:
    """A module of another package; RowError with what to install where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RowError(f"{module} cannot be imported ({error}): pip install {install}") from error


def distvae(case: Case) -> None:
    """DistVAE's halo adapters (https://github.com/xdit-project/DistVAE), which say themselves which models they take."""
    package = _peer("distvae.vae", "distvae")
    parallelize = package.parallelize_decoder if case.part == "decode" else package.parallelize_encoder
    parallelize(case.model, dist.group.WORLD)


def vllm_omni_shard(case: Case) -> None:
    """vLLM-Omni's halo decode of Wan, rows over ranks (https://github.com/vllm-project/vllm-omni)."""
    if type(case.model).__name__ != "AutoencoderKLWan" or case.part != "decode":
        raise RowError(f"vLLM-Omni shards the decode of AutoencoderKLWan, not {type(case.model).__name__} {case.part}")
    module = _peer("vllm_omni.diffusion.distributed.autoencoders.wan_spatial_shard", "vllm vllm-omni")
    module.install_wan_spatial_shard_decode(case.model, dist.group.WORLD, split_dim="height", dst=None)


def vllm_omni_fused(case: Case) -> None:
    """The same with its fused kernels."""
    vllm_omni_shard(case)
    module = _peer("vllm_omni.diffusion.distributed.autoencoders.wan_decoder_fast_path", "vllm vllm-omni")
    dtype = case.inputs[0].dtype
    half = dtype if dtype in (torch.bfloat16, torch.float16) else None
    module.install_wan_decoder_fast_path(case.model, conv_dtype=half, level="fused")


FORMS: Mapping[str, str] = {"pvae": "none", "halo": "halo", "patch": "patch", "tile": "tile", "auto": "auto"}
OTHERS: Mapping[str, Callable[[Case], None]] = {
    "eager": lambda case: None,
    "distvae": distvae,
    "vllm-omni-shard": vllm_omni_shard,
    "vllm-omni-fused": vllm_omni_fused,
}
ROWS = ("eager", *FORMS, *(row for row in OTHERS if row != "eager"))


def row_options(row: str, given: Mapping[str, Any]) -> Options | None:
    """What a row of pvae's compiles with, None for the others. Raises OptionError, also where PVAE_SHARD would make it
    another row."""
    if row not in FORMS:
        return None
    options = parse_options({"strict": "on", **given, "shard": FORMS[row]})
    if options.shard != FORMS[row]:
        raise OptionError(f"PVAE_SHARD={options.shard} in the environment overrides row {row!r}; unset it")
    return options


def install(row: str, case: Case, options: Options | None) -> None:
    """Make `case.model` what the row measures."""
    if options is None:
        OTHERS[row](case)
    else:
        compile_with(case.model, options)


def decided(case: Case) -> Options | None:
    """What pvae compiled the measured part with, `auto` replaced by its choice; None where it compiled nothing."""
    forwards = compiled_forwards(case.model.get_submodule(case.regions[0]))
    return forwards[0].options if forwards else None


def _form(options: Options | None) -> Mapping[str, Any] | None:
    if options is None:
        return None
    return {"shard": options.shard, "shard_dims": options.shard_dims, "mesh": options.mesh}


# Measuring -------------------------------------------------------------------------------------------------------------


class Bench:
    """The rows of one model on one world. `request` names the model, `comparison` the same at `--error-size`."""

    def __init__(self, world: World, request: Request, comparison: Comparison | None, given: Mapping[str, Any]) -> None:
        self.world, self.request, self.comparison, self.given = world, request, comparison, given
        self.first_ms: float | None = None

    def _measured(self, row: str, runs: int) -> tuple[list[Timing], Options | None]:
        """Each rank's timing, and what pvae decided to compile with."""
        case = self.request.load()

        def together() -> None:
            case.run()
            dist.barrier()  # waits for this rank's kernels too

        self.world.attempt(lambda: install(row, case, row_options(row, self.given)))
        dist.barrier()
        timings = self.world.gather(self.world.attempt(lambda: measure(together, self.world.device, runs)))
        return timings, decided(case)

    def row(self, row: str, runs: int, first: bool) -> Figures:
        """Measure one row; `first` makes it the one that the others' ratios are of."""
        torch._dynamo.reset()
        pvae.reset()
        gc.collect()  # a compiled model lies in a cycle: its weights would count in this row's peak
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            timings, options = self._measured(row, runs)
            error = None
            if self.comparison is not None:
                error = self.comparison.error(lambda case: install(row, case, options))
        except RowError as failure:
            return Figures(row, failed=str(failure))
        ms = max(t.median_s for t in timings) * 1e3
        if first:
            self.first_ms = ms
        peaks = [t.peak_bytes for t in timings if t.peak_bytes is not None]
        return Figures(
            row,
            ms,
            ratio=None if self.first_ms is None else self.first_ms / ms,
            first_s=max(t.first_s for t in timings),
            peak_gib=max(peaks) / 2**30 if peaks else None,
            error=error,
            eager_error=None if self.comparison is None else self.comparison.eager_error,
            form=_form(options),
        )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="zoo name or diffusers:ClassName of an autoencoder")
    parser.add_argument("--rows", default="eager,pvae,halo,patch,tile", help=", ".join(ROWS))
    parser.add_argument("--part", default="decode", choices=("decode", "encode"))
    add_arguments(parser, "pixels", runs=3)
    parser.add_argument("--shard-dims", help="of pvae's rows: auto, h, w, hw")
    return parser


def main() -> int:
    """Exit code 0, or 1 if a row failed; 2 for usage."""
    p = parser()
    args = p.parse_args()
    try:
        rows = started(args, ROWS, "bench_shard")
        given = options_named(args.option, {"shard_dims": args.shard_dims})
        if "shard" in given:
            raise RequestError("the rows say what shard is; leave -o shard away")
        for row in rows:
            row_options(row, given)
        on_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
        with joined(on_gpu, timedelta(seconds=parse_options(given).timeout)) as world:
            size = size_named(args.size) if args.size else None
            request = Request(args.model, args.part, args.preset, dtype_named(args.dtype), str(world.device), size)
            small = replace(request, size=size_named(args.error_size)) if args.error_size else None
            bench = Bench(world, request, None if small is None else Comparison(world, small.load), given)
            results: list[Figures] = []
            for row in rows:
                results.append(bench.row(row, args.runs, first=not results))
                if world.rank == 0:
                    print(results[-1], flush=True)
            if args.json and world.rank == 0:
                write_json(args, world, given, part=args.part, rows=[asdict(r) for r in results])
    except (RequestError, Unsupported, OptionError, PipelineError) as error:
        p.error(str(error))
    return int(any(r.failed for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
