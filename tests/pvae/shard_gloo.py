"""The processes of `test_shard_gloo.py`: `shard_gloo.py FOLDER SESSION=WORLD ...` forks the ranks of all sessions.

Each goes through the scenarios of its session in order and leaves in FOLDER how it fared in each, as JSON: what the scenario
returned, or the error and the ranks that it names, and the seconds that it took.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pvae
from pvae.runtime import fetch
from pvae.runtime.rank_agreement import RankError
from pvae.runtime.sharded_tensor import ShardedTensor
from pvae.testing import agreement, relative_error
from tests.ranks import on_forks

SECONDS = 6.0  # the timeout where ranks are to fail each other; how long a compile of the small models may take
PATIENT = {"engine": "eager", "timeout": 120.0}
SESSIONS: dict[str, dict[str, Callable[[int], dict[str, Any]]]] = {}


def scenario(session: str) -> Callable[[Callable[[int], dict[str, Any]]], Callable[[int], dict[str, Any]]]:
    """Register `function(rank) -> facts` under its name. A session's scenarios run in the order of this file."""

    def register(function: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
        SESSIONS.setdefault(session, {})[function.__name__] = function
        return function

    return register


# --- small models --------------------------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """Encoder `[N, 3, H, W] -> [N, 4, H/2, W/2]` and decoder back, with what real ones are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 4, 3, stride=2)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.SiLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
            nn.SiLU(),
            nn.Conv2d(8, 3, 3, padding=1),
        )


class CausalDecoder(nn.Module):
    """`[N, C, 1, H, W]`, and the last two frames that each convolution read: a frame of a video decoder with caches."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv3d(4, 4, 3) for _ in range(layers))

    def forward(self, x: Tensor, caches: list[Tensor | None]) -> Tensor:
        for i, conv in enumerate(self.convs):
            before = caches[i]
            y = torch.cat([x.new_zeros(*x.shape[:2], 2, *x.shape[3:]) if before is None else before, x], 2)
            caches[i] = y[:, :, -2:]
            x = x + torch.tanh(conv(nn.functional.pad(y, (1, 1, 1, 1))))
        return x


class VideoAutoencoder(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.decoder = CausalDecoder(layers)

    def decode(self, z: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        caches: list[Tensor | None] = [None] * len(self.decoder.convs)
        return torch.cat([self.decoder(frame, caches) for frame in z.split(1, 2)], 2), caches


def small(kind: type[nn.Module], dtype: torch.dtype = torch.float64, **size: int) -> Any:
    torch.manual_seed(0)
    return kind(**size).eval().requires_grad_(False).to(dtype)


def latents(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def worst(*errors: float) -> float:
    """The largest; infinite if one is not a number."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def kept(caches: Any) -> int:
    return sum(isinstance(cache, ShardedTensor) for cache in caches)


# --- two ranks: models of the zoo, and Inductor ----------------------------------------------------------------------------------------


@scenario("zoo")
def kl_decode_and_encode(rank: int) -> dict[str, Any]:
    """The mid-block attention and the group norms of a picture VAE."""
    errors = []
    for part, dims in (("decode", "h"), ("encode", "w")):
        case = load("kl", part=part, dtype=torch.float64, size=(40, 56))
        wanted = case.run()
        pvae.compile(case.model, shard="halo", shard_dims=dims, **PATIENT)
        errors += [relative_error(case.run(), wanted) for _ in range(2)]
    return {"error": worst(*errors)}


@scenario("zoo")
def wan_decode(rank: int) -> dict[str, Any]:
    """Three chunks; the causal caches stay pieces. Its upsampling rounds to float32, which an exact form must not move."""
    case = load("wan2.1", dtype=torch.float64, size=(9, 40, 56))
    wanted = case.run()
    pvae.compile(case.model, shard="halo", **PATIENT)
    got = case.run()
    graphs = pvae.report(case.model).graphs
    (steady,) = (p.counters for p in graphs[-1].passes if p.name == "shard")
    facts = {"graphs": len(graphs), "exchanges": steady["exchange"], "gathers": steady["gather"]}
    return {"error": relative_error(got, wanted), **facts}


