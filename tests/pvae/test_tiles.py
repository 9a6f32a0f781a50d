"""The tile form: every autoencoder's own tiled decode and encode, by ranks of one process, then by real ones."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pvae
from pvae.module import regions
from pvae.options import Options
from pvae.runtime.mesh import Mesh
from pvae.runtime.rank_agreement import RankAgreement, RankError
from pvae.tile_plan import TilePlan
from pvae.tiles import install_tiles, remove_tiles, tiles_of
from tests.pvae.tiles_case import InOneProcess, installed, mesh, why
from tests.ranks import run_script


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


# Models of our own ------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Two-fold nearest decoder in four columns of a picture. `body(self, tiles of z)` is the tiled decode."""

    def __init__(self, body: Callable[[Toy, list[Tensor]], Any], decoder: nn.Module | None = None) -> None:
        super().__init__()
        self.decoder = decoder or Doubling()
        self.body = body
        self.use_tiling = False
        self.tile_size = 2

    def enable_tiling(self) -> None:
        self.use_tiling = True
        self.tile_size = 99  # as some models do: it must not stay

    def decode(self, z: Tensor) -> Any:
        """Columns of tile_size, each decoded by itself."""
        if not self.use_tiling or z.shape[-1] <= self.tile_size:
            return self.decoder(z)
        return self.body(self, list(z.split(self.tile_size, -1)))


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).repeat_interleave(2, -1)


Z = torch.randn(1, 3, 4, 7, dtype=torch.float64)


def serial(model: nn.Module, *args: Any) -> Any:
    """What one process computes with tiles."""
    twin = copy.deepcopy(model)
    remove_tiles(twin)
    twin.use_tiling = True
    return twin.decode(*args)


def check_toy(model: Toy, tasks: int, monkeypatch: pytest.MonkeyPatch, world: int = 3) -> InOneProcess:
    wanted = serial(model, Z)
    group = InOneProcess(model, monkeypatch)
    group.at(world)
    for _ in range(2):
        assert torch.equal(model.decode(Z), wanted)
    assert len(group.plan.costs) == tasks
    return group


def test_tiles_by_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    group = check_toy(Toy(lambda self, zs: torch.cat([self.decoder(z) for z in zs], -1)), 4, monkeypatch)
    wide, narrow = 3 * 4 * 4, 3 * 4 * 2
    assert group.computed == [[wide + narrow, wide, wide]] * 2


def test_results_that_are_written_or_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python that works on a tile before the next is computed, in place, and feeds one tile's result to another."""

    def in_place(self: Toy, zs: list[Tensor]) -> Tensor:
        out: list[Tensor] = []
        for z in zs:
            tile = self.decoder(z)
            tile.mul_(3)
            if out:
                tile[..., 0] += out[-1][..., -1]
            out.append(tile)
        return torch.cat(out, -1)

    check_toy(Toy(in_place), 4, monkeypatch)

    def pairs(self: Toy, zs: list[Tensor]) -> Tensor:
        out: list[Tensor] = []
        for i, z in enumerate(zs):
            if i % 2:
                z = z + out[-1][..., :1].tanh()
            out.append(self.decoder(z))
        return torch.cat(out, -1)

    check_toy(Toy(pairs), 2, monkeypatch)


class Remembering(Doubling):
    """Adds what it was called with before, kept as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.last: Tensor | None = None
        self.count = 0

    def forward(self, x: Tensor, cache: Any = None) -> Any:
        y = self.conv(x)
        if self.how == "attribute":
            previous, self.last = self.last, y.clone()
            self.count += 1
        elif self.how == "list":
            previous, cache[0] = cache[0], y.clone()
            cache[1] += 1
        else:
            previous = None if cache is None else cache["last"][0]
        y = y if previous is None else y + 0.5 * previous[..., : y.shape[-1]]
        y = y.repeat_interleave(2, -1)
        return (y, {"last": (self.conv(x), "text")}) if self.how == "dict" else y


@pytest.mark.parametrize("how", ["attribute", "list", "dict"])
def test_caches_make_a_task(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of the picture, each decoded column by column with a cache: two tasks of four calls."""

    def body(self: Toy, zs: list[Tensor]) -> Tensor:
        rows = []
        for row in range(2):
            cache: Any = [None, 0] if how == "list" else None
            self.decoder.last, self.decoder.count = None, 0
            out = []
            for z in zs:
                y = self.decoder(z[:, :, 2 * row : 2 * row + 2], *([] if how == "attribute" else [cache]))
                if how == "dict":
                    y, cache = y
                out.append(y)
            assert how != "list" or cache[1] == 4
            assert how != "attribute" or self.decoder.count == 4
            rows.append(torch.cat(out, -1))
        self.decoder.last, self.decoder.count = None, 0
        return torch.cat(rows, -2)

    group = check_toy(Toy(body, Remembering(how)), 2, monkeypatch)
    assert [call.task for call in group.plan.calls] == [0] * 4 + [1] * 4
    assert all(len(call.sends) == 1 for call in group.plan.calls), "caches stay where they are"
    assert group.computed[0][2] == 0, "a third rank has nothing to do"


