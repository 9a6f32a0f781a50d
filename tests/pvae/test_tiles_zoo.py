"""The tile form on every autoencoder of the zoo that tiles, against the model's own serial tiling, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import pvae
from pvae import tiles
from pvae.module import compiled_forwards
from pvae.tile_blend import VectorBlend
from pvae.tile_plan import TilePlan
from pvae.tiles import remove_tiles
from tests.pvae.tiles_case import InOneProcess, why

TILE = 4  # latents


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


# The zoo ----------------------------------------------------------------------------------------------------------------

TILED = (
    "wan2.1", "wan2.2", "qwen-image", "hunyuan-video", "hunyuan-video-1.5", "ltx-video", "ltx-video-0.9.5", "ltx2-video",
    "cogvideox", "mochi", "magvit", "allegro", "kl", "flux2", "dc", "tiny-kl",
)  # fmt: skip
UNTILED = ("cosmos",)  # has `enable_tiling`, but its decode never looks at it


def zoo_case(name: str, part: str) -> Any:
    """A tiny float64 case whose tiles are four latents (eight frames) or the nearest that the model takes."""
    zoo = pytest.importorskip("pvae.tools.zoo.load")
    pytest.importorskip("diffusers")
    entry, case = zoo.ENTRIES[name], zoo.load(name, part=part, dtype=torch.float64)
    ratio, frames = entry.spatial, entry.temporal or 1
    stride = TILE // 2 if name == "ltx2-video" else TILE - 1  # its reflect padding takes no tile of one latent
    if (name, part) == ("wan2.2", "encode"):
        ratio //= 2  # it cuts tiles of patches of two pixels
    own = case.model.__dict__
    sizes = {
        **dict.fromkeys(("tile_sample_min_height", "tile_sample_min_width", "tile_sample_min_size"), TILE * ratio),
        **dict.fromkeys(("tile_sample_stride_height", "tile_sample_stride_width"), stride * ratio),
        **dict.fromkeys(("tile_latent_min_height", "tile_latent_min_width", "tile_latent_min_size"), TILE),
        **dict.fromkeys(("tile_overlap_factor", "tile_overlap_factor_height", "tile_overlap_factor_width"), 0.5),
        "tile_sample_min_num_frames": 2 * frames,
        "tile_sample_stride_num_frames": frames,
        "use_framewise_decoding": True,  # LTX, LTX2, Mochi, Magvit: in time too
        "use_framewise_encoding": name != "mochi",  # which cannot
        "spatial_compression_ratio": ratio,  # LTX2's says 32 whatever its blocks are
        "temporal_compression_ratio": frames,
        "kernel": (2 * frames, 3 * ratio, 4 * ratio),  # Allegro
        "stride": (frames, ratio, 2 * ratio),
    }
    for key in sizes.keys() & own.keys():
        setattr(case.model, key, sizes[key])
    return case


def run(case: Any, model: Any) -> Tensor:
    """Decode or encode by the model's own methods: the zoo goes around Allegro's tiles."""
    out = getattr(model, case.part)(*case.inputs, **case.kwargs, return_dict=False)[0]
    return out if isinstance(out, Tensor) else out.parameters


def test_the_list_is_complete() -> None:
    zoo = pytest.importorskip("pvae.tools.zoo.load")
    diffusers = pytest.importorskip("diffusers")
    able = {
        n
        for n, e in zoo.ENTRIES.items()
        if "use_tiling" in getattr(diffusers, e.cls).__init__.__wrapped__.__code__.co_names
    }
    assert able == {*TILED, *UNTILED}


@pytest.mark.parametrize("part", ["decode", "encode"])
@pytest.mark.parametrize("name", TILED)
def test_zoo(name: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = zoo_case(name, part)
    twin = copy.deepcopy(case.model)
    twin.enable_tiling()
    for key in ("tile_latent_min_height", "tile_latent_min_width"):  # CogVideoX works them out
        if key in vars(case.model):
            setattr(twin, key, getattr(case.model, key))
    wanted = run(case, twin)
    before = {k: v for k, v in vars(case.model).items() if k != "_modules"}
    group = InOneProcess(case.model, monkeypatch)
    for world in (2, 5):
        group.at(world)
        assert torch.equal(run(case, case.model), wanted), f"world {world}"
        assert sum(group.computed[-1]) == sum(s.numel() for s in map(torch.Size, shapes_sent(group.plan)))
        assert len(group.plan.costs) < 2 or all(group.computed[-1][:2]), "two ranks at least have work"
    assert len(group.plan.costs) > 1
    video = case.inputs[0].dim() == 5 and part == "decode" and name not in ("qwen-image", "hunyuan-video-1.5")
    assert len(group.plan.calls) > 4 or not video, "in time too"
    remove_tiles(case.model)
    assert {k: v for k, v in vars(case.model).items() if k != "_modules" and k in before} == before
    assert not any(isinstance(v, (tiles.TiledEntry, VectorBlend)) for v in vars(case.model).values())


def shapes_sent(plan: TilePlan) -> list[tuple[int, ...]]:
    return [call.kind.outputs[i].shape for call in plan.calls for i in call.sends]


def test_a_model_that_never_tiles_is_computed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    case = zoo_case("cosmos", "decode")
    wanted = run(case, case.model)
    InOneProcess(case.model, monkeypatch)
    assert torch.equal(run(case, case.model), wanted)
    assert "is computed whole by every rank: it is one tile" in why(case.model)


def test_slices_of_a_batch_are_tasks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    case = zoo_case("kl", "decode")
    case = replace(case, inputs=(torch.cat([case.inputs[0], -case.inputs[0]]),))
    case.model.use_slicing = case.model.use_tiling = True
    wanted = run(case, case.model)
    group = InOneProcess(case.model, monkeypatch)
    assert torch.equal(run(case, case.model), wanted)
    assert len(group.plan.costs) == 12
    whole = case.model.tiled_decode(case.inputs[0]).sample  # called by itself, both pictures at once
    assert len(group.plan.costs) == 6
    remove_tiles(case.model)
    assert torch.equal(whole, case.model.tiled_decode(case.inputs[0]).sample)


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox", "magvit"])
def test_compiled_regions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shape of tile is one captured kind, whichever way caches travel."""
    case = zoo_case(name, "decode")
    case = replace(case, inputs=(case.inputs[0][..., :3, :6].contiguous(),))  # a tile of four and one of three columns
    twin = copy.deepcopy(case.model)
    twin.use_tiling = True
    wanted = run(case, twin)
    pvae.compile(case.model, engine="eager", strict="on", passes="canonicalize", verify="off")
    group = InOneProcess(case.model, monkeypatch)
    for _ in range(2):
        torch.testing.assert_close(run(case, case.model), wanted, rtol=1e-12, atol=1e-12)
    (decoder,) = [f for f in compiled_forwards(case.model) if f.module is case.model.decoder]
    assert 0 < len(decoder.programs) == len({call.key for call in group.plan.calls})
    assert "tasks, by rank" in why(case.model)
    remove_tiles(case.model)
    assert case.model.decoder.forward is decoder