@scenario("zoo")
def wan_encode_keeps_the_contract_in_bfloat16(rank: int) -> dict[str, Any]:
    case = load("wan2.1", part="encode", dtype=torch.bfloat16, size=(5, 40, 56))
    exact, eager = case.cast(torch.float64).run(), case.run()
    pvae.compile(case.model, shard="halo", shard_dims="w", **PATIENT)
    found = agreement(case.run(), eager, exact)
    return {"ok": found.ok, "text": str(found)}


@scenario("zoo")
def two_models_alternate(rank: int) -> dict[str, Any]:
    """Each call is of another graph than the last, so the ranks agree anew each time."""
    cases = [load("kl", dtype=torch.float64, size=(40, 56), seed=seed) for seed in (0, 1)]
    cases.append(load("tiny-kl", dtype=torch.float64))
    wanted = [case.run() for case in cases]
    for case in cases:
        pvae.compile(case.model, shard="halo", **PATIENT)
    errors = [relative_error(c.run(), w) for _ in range(2) for c, w in zip(cases, wanted, strict=True)]
    return {"error": worst(*errors)}


@scenario("zoo")
def torch_compile_of_kl(rank: int) -> dict[str, Any]:
    case = load("kl", dtype=torch.float64, size=(40, 56))
    wanted = case.run()
    case.model.decoder = torch.compile(case.model.decoder, backend="pvae", options={"shard": "halo", **PATIENT})
    got = case.run()
    return {"error": relative_error(got, wanted), "graphs": len(pvae.report(case.model).graphs)}


@scenario("zoo")
def inductor(rank: int) -> dict[str, Any]:
    """Two graphs, the first chunk's and the others'."""
    vae, z = small(VideoAutoencoder, torch.float32, layers=1), latents(1, 4, 3, 7, 6, dtype=torch.float32)
    exact, (eager, _) = small(VideoAutoencoder, layers=1).decode(z.double())[0], vae.decode(z)
    pvae.compile(vae, shard="halo", timeout=120)
    got, caches = vae.decode(z)
    found = agreement(got, eager, exact)
    return {"ok": found.ok, "text": str(found), "kept": kept(caches)}


@scenario("zoo")
def inductor_by_torch_compile(rank: int) -> dict[str, Any]:
    vae, z = small(VideoAutoencoder, layers=1), latents(1, 4, 3, 7, 6)
    wanted, _ = vae.decode(z)
    vae.decoder.compile(backend="pvae", fullgraph=True, options={"shard": "halo", "shard_dims": "w", "timeout": 120.0})
    got, caches = vae.decode(z)
    return {"error": relative_error(got, wanted), "kept": kept(caches)}


# --- three ranks: small models, every way in ---------------------------------------------------------------------------------


@scenario("ways")
def encoder_and_decoder(rank: int) -> dict[str, Any]:
    """Of one model, there and back, twice. 22 rows in pieces of the stride's multiple."""
    vae, x = small(Autoencoder), latents(1, 3, 22, 10)
    wanted = vae.decoder(vae.encoder(x))
    pvae.compile(vae, shard="halo", **PATIENT)
    return {"error": worst(*(relative_error(vae.decoder(vae.encoder(x)), wanted) for _ in range(2)))}


@scenario("ways")
def rows_and_columns(rank: int) -> dict[str, Any]:
    """A mesh of one row of three: the other axis has nobody in it."""
    vae, z = small(Autoencoder), latents(2, 4, 5, 7)
    wanted = vae.decoder(z)
    pvae.compile(vae, shard="halo", shard_dims="hw", mesh="1x3", **PATIENT)
    return {"error": relative_error(vae.decoder(z), wanted)}