def test_what_is_computed_whole_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy(lambda self, zs: torch.cat([self.decoder(z) for z in zs], -1))
    InOneProcess(model, monkeypatch)
    small = Z[..., :2].contiguous()
    assert torch.equal(model.decode(small), model.decoder(small))
    assert "decode of [1, 3, 4, 2] is computed whole by every rank: it is one tile" in why(model)
    pvae.reset()

    def chained(self: Toy, zs: list[Tensor]) -> Tensor:
        out = [self.decoder(zs[0])]
        for z in zs[1:]:
            out.append(self.decoder(z) if z.shape[-1] < 2 else self.decoder(z + out[-1][..., :2]))
        return torch.cat(out[:3], -1)

    model = Toy(chained)
    wanted = serial(model, Z[..., :6])
    InOneProcess(model, monkeypatch)
    assert torch.equal(model.decode(Z[..., :6]), wanted)
    assert "its 3 calls feed one another" in why(model)

    for body, text in (
        (lambda self, zs: self.decoder(zs[0]) + torch.rand(()), "it draws random numbers"),
        (lambda self, zs: self.decoder(zs[0]) if self.decoder(zs[1]).sum() > 0 else 0, "decides by a tensor's value"),
        (lambda self, zs: self.decoder(zs[0].mul_(2)), "it writes its input"),
    ):
        model = Toy(body)
        InOneProcess(model, monkeypatch)
        with pytest.warns(pvae.PvaeWarning, match=text):
            model.decode(Z.clone())
        pvae.reset()
    model = Toy(lambda self, zs: torch.cat([self.decoder(z) for z in zs], -1))
    InOneProcess(model, monkeypatch)
    with pytest.warns(pvae.PvaeWarning, match="grad mode is on"), torch.enable_grad():
        assert model.decode(Z).requires_grad
    strict = Toy(lambda self, zs: self.decoder(zs[0]) + torch.rand(()))
    installed(strict, options=Options(strict="on")).agreement = RankAgreement(None, 0, [0], 1)
    with pytest.raises(pvae.PvaeError, match="random numbers"):
        strict.decode(Z)


def test_removal_and_flags() -> None:
    model = Toy(lambda self, zs: torch.cat([self.decoder(z) for z in zs], -1))
    before = dict(model.__dict__)
    installed(model)
    assert model.use_tiling and model.tile_size == 2, "sizes stay"
    assert list(inspect.signature(model.decode).parameters) == ["z"], "pipelines look for arguments there"
    assert tiles_of(model) is not None
    installed(model)  # again: no tower of entries
    remove_tiles(model)
    assert model.__dict__ == before
    remove_tiles(model)
    model.use_tiling = True
    installed(model)
    remove_tiles(model)
    assert model.use_tiling, "it was on before"


def test_inference_mode_and_regions_of_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy(Whole())
    wanted = serial(model, Z)
    model.decoder = torch.compile(model.decoder, backend="eager")
    InOneProcess(model, monkeypatch)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(model.decode(Z.clone()), wanted)
    assert torch.equal(model.decode(Z), wanted)
    assert "4 calls in 4 tasks" in why(model)


def test_one_rank_runs_the_model_as_it_is() -> None:
    model = Toy(lambda self, zs: torch.cat([self.decoder(z) for z in zs], -1))
    wanted = serial(model, Z)
    found = installed(model, world=1)
    assert torch.equal(model.decode(Z), wanted)
    assert not found.planner._plans and found.agreement is None


def test_what_cannot_be_installed() -> None:
    with pytest.raises(
        pvae.PvaeError, match=r"Doubling has no tiling of its own; shard='halo' \(exact\) or shard='patch'"
    ):
        install_tiles(Doubling(), {}, mesh(2), Options())
    model = Toy(lambda self, zs: zs[0])
    with pytest.raises(ValueError, match="mesh of one axis"):
        install_tiles(model, regions(model), Mesh((2, 2), ("a", "b"), 0, (0, 0)), Options())
    model.decoder.compile(backend="eager")
    with pytest.raises(pvae.PvaeError, match=r"Toy.decoder was compiled by its method `compile`"):
        installed(model)
    assert "decode" not in model.__dict__


