"""The ranks of `test_fetch.py`'s gloo run: `fetch_gloo.py WORLD STORE`. Exits with 0 if all that they fetched is right."""

from __future__ import annotations

import sys
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from pvae.runtime.fetch import fetch
from pvae.runtime.mesh import make_mesh
from tests.ranks import on_forks

HAVE = (0, 5, 5, 9)  # rank 1 holds nothing
HALO = ((0, 7), (3, 7), (4, 9))
ONE_WAY = ((0, 5), (3, 7), (4, 9))  # rank 0 receives nothing
ALL = ((0, 9),) * 3
REALS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = (*REALS, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.complex128)


def main(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )
    group = make_mesh().groups[0]
    whole = torch.arange(2 * 3 * 9 * 4).reshape(2, 3, 9, 4)
    for dtype in DTYPES:
        x = whole.to(dtype) if dtype != torch.bool else whole % 3 == 0
        piece = x[:, :, HAVE[rank] : HAVE[rank + 1]].contiguous(memory_format=torch.channels_last)
        for need in (HALO, ONE_WAY, ALL):
            got = fetch(piece, 2, HAVE, need, rank, "zeros", group, channels_last=True)
            assert torch.equal(got, x[:, :, slice(*need[rank])]), (dtype, need)

    # Inductor: a rank that only sends, and pieces even enough for an all-gather, in one graph
    even = (0, 3, 6, 9)
    x = whole.float()

    @torch.compile(fullgraph=True, dynamic=False)
    def both(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sent = fetch(one * 2, 2, HAVE, ONE_WAY, rank, "zeros", group, channels_last=True)
        return sent + 1, fetch(other * 2, 2, even, ALL, rank, "zeros", group) + 1

    with torch.no_grad():
        sent, gathered = both(x[:, :, HAVE[rank] : HAVE[rank + 1]], x[:, :, even[rank] : even[rank + 1]])
    assert torch.equal(sent, x[:, :, slice(*ONE_WAY[rank])] * 2 + 1)
    assert torch.equal(gathered, x * 2 + 1)

    # A rotary table and a mask, as Inductor has them
    table = torch.polar(torch.ones(9, 4), torch.arange(36.0).reshape(9, 4))
    mask = torch.arange(9) % 4 > 0

    @torch.compile(fullgraph=True, dynamic=False)
    def rotated(x: torch.Tensor, table: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        table = fetch(table * table, 0, HAVE, HALO, rank, "zeros", group)
        mask = fetch(~mask, 0, HAVE, HALO, rank, "zeros", group)
        return torch.view_as_real(torch.view_as_complex(x) * table).masked_fill(mask[:, None, None], 0)

    mine, ours = slice(HAVE[rank], HAVE[rank + 1]), slice(*HALO[rank])
    x = torch.randn(9, 4, 2)
    with torch.no_grad():
        got = rotated(x[ours], table[mine], mask[mine])
    expected = torch.view_as_real(torch.view_as_complex(x) * table**2).masked_fill(~mask[:, None, None], 0)
    torch.testing.assert_close(got, expected[ours])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    world = int(sys.argv[1])
    sys.exit(on_forks(*(partial(main, rank, world, sys.argv[2]) for rank in range(world))))
