"""What the tests of tiles start from: every rank of a model, one after another in one process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae import tiles
from pvae.module import regions
from pvae.options import Options
from pvae.runtime.mesh import Mesh
from pvae.runtime.rank_agreement import RankAgreement
from pvae.tile_plan import TilePlan
from pvae.tiles import Tiles, install_tiles


def mesh(world: int, rank: int = 0) -> Mesh:
    return Mesh((world,), ("tiles" if world > 1 else None,), rank, (rank,))


def installed(model: nn.Module, world: int = 2, rank: int = 0, options: Options | None = None) -> Tiles:
    return install_tiles(model, regions(model), mesh(world, rank), options or Options())


class InOneProcess:
    """All ranks of a model's tiles, one after another on the one model; what they exchange is laid end to end."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiles = installed(model)
        self.tiles.agreement = RankAgreement(None, 0, [0], 1)
        self.computed: list[list[int]] = []  # sizes of what each rank computed, at each call
        compute = self.tiles._compute
        buffers: list[dict[torch.dtype, Tensor]] = []

        def by_each(*call: Any) -> dict[torch.dtype, Tensor]:
            own = self.tiles.mesh
            buffers[:] = []
            for rank in range(self.tiles.world):
                self.tiles.mesh = mesh(self.tiles.world, rank)
                buffers.append(compute(*call))
            self.tiles.mesh = own
            self.computed.append([sum(map(Tensor.numel, b.values())) for b in buffers])
            return buffers[0]

        def gather(x: Tensor, dim: int, have: Any, need: Any, rank: int, group: str | None) -> Tensor:
            pieces = [b[x.dtype] for b in buffers]
            assert [*itertools.accumulate(map(len, pieces), initial=0)] == list(have)
            assert need == ((0, have[-1]),) * len(pieces)
            return torch.cat(pieces)

        monkeypatch.setattr(self.tiles, "_compute", by_each)
        monkeypatch.setattr(tiles, "fetch", gather)

    def at(self, world: int) -> None:
        self.tiles.mesh = mesh(world)

    @property
    def plan(self) -> TilePlan:
        *_, plan = self.tiles.planner._plans.values()
        assert isinstance(plan, TilePlan)
        return plan


def why(model: nn.Module) -> str:
    return "\n".join(pvae.report(model).notes)
