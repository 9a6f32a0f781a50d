"""One rank of `test_shard.py`, under torchrun: `-m tests.gpu.shard_nccl FOLDER DEVICE [CASE...]` (`cases.py`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import pvae
from pvae.runtime.sharded_tensor import ShardedTensor
from pvae.testing import Agreement, agreement, relative_error
from pvae.tools.zoo import load
from tests.gpu.cases import Facts, lifted, run_cases

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


def _halo(case: Any, sharding: Sharding, **options: Any) -> Agreement:
    """In float64 against itself unsharded, else by the error contract; the second run, which captures nothing."""
    if sharding.dtype is torch.float64:
        with lifted():
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


def check(sharding: Sharding, device: torch.device) -> Facts:
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
    return {"ok": found.ok and (any(exchanges) or sharding.form == "patch"), "text": str(found)}


CASES = {str(case): partial(check, case) for case in _cases()}

if __name__ == "__main__":
    run_cases(CASES, sys.argv[1:])
