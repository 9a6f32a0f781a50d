"""One rank of `test_shard.py`, under torchrun: `shard_nccl.py FOLDER DEVICE [CASE...]`, on cuda (NCCL) or cpu (gloo).

Leaves in FOLDER what it found in each case, as JSON: `{case: {"ok": ..., "text": ...}}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import pvae
from pvae import module
from pvae.runtime.sharded_tensor import ShardedTensor
from pvae.testing import Agreement, agreement, lift_float32, relative_error
from pvae.tools.zoo import load

# Pixels whose latents no world of 2 or 4 divides. The tiny models, and the published ones at a middling size.
SIZES = {
    ("kl", "tiny"): (40, 56),
    ("kl", "full"): (312, 504),
    ("wan2.1", "tiny"): (9, 40, 56),
    ("wan2.1", "full"): (9, 152, 248),
    ("qwen-image", "tiny"): (40, 56),
    ("qwen-image", "full"): (312, 504),
}


@dataclass(frozen=True)
class Sharding:
    """A model and how it is sharded."""

    model: str
    preset: str
    dtype: torch.dtype
    form: str
    dims: str
    engine: str = "eager"
    part: str = "decode"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.model}-{self.preset}-{self.part}-{dtype}-{self.form}-{self.dims}-{self.engine}"


def _cases() -> Iterator[Sharding]:
    for name, preset in SIZES:
        for dims in ("h", "w", "hw"):
            yield Sharding(name, preset, torch.bfloat16, "halo", dims)
            if preset == "tiny":
                yield Sharding(name, preset, torch.float64, "halo", dims)
        yield Sharding(name, preset, torch.bfloat16, "halo", "hw", part="encode")
        yield Sharding(name, preset, torch.bfloat16, "patch", "hw")
        yield Sharding(name, preset, torch.bfloat16, "halo", "h", engine="inductor")


CASES = {str(case): case for case in _cases()}


@contextmanager
def _lifted() -> Iterator[None]:
    """Captured graphs stay in float64 where the model rounds to float32: a last bit would become one of float32."""
    compile_capture = module.compile_capture

    def lifted(capture: Any, *args: Any, **kwargs: Any) -> Any:
        lift_float32(capture.gm)
        return compile_capture(capture, *args, **kwargs)

    module.compile_capture = lifted
    try:
        yield
    finally:
        module.compile_capture = compile_capture


def _halo(case: Any, sharding: Sharding, **options: Any) -> Agreement:
    """In float64 against itself unsharded, else by the error contract; the second run, which captures nothing."""
    if sharding.dtype is torch.float64:
        with _lifted():
            wanted = case.run(pvae.compile(case.model, engine="eager", passes="canonicalize"))
            pvae.compile(case.model, shard="halo", **options)
            case.run()
            got = case.run()
            return agreement(got, wanted, wanted)
    exact, eager = case.cast(torch.float64).run(), case.run()
    pvae.compile(case.model, shard="halo", **options)
    case.run()
    return agreement(case.run(), eager, exact)


def _patch(case: Any, sharding: Sharding, **options: Any) -> Agreement:
    """With context up to the picture's edges by the error contract; with little of it approximate, alike on every rank."""
    exact, eager = case.cast(torch.float64).run(), case.run()
    few = case.run(pvae.compile(case.model, shard="patch", patch_context=1, **options))
    assert not isinstance(few, ShardedTensor) and few.isfinite().all()
    everyone = [torch.empty_like(few) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, few.contiguous())
    assert all(torch.equal(other, few) for other in everyone), "the ranks have different pictures"
    everything = max(case.inputs[0].shape[-2:])
    whole = case.run(pvae.compile(case.model, shard="patch", patch_context=everything, **options))
    assert relative_error(few, exact) > relative_error(whole, exact), "one row of context is as good as all"
    return agreement(whole, eager, exact)


def check(sharding: Sharding, device: torch.device) -> dict[str, Any]:
    start = time.monotonic()
    try:
        case = load(
            sharding.model,
            preset=sharding.preset,
            part=sharding.part,
            dtype=sharding.dtype,
            device=device,
            size=SIZES[sharding.model, sharding.preset],
        )
        run = _patch if sharding.form == "patch" else _halo
        found = run(case, sharding, shard_dims=sharding.dims, engine=sharding.engine, timeout=300)
        exchanges = [p.counters["exchange"] for g in pvae.report(case.model).graphs for p in g.passes]
        facts = {"ok": found.ok and (any(exchanges) or sharding.form == "patch"), "text": str(found)}
    except Exception as error:
        facts = {"ok": False, "text": f"{type(error).__name__}: {error}"}
    pvae.reset()
    torch._dynamo.reset()
    return {**facts, "seconds": round(time.monotonic() - start, 1)}


def main(folder: str, device_type: str, wanted: list[str]) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    device = torch.device(device_type)
    if device_type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timedelta(seconds=300))
    found: dict[str, Any] = {}
    for name in wanted or CASES:
        found[name] = check(CASES[name], device)
        if rank == 0:
            print(name, found[name], flush=True)
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
