"""What on this machine helps or hinders pvae: versions, devices, compiler, settings, traps, and a quick self-test."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import pvae
from pvae.options import PREFIX, parse_options
from pvae.runtime.torch_compat import cpp_compiler, inductor_cache_dir
from pvae.testing import assert_equivalent

OK, NOTE, BROKEN = "ok", "note", "broken"


@dataclass(frozen=True)
class Finding:
    """`state` is `ok`, `note` (works, but know this) or `broken` (and then `text` says what to do)."""

    name: str
    state: str
    text: str


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    yield Finding("pvae", OK, f"{pvae.__version__}, Python {platform.python_version()}, {platform.platform()}")
    release = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if (2, 11) <= release < (2, 14):
        yield Finding("torch", OK, torch.__version__)
    else:
        yield Finding("torch", BROKEN, f"{torch.__version__}; pvae needs 2.11 to 2.13: pip install 'torch>=2.11,<2.14'")
    triton = _installed("triton") or _installed("triton-rocm") or _installed("pytorch-triton-rocm")
    if triton is not None:
        yield Finding("triton", OK, triton)
    else:
        state = BROKEN if torch.cuda.is_available() else NOTE
        yield Finding("triton", state, "not installed; Inductor needs it on a GPU: pip install triton")
    diffusers = _installed("diffusers")
    missing = "not installed; the zoo's models come from it: pip install 'pvae[models]'"
    yield Finding("diffusers", OK if diffusers else NOTE, diffusers or missing)


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch sees none" if built else "this build of torch is for the CPU"
        yield Finding("GPU", NOTE, f"none ({why}); everything runs on the CPU")
        return
    library = f"HIP {torch.version.hip}, MIOpen" if torch.version.hip else f"CUDA {torch.version.cuda}, cuDNN"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        name = f"{found.name}, {memory}, {library} {torch.backends.cudnn.version()}"
        yield Finding(f"GPU {index}", OK, name)


def _cores() -> int:
    """Cores that this process may use: its affinity, cut by the container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        limit, period = quota.read_text().split()
        if limit != "max":
            count = min(count, max(1, int(limit) // int(period)))
    return count


def _cpu() -> Iterator[Finding]:
    cores, threads = _cores(), torch.get_num_threads()
    if threads > cores:
        text = f"{threads} threads on {cores} cores slow every operation down; set OMP_NUM_THREADS={cores}"
        yield Finding("CPU", NOTE, text)
    else:
        yield Finding("CPU", OK, f"{cores} cores, {threads} threads")
    compiler = cpp_compiler()
    if compiler is not None:
        yield Finding("C++ compiler", OK, compiler)
    elif torch.cuda.is_available():
        yield Finding("C++ compiler", NOTE, "none; models on the CPU then need engine='eager'")
    else:
        text = "none, and without a GPU Inductor needs one: install g++ or set CXX; until then use engine='eager'"
        yield Finding("C++ compiler", BROKEN, text)


def _torch_compile() -> Iterator[Finding]:
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends")
    if any(entry.name == "pvae" for entry in entries):
        yield Finding("backend", OK, "torch.compile(model, backend='pvae') finds it with nothing imported")
    else:
        yield Finding("backend", BROKEN, "entry point not registered; install the package: pip install pvae")
    for variable in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(variable, "0") not in ("", "0"):
            yield Finding(variable, NOTE, "set: torch.compile runs the model eagerly, whatever the backend")
    directory = Path(inductor_cache_dir())
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    if os.access(existing, os.W_OK):
        yield Finding("Inductor cache", OK, f"{directory}{'' if directory.exists() else ' (not made yet)'}")
    else:
        text = f"{directory} cannot be written; set TORCHINDUCTOR_CACHE_DIR to a folder that can"
        yield Finding("Inductor cache", BROKEN, text)


def _variables() -> Iterator[Finding]:
    mine = {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIX)}
    try:
        parse_options()
    except ValueError as error:  # OptionError or PipelineError
        yield Finding("environment", BROKEN, str(error))
    else:
        text = ", ".join(f"{name}={value}" for name, value in mine.items())
        yield Finding(
            "environment", NOTE if mine else OK, f"{text}: wins over the code" if mine else "no PVAE_* variable"
        )


def _traps() -> Iterator[Finding]:
    if torch.__version__.startswith("2.11."):
        text = (
            "torch.compile breaks Wan's decoder into many graphs on torch 2.11; pvae.compile(vae) captures it in three"
        )
        yield Finding("Wan", NOTE, text)


def _self_test() -> Iterator[Finding]:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv3d(4, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv3d(8, 4, 1)).eval()
    x = torch.randn(1, 4, 3, 8, 8, generator=generator)
    start = time.perf_counter()
    try:
        found = assert_equivalent(
            model, (x,), options={"engine": "eager", "conv3d": "unfold2d", "expect": {"conv3d_unfold": 2}}
        )
    except Exception as error:  # whatever is wrong, a doctor says so and goes on
        yield Finding("self-test", BROKEN, f"{type(error).__name__}: {error}")
    else:
        yield Finding("self-test", OK, f"two convolutions rewritten in {time.perf_counter() - start:.1f} s, {found[0]}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _versions,
    _devices,
    _cpu,
    _torch_compile,
    _variables,
    _traps,
    _self_test,
)


def examine() -> Iterator[Finding]:
    """Every finding, the slow self-test last."""
    for look in CHECKS:
        yield from look()
