"""One rank of `test_sequence.py`, under torchrun: `-m tests.gpu.sequence_nccl FOLDER DEVICE [CASE...]` (`cases.py`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pvae
from pvae.testing import agreement, relative_error
from pvae.tools.bench_sequence import Subject
from pvae.tools.zoo import Case
from tests.gpu.cases import Facts, lifted, run_cases

SECONDS = 300.0  # that ranks wait for each other: a compile of a published block lies between
SLOW = "h200,matrix=1e8,fp32=1e8,fp64=1e8,memory=1e8,link=1e6"  # to which heads exchange pays for any number of tokens


@dataclass(frozen=True)
class Sharded:
    """A transformer at a size in latents, and how it is compiled: `by` compile (pvae's, whole or by blocks) or dynamo."""

    model: str
    size: tuple[int, ...]
    preset: str = "tiny"
    dtype: torch.dtype = torch.bfloat16
    engine: str = "inductor"
    by: str = "whole"
    heads: bool = False  # attention by heads exchange; else as the pass chooses, which for few tokens gathers the keys
    more: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        size = "x".join(map(str, self.size))
        more = [*["heads"] * self.heads, *(f"{name}={value}" for name, value in self.more)]
        return "-".join([self.model, self.preset, size, dtype, self.by, self.engine, *more])

    def load(self, device: torch.device) -> Case:
        return Subject(self.model, self.preset, None, self.dtype, device, self.size).load()

    def compile(self, case: Case) -> Callable[[], Tensor]:
        """What runs the case sharded."""
        more = {name: value.replace("N", str(dist.get_world_size() // 2)) for name, value in self.more}
        options = {"shard": "sequence", "strict": "on", "engine": self.engine, "timeout": SECONDS, **more}
        if self.heads:
            options["machine"] = SLOW
        if self.by != "dynamo":
            pvae.compile(case.model, regions=self.by, **options)
            return case.run
        compiled = torch.compile(case.model, backend="pvae", dynamic=False, options=options)
        return lambda: case.run(compiled)


# Token counts that no world of 2 or 4 divides; 4 heads (Wan), 3 (Qwen-Image with its mask, Flux), 4 and 2 (Krea 2).
TINY = {
    "wan2.1-dit": (3, 6, 10),
    "qwen-image-dit": (6, 10),
    "flux-dit": (6, 10),
    "krea2-dit": (6, 10),
}
# Fewer tokens of the picture than 4 ranks: some have none, and their kernels get empty tensors.
FEW = {"wan2.1-dit": ((1, 2, 4), (1, 2, 6)), "qwen-image-dit": ((2, 2),)}
FULL = {"wan2.1-dit": (3, 14, 18), "qwen-image-dit": (34, 50)}


def _sharded() -> Iterator[Sharded]:
    double = {"dtype": torch.float64, "engine": "eager"}
    for name, size in TINY.items():
        yield Sharded(name, size, heads=True)
        yield Sharded(name, size, heads=True, **double)
    for name, sizes in FEW.items():
        for size in sizes:
            yield Sharded(name, size)
    for name, size in FULL.items():
        yield Sharded(name, size, "full")
        yield Sharded(name, size, "full", by="blocks")
    for name, size in TINY.items():
        yield Sharded(name, size, by="blocks")
        yield Sharded(name, size, by="dynamo")
    yield Sharded("wan2.1-dit", TINY["wan2.1-dit"], more=(("mesh", "2xN"),))
    for name, size in TINY.items():
        yield Sharded(name, size, by="blocks", **double)
        yield Sharded(name, size, by="blocks", heads=True, **double)
        for few in FEW.get(name, ()):
            yield Sharded(name, few, **double)


def check(sharded: Sharded, device: torch.device) -> Facts:
    """In float64 against itself unsharded, else by the error contract; the second run, which captures nothing."""
    case = sharded.load(device)
    if sharded.dtype is torch.float64:
        with lifted():
            wanted = case.run(pvae.compile(case.model, engine="eager", passes="canonicalize", regions=sharded.by))
            run = sharded.compile(case)
            run()
            found = agreement(run(), wanted, wanted)
    else:
        exact, eager = case.cast(torch.float64).run(), case.run()
        run = sharded.compile(case)
        run()
        found = agreement(run(), eager, exact)
    graphs = pvae.report(None).graphs
    counts = [p.counters for g in graphs for p in g.passes if p.name == "shard"]
    moved = {kind: n for kind in ("exchange", "gather", "heads") if (n := sum(c[kind] for c in counts))}
    fused = sum(g.matches("fuse_modulation") for g in graphs)
    as_asked = "heads" in moved if sharded.heads else bool(moved)
    if device.type == "cuda" and sharded.engine == "inductor":
        as_asked &= fused > 0  # on the ranks without tokens too
    return {"ok": found.ok and as_asked, "text": f"{found}; {moved}, {fused} chains fused"}


# Regions of rank 0 -----------------------------------------------------------------------------------------------------


def _alike(x: Tensor) -> bool:
    """Whether all ranks have the same values, whatever their number."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, x.tolist())
    return all(other == everyone[0] for other in everyone)


def main_rank_called(device: torch.device) -> Facts:
    """Sampled tokens of a number that only rank 0 knows, twice."""
    torch.manual_seed(dist.get_rank())
    ran: list[int] = []

    def generate(prompt: Tensor) -> dict[str, Any]:
        ran.append(1)
        length = int(torch.randint(3, 9, (), device=prompt.device))
        return {"tokens": torch.randint(100, (1, length), device=prompt.device), "length": length}

    generate = pvae.main_rank(generate)
    prompt, ok = torch.arange(4, device=device), True
    for _ in range(2):
        made = generate(prompt)
        ok &= made["tokens"].device == device and made["tokens"].shape == (1, made["length"]) and _alike(made["tokens"])
    wanted = 2 if dist.get_rank() == 0 else 0
    return {"ok": ok and len(ran) == wanted, "text": f"ran {len(ran)} times, made {made}"}


class Prompted(nn.Module):
    """A prompt embedded on rank 0, joined with tokens `[B, L, C]` that all ranks attend over."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Linear(8, 32), nn.Linear(32, 96)

    def encode(self, prompt: Tensor) -> Tensor:
        return torch.tanh(self.embed(prompt))

    def forward(self, prompt: Tensor, x: Tensor) -> Tensor:
        with pvae.main_rank():
            text = self.encode(prompt)
        q, k, v = self.qkv(torch.cat([text, x], 1)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def main_rank_compiled(device: torch.device, shard: str, dynamo: bool) -> Facts:
    """A region inside a compiled forward: rank 0's weights alone count."""
    torch.manual_seed(0)
    model = Prompted().to(device, torch.float64).eval()
    prompt, x = (torch.randn(2, n, c, dtype=torch.float64, device=device) for n, c in ((5, 8), (14, 32)))
    with torch.no_grad():
        text = model.encode(prompt)
        q, k, v = model.qkv(torch.cat([text, x], 1)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if dist.get_rank():
            model.embed.weight.fill_(torch.nan)
        options = {"shard": shard, "strict": "on", "timeout": SECONDS}
        run: Any = torch.compile(model, backend="pvae", options=options) if dynamo else pvae.compile(model, **options)
        run(prompt, x)
        error = relative_error(run(prompt, x), wanted)
    return {"ok": error < 1e-12, "text": f"error {error:.2e}"}


def _cases() -> Iterator[tuple[str, Callable[[torch.device], Facts]]]:
    for sharded in _sharded():
        yield str(sharded), lambda device, sharded=sharded: check(sharded, device)  # type: ignore[misc]
    yield "main-rank-called", main_rank_called
    for shard in ("none", "sequence"):
        for entrance in ("compile", "dynamo"):
            name = f"main-rank-{entrance}-shard={shard}"
            yield name, lambda device, how=(shard, entrance == "dynamo"): main_rank_compiled(device, *how)  # type: ignore[misc]


CASES = dict(_cases())


if __name__ == "__main__":
    run_cases(CASES, sys.argv[1:], SECONDS)
