"""Every autoencoder of the zoo, sharded over any mesh, equals itself unsharded in float64 to 1e-12; encode and decode.

The default profile takes one mesh and size for each model and part, in turn; `--hypothesis-profile=deep` takes all. Run as
a script it prints the table of all, or of the models that are named: `python -m tests.pvae.test_shard_zoo [NAME...]`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import cycle

import pytest
import torch
from hypothesis import settings
from torch import Tensor

pytest.importorskip("diffusers")

from pvae.options import parse_options
from pvae.passes.ir import output_node
from pvae.testing import FLOAT64_BOUND, capture, lift_float32
from pvae.tools.zoo import load, names
from pvae.tools.zoo.load import ENTRIES, parts
from tests.pvae.replay import Call, Outcome, record, replay

LATENTS = (5, 7)  # rows and columns that no world of 2, 3 or 4 divides; the tiny presets have 4 x 6, too few for five
MESHES = (
    *(((world,), dims) for dims in ("h", "w") for world in (2, 3, 4, 5)),
    *((shape, "hw") for shape in ((2, 1), (1, 3), (2, 2), (5, 1), (3, 2))),
)
HALO = parse_options({"shard": "halo"}, {})


@lru_cache(maxsize=1)
def recorded(name: str, part: str, own_size: bool) -> tuple[Call, ...]:
    """The calls that the unsharded model makes, at the preset's size or at LATENTS."""
    entry = ENTRIES[name]
    size = (*entry.tiny.size[:-2], *(n * entry.spatial for n in LATENTS))
    case = load(name, part=part, dtype=torch.float64, size=None if own_size else size)
    return record(case, HALO)


def sharded(name: str, part: str, own_size: bool, shape: tuple[int, ...], dims: str) -> Outcome:
    outcome = replay(recorded(name, part, own_size), shape, replace(HALO, shard_dims=dims))
    assert outcome.cuts
    return outcome


def cases() -> Iterator[tuple[str, str, bool, tuple[int, ...], str]]:
    """(model, part, at the preset's own size, mesh, dims): all, or in turn one for each model and part."""
    every = [(own_size, *mesh) for own_size in (False, True) for mesh in MESHES]
    if settings.default.max_examples >= 1000:  # the profile `deep`
        yield from ((name, part, *how) for name in names() for part in parts(name) for how in every)
        return
    turn = cycle(every)
    yield from ((name, part, *next(turn)) for name in names() for part in parts(name))


@pytest.mark.parametrize(("name", "part", "own_size", "shape", "dims"), list(cases()), ids=str)
def test_sharded_equals_unsharded(name: str, part: str, own_size: bool, shape: tuple[int, ...], dims: str) -> None:
    outcome = sharded(name, part, own_size, shape, dims)
    assert outcome.error <= FLOAT64_BOUND, str(outcome)
    assert not outcome.computed_whole, str(outcome)


def test_casts_to_float32_are_lifted_and_nothing_else() -> None:
    third = torch.tensor(1 / 3)

    def function(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        narrow = x.to(torch.float32) * third
        return narrow.sin().type_as(x) + mask.to(torch.float32), mask.to(torch.float32) * 2

    x, mask = torch.randn(5, dtype=torch.float64), torch.tensor([True, False] * 2 + [True])
    gm = capture(function, x, mask).gm
    assert lift_float32(gm) == 1
    out, other = torch.fx.Interpreter(gm).run(x, mask)
    assert torch.equal(out, (x * third).sin() + mask) and other.dtype is torch.float32
    metas = [node.meta["val"].dtype for node in output_node(gm.graph).args[0]]
    assert metas == [torch.float64, torch.float32]
    assert lift_float32(gm) == 0


def test_the_turn_covers_every_mesh_and_size() -> None:
    assert {tuple(case[2:]) for case in cases()} == {(o, *mesh) for o in (False, True) for mesh in MESHES}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for own_size in (False, True):
        for name in sys.argv[1:] or names():
            for part in parts(name):
                for shape, dims in MESHES:
                    outcome = sharded(name, part, own_size, shape, dims)
                    mesh = "x".join(map(str, shape))
                    print(f"{name:18} {part} {'own' if own_size else '5x7'} {dims:2} {mesh:4} {outcome}", flush=True)
