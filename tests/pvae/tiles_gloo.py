"""The ranks of `test_tiles.py`'s gloo run: `tiles_gloo.py WORLD STORE`. Exits with 0 if each decoded what one rank does."""

from __future__ import annotations

import copy
import sys
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from pvae.module import regions
from pvae.options import Options
from pvae.runtime.mesh import make_mesh
from pvae.runtime.rank_agreement import RankError
from pvae.tiles import install_tiles, remove_tiles
from pvae.tools.zoo import load
from tests.ranks import on_forks


def main(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    mesh = make_mesh()
    for name, dtype, parts in (("wan2.1", torch.float64, ("decode", "encode")), ("kl", torch.bfloat16, ("decode",))):
        for part in parts:
            case = load(name, part=part, dtype=dtype, size=(5, 24, 48) if name == "wan2.1" else (32, 48))
            model = case.model
            if name == "kl":
                model.tile_sample_min_size, model.tile_latent_min_size, model.tile_overlap_factor = 32, 4, 0.5
            else:
                model.tile_sample_min_height = model.tile_sample_min_width = 32
                model.tile_sample_stride_height = model.tile_sample_stride_width = 24
            serial = copy.deepcopy(model)
            serial.enable_tiling()
            wanted = case.run(serial)
            install_tiles(model, regions(model), mesh, Options(), seconds=60, check_values=True)
            for _ in range(2):
                assert torch.equal(case.run(), wanted), (name, part)
            # one rank decodes another picture: all are told, and can go on
            other = tuple(x + (rank == 1) for x in case.inputs)
            try:
                case.run(inputs=other)
            except RankError as error:
                assert error.ranks == (1,), error
                assert "values of input 0" in str(error), error
            else:
                raise AssertionError("no rank noticed that the inputs differ")
            assert torch.equal(case.run(), wanted), (name, part)
            remove_tiles(model)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    from diffusers import AutoencoderKL, AutoencoderKLWan  # noqa: F401  (once for all ranks)

    world = int(sys.argv[1])
    sys.exit(on_forks(*(partial(main, rank, world, sys.argv[2]) for rank in range(world))))