@pytest.mark.parametrize("option", [{"mesh": 2}, {"shard_dims": "w"}, {"gather": "off"}])
def test_options_that_tiles_cannot_honour(option: dict[str, Any]) -> None:
    model = Toy(lambda model, tiles: torch.cat([model.decoder(t) for t in tiles], -1))
    with pytest.raises(pvae.PvaeError, match=f"{next(iter(option))}: shard='tile' spreads whole tiles"):
        pvae.compile(model, shard="tile", **option)
    assert "forward" not in vars(model.decoder)


def test_a_stale_plan_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy(lambda self, zs: torch.cat([self.decoder(z) for z in zs], -1))
    group = InOneProcess(model, monkeypatch)
    model.decode(Z)
    model.tile_size = 3  # a plain attribute is seen
    assert torch.equal(model.decode(Z), serial(model, Z))
    assert len(group.plan.calls) == 3
    model.body = lambda self, zs: torch.cat([self.decoder(z[:, :, 1:]) for z in zs], -1)
    with pytest.raises(
        pvae.PvaeError, match=r"Toy calls decoder \[\[1, 3, 3, 3\]\] where .* made decoder \[1, 3, 4, 3\]"
    ):
        model.decode(Z)
    group.tiles.planner.forget()
    assert torch.equal(model.decode(Z), serial(model, Z))


def test_the_offloading_hook_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hook:
        calls = 0

        def pre_forward(self, module: nn.Module) -> None:
            self.calls += 1

    model = Toy(lambda self, zs: torch.cat([self.decoder(z) for z in zs], -1))
    InOneProcess(model, monkeypatch)
    model._hf_hook = hook = Hook()
    model.decode(Z)
    assert hook.calls == 1 and model._hf_hook is hook


class Whole(nn.Module):
    """Tiles' `body` for a model that can be pickled."""

    def __call__(self, toy: Toy, zs: list[Tensor]) -> Tensor:
        return torch.cat([toy.decoder(z) for z in zs], -1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_have_tiles_of_their_own(copied: Callable[[nn.Module], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy(Whole())
    wanted = serial(model, Z)
    installed(model)
    twin = copied(model)
    found = tiles_of(twin)
    assert found is not None and found is not tiles_of(model) and found.model is twin
    remove_tiles(model)
    remove_tiles(twin)
    assert not twin.use_tiling
    assert torch.equal(serial(twin, Z), wanted)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 6))
def test_owners(costs: list[int], world: int) -> None:
    """Longest processing time first is within 4/3 of the best, and no rank idles while another has two tasks."""
    owners = TilePlan((), tuple(costs)).owners(world)
    load = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(world)]
    assert max(load) <= max(4 / 3 * max(sum(costs) / world, max(costs)) + max(costs) / 3, max(costs))
    if 0 in load:
        assert max(map(owners.count, range(world))) == 1


# Ranks as threads, and as processes -------------------------------------------------------------------------------------


def test_ranks_that_differ_are_told_so() -> None:
    """By their tile sizes, by their inputs' shapes, or because one fails: all end in an error that names the rank."""
    store = dist.HashStore()
    failing = Toy(lambda self, zs: torch.cat([self.decoder(z) for z in zs], -1))

    def fails(x: Tensor) -> Tensor:
        if type(x) is Tensor:
            raise ValueError("no memory, say")
        return x.repeat_interleave(2, -1)

    failing.decoder.forward = fails  # type: ignore[method-assign]
    cases = {
        "tile": "graph",
        "shape": "shape of input 0: ranks 0, 2 [1,3,4,7], rank 1 [1,3,4,6]",
        "fails": "no memory, say",
    }
    for case, text in cases.items():
        planning = threading.Lock()

        def one(rank: int, case: str = case, planning: Any = planning) -> Any:
            model = Toy(lambda self, zs: torch.cat([self.decoder(z) for z in zs], -1))
            odd = rank == 1
            if odd and case == "tile":
                model.tile_size = 3
            found = installed(failing if odd and case == "fails" else model, 3, rank)
            found.agreement = RankAgreement(dist.PrefixStore(case, store), rank, range(3), 20)
            plan = found.planner.plan
            with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(found.planner, "plan", lambda *call: locked(planning, plan, *call))
                patch.setattr(found, "_exchange", lambda *_: found.agreement.agree("exchange", (), []))
                with pytest.raises(ValueError if odd and case == "fails" else RankError) as e:
                    found.model.decode(Z[..., :6] if odd and case == "shape" else Z)
            assert isinstance(e.value, ValueError) or "rank 1" in str(e.value)
            return str(e.value)

        with ThreadPoolExecutor(3) as pool:
            said = list(pool.map(one, range(3)))
        assert all(text in words for words in said), said


def locked(lock: threading.Lock, function: Callable[..., Any], *args: Any) -> Any:
    with lock:
        return function(*args)


@pytest.mark.slow
def test_gloo_processes(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    run_script(Path(__file__).with_name("tiles_gloo.py"), "2", str(tmp_path / "store"), seconds=300)
