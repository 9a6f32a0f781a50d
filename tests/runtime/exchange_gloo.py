"""The ranks of `test_exchange.py`'s gloo run: `exchange_gloo.py WORLD STORE`. Exits with 0 if all that they got is right."""

from __future__ import annotations

import sys
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pvae.runtime.exchange import Box, exchange
from pvae.runtime.mesh import make_mesh
from tests.ranks import on_forks

ROWS = ((0, 5), (5, 5), (5, 9))  # rank 1 holds nothing
QUERIES: tuple[Box, ...] = (((0, 2), (0, 9)), ((2, 4), (0, 9)), ((4, 6), (0, 9)))
KEYS: tuple[Box, ...] = (((0, 1), (0, 9)), ((1, 2), (0, 9)), ((2, 3), (0, 9)))
ONE_WAY: tuple[Box, ...] = (((0, 6), (0, 5)), ((0, 6), (2, 4)), ((1, 4), (0, 9)))  # rank 0 receives nothing
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.complex128)


def rows(heads: int) -> tuple[Box, ...]:
    return tuple(((0, heads), row) for row in ROWS)


def cut(whole: Tensor, box: Box) -> Tensor:
    return whole[:, slice(*box[0]), slice(*box[1])]


def main(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )
    group = make_mesh().groups[0]
    q = torch.randint(2, (2, 6, 9, 4))
    k = torch.randint(2, (2, 3, 9, 4))
    for dtype in DTYPES:
        wholes = [q.to(dtype), k.to(dtype), q.to(dtype)]
        have, need = (rows(6), rows(3), rows(6)), (QUERIES, KEYS, ONE_WAY)
        for some in ([0, 1], [2], [0, 1, 2]):
            asked = [tuple(boxes[i] for i in some) for boxes in (have, need)]
            got = exchange([cut(wholes[i], have[i][rank]) for i in some], *asked, rank, group)
            for i, y in zip(some, got, strict=True):
                assert torch.equal(y, cut(wholes[i], need[i][rank])), (dtype, i)

    # Inductor: attention over split tokens with grouped queries, there and back
    x = torch.randn(2, 9, 24)
    weights = [torch.randn(heads * 4, 24) / 5 for heads in (6, 3, 3)]

    def projected(x: Tensor) -> list[Tensor]:
        return [F.linear(x, w).unflatten(2, (-1, 4)).transpose(1, 2).sin() for w in weights]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def whole(x: Tensor) -> Tensor:
        return attention(*projected(x)).transpose(1, 2).flatten(2) + x

    @torch.compile(fullgraph=True, dynamic=False)
    def split(x: Tensor) -> Tensor:
        have, need = (rows(6), rows(3), rows(3)), (QUERIES, KEYS, KEYS)
        y = attention(*exchange(projected(x), have, need, rank, group))
        (y,) = exchange([y], need[:1], have[:1], rank, group)
        return y.transpose(1, 2).flatten(2) + x

    mine = slice(*ROWS[rank])
    with torch.no_grad():
        torch.testing.assert_close(split(x[:, mine]), whole(x)[:, mine])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    world = int(sys.argv[1])
    sys.exit(on_forks(*(partial(main, rank, world, sys.argv[2]) for rank in range(world))))