@scenario("ways")
def results_left_as_pieces(rank: int) -> dict[str, Any]:
    vae, z = small(Autoencoder), latents(1, 4, 7, 5)
    wanted = vae.decoder(z)
    pvae.compile(vae, shard="halo", gather="off", **PATIENT)
    got = vae.decoder(z)
    assert isinstance(got, ShardedTensor)
    # An encoder that is given the pieces takes them as they are.
    back = vae.encoder(got)
    assert isinstance(back, ShardedTensor)
    returned = relative_error(back.whole(), pvae.restore(vae).encoder(wanted))
    own = wanted[:, :, slice(*got.pieces[0].own)]
    return {
        "error": worst(relative_error(got.whole(), wanted), relative_error(got.local, own), returned),
        "shape": list(got.shape),
        "local": list(got.local.shape),
    }


@scenario("ways")
def causal_caches(rank: int) -> dict[str, Any]:
    vae, z = small(VideoAutoencoder), latents(1, 4, 5, 7, 6)
    wanted, whole = vae.decode(z)
    pvae.compile(vae, shard="halo", **PATIENT)
    got, caches = vae.decode(z)
    errors = [relative_error(mine.whole(), yours) for mine, yours in zip(caches, whole, strict=True)]
    return {"error": worst(relative_error(got, wanted), *errors), "kept": kept(caches)}


@scenario("ways")
def patches(rank: int) -> dict[str, Any]:
    """Context that reaches the picture's edges makes the form exact; less makes it a little wrong, alike on every rank."""
    vae, z = small(Autoencoder), latents(1, 4, 12, 5)
    wanted = vae.decoder(z)
    found = {}
    for context in (12, 2):
        pvae.compile(vae, shard="patch", shard_dims="h", patch_context=context, **PATIENT)
        found[context] = vae.decoder(z)
    (counters,) = (p.counters for p in pvae.report(vae).graphs[-1].passes if p.name == "shard")
    everyone = [torch.empty_like(wanted) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, found[2].contiguous())
    return {
        "error": relative_error(found[12], wanted),
        "error of little context": relative_error(found[2], wanted),
        "alike": all(torch.equal(other, found[2]) for other in everyone),
        "exchanges": counters["exchange"],
        "gathers": counters["gather"],
    }


@scenario("ways")
def torch_compile(rank: int) -> dict[str, Any]:
    """One Dynamo graph, as unsharded."""
    vae, z = small(Autoencoder), latents(1, 4, 7, 5)
    wanted = vae.decoder(z)
    compiled = torch.compile(vae.decoder, backend="pvae", fullgraph=True, options={"shard": "halo", **PATIENT})
    errors = [relative_error(compiled(z), wanted) for _ in range(2)]
    return {"error": worst(*errors), "graphs": len(pvae.report(vae.decoder).graphs)}


@scenario("ways")
def torch_compile_with_caches(rank: int) -> dict[str, Any]:
    vae, z = small(VideoAutoencoder), latents(1, 4, 5, 7, 6)
    wanted, _ = vae.decode(z)
    vae.decoder.compile(backend="pvae", fullgraph=True, options={"shard": "halo", **PATIENT})
    got, caches = vae.decode(z)
    return {
        "error": relative_error(got, wanted),
        "kept": kept(caches),
        "graphs": len(pvae.report(vae.decoder).graphs),
    }


# --- three ranks that do not do the same ---------------------------------------------------------------------------------------


def hasty(model: nn.Module, **options: Any) -> Any:
    return pvae.compile(model, shard="halo", engine="eager", timeout=SECONDS, **options)


@scenario("disagree")
def never_calls(rank: int) -> dict[str, Any]:
    vae = hasty(small(Autoencoder))
    if rank == 2:
        time.sleep(SECONDS + 2)  # it comes after all when the others have given up, and is told so
    return {"sum": vae.decoder(latents(1, 4, 7, 5)).sum().item()}


@scenario("disagree")
def calls_with_another_shape(rank: int) -> dict[str, Any]:
    vae = hasty(small(Autoencoder))
    return {"sum": vae.decoder(latents(1, 4, 7, 6 if rank == 2 else 5)).sum().item()}


@scenario("disagree")
def calls_another_model(rank: int) -> dict[str, Any]:
    vae = hasty(small(Autoencoder))
    return {"sum": (vae.encoder(latents(1, 3, 8, 8)) if rank == 2 else vae.decoder(latents(1, 4, 8, 8))).sum().item()}


@scenario("disagree")
def calls_with_other_values(rank: int) -> dict[str, Any]:
    vae, z = hasty(small(Autoencoder), check_inputs="on"), latents(1, 4, 7, 5)
    vae.decoder(z)
    return {"sum": vae.decoder(z + (rank == 2)).sum().item()}


@scenario("disagree")
def other_values_unchecked(rank: int) -> dict[str, Any]:
    """Not compared unless asked: the result is of one piece from each rank's input."""
    vae, z = hasty(small(Autoencoder)), latents(1, 4, 7, 5)
    return {"sum": vae.decoder(z + (rank == 2)).sum().item()}


@scenario("disagree")
def fails_to_compile(rank: int) -> dict[str, Any]:
    vae = hasty(small(Autoencoder), expect={"conv3d_unfold": 1} if rank == 2 else {})
    return {"sum": vae.decoder(latents(1, 4, 7, 5)).sum().item()}


@scenario("disagree")
def raises_while_traced(rank: int) -> dict[str, Any]:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if rank == 2:
                raise ValueError("boom")
            return nn.functional.avg_pool2d(x, 3, 1, 1)

    return {"sum": hasty(Broken())(latents(1, 4, 7, 5)).sum().item()}


@scenario("disagree")
def all_call_again(rank: int) -> dict[str, Any]:
    """After all these the ranks are in step."""
    vae, z = small(Autoencoder), latents(1, 4, 7, 5)
    wanted = vae.decoder(z)
    return {"error": relative_error(hasty(vae).decoder(z), wanted)}


@scenario("disagree")
def stops_calling(rank: int) -> dict[str, Any]:
    """In the steady state the ranks do not agree anew: it is the exchange that ends. The last: gloo's pairs are gone."""
    vae, z = hasty(small(Autoencoder)), latents(1, 4, 7, 5)
    vae.decoder(z)
    if rank == 2:
        time.sleep(SECONDS + 4)
        return {}
    return {"sum": vae.decoder(z).sum().item()}


@scenario("dies")
def dies_within_a_decode(rank: int) -> dict[str, Any]:
    """Between two exchanges of the third of five chunks."""
    vae, z = hasty(small(VideoAutoencoder)), latents(1, 4, 5, 7, 6)
    exchange, done = fetch._all_to_all, []

    def counted(*args: Any) -> Tensor:
        done.append(args)
        if rank == 2 and len(done) == 2 * 3 + 2:
            os._exit(3)
        return exchange(*args)

    fetch._all_to_all = counted
    return {"sum": vae.decode(z)[0].sum().item()}


# -------------------------------------------------------------------------------------------------------------------------------


def outcome(call: Callable[[int], dict[str, Any]], rank: int) -> dict[str, Any]:
    start = time.monotonic()
    try:
        with torch.no_grad():
            found = {"raised": None, **call(rank)}
    except Exception as error:
        named = list(error.ranks) if isinstance(error, RankError) else []
        found = {"raised": type(error).__name__, "text": str(error), "ranks": named}
    return {**found, "seconds": time.monotonic() - start}


def one_rank(session: str, world: int, rank: int, folder: Path) -> None:
    with open(folder / f"{session}{rank}.log", "w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / session}.store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    dist.barrier()
    found: dict[str, Any] = {}
    for name, call in SESSIONS[session].items():
        found[name] = outcome(call, rank)
        (folder / f"{session}{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # groups with dead ranks are not to be taken down in order


def main(folder: str, *sessions: str) -> None:
    """The sessions run side by side, each as NAME=WORLD."""
    worlds = {name: int(world) for name, _, world in (session.partition("=") for session in sessions)}
    places = [(name, world, rank) for name, world in worlds.items() for rank in range(world)]
    on_forks(*(partial(one_rank, *place, Path(folder)) for place in places))


if __name__ == "__main__":
    if any(session.startswith("zoo=") for session in sys.argv):
        from diffusers import AutoencoderKL, AutoencoderKLWan  # noqa: F401  (once for all ranks)

        from pvae.tools.zoo import load

    main(*sys.argv[1:])
