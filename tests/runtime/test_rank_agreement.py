"""Ranks that agree, ranks that do not, and ranks that are gone: threads over a HashStore, then real gloo processes.

What an agreement costs:   python tests/runtime/test_rank_agreement.py time 4
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pvae.runtime.rank_agreement import GRACE, RankAgreement, RankError
from tests.ranks import on_forks, run_script

GRAPH = ("all_to_all f32 [1,8,4,4] -> [1,8,2,4]", "all_reduce f32 [64]", "all_gather f32 [1,3,8,8]")
SECONDS = 2.0
LATEST = SECONDS + 2.0


def outcome(call: Callable[[], Any]) -> dict[str, Any]:
    """How a rank fared, as JSON: what it returned or the error and the ranks it names; the seconds it took."""
    start = time.monotonic()
    try:
        error: dict[str, Any] = {"error": None, "returned": call(), "text": "", "ranks": []}
    except BaseException as e:
        error = {"error": type(e).__name__, "text": str(e), "ranks": list(getattr(e, "ranks", ()))}
    return error | {"seconds": time.monotonic() - start}


def in_threads(*calls: Callable[[RankAgreement], Any], seconds: float = 0.5, store: Any = None) -> list[dict[str, Any]]:
    """Call i as rank i, each in its own thread, on one store."""
    store = store or dist.HashStore()
    results: list[dict[str, Any]] = [{} for _ in calls]

    def one(rank: int) -> None:
        agreement = RankAgreement(store, rank, range(len(calls)), seconds)
        results[rank] = outcome(lambda: calls[rank](agreement))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(results), "a rank hangs"
    return results


def agrees(*inputs: Any, graph: tuple[str, ...] = GRAPH, model: str = "decoder", values: bool = False) -> Any:
    return lambda agreement: agreement.agree(model, graph, inputs, check_values=values)


def test_ranks_that_agree_go_on_and_leave_few_keys() -> None:
    def many(agreement: RankAgreement) -> None:
        for i in range(20):
            agreement.agree("decoder", GRAPH, [torch.ones(2, i), i], check_values=True)

    store = dist.HashStore()
    assert [r["error"] for r in in_threads(many, many, many, store=store, seconds=10)] == [None] * 3
    assert store.num_keys() == 3 + 5, "counts of calls; of the last call statements, arrivals and verdict"


@pytest.mark.parametrize(
    ("usual", "odd", "text"),
    [
        (agrees(torch.ones(1, 2)), agrees(torch.ones(2, 1)), "shape of input 0: ranks 0, 2 [1,2], rank 1 [2,1]"),
        (agrees(torch.ones(1)), agrees(torch.ones(1).half()), "dtype of input 0: ranks 0, 2 float32, rank 1 float16"),
        (agrees(torch.ones(1), 4), agrees(torch.ones(1), 5), "input 1: ranks 0, 2 4, rank 1 5"),
        (agrees(1), agrees(1, 2), "input 1: ranks 0, 2 none, rank 1 2"),
        (agrees(), agrees(model="encoder"), "model: ranks 0, 2 decoder, rank 1 encoder"),
        (agrees(), agrees(graph=GRAPH[:2]), f"graph (collective 2): ranks 0, 2 {GRAPH[2]}, rank 1 none"),
        (agrees(), agrees(graph=GRAPH[::-1]), f"graph (collective 0): ranks 0, 2 {GRAPH[0]}, rank 1 {GRAPH[2]}"),
        (agrees(*range(9)), agrees(*range(1, 10)), "and 5 more"),
    ],
)
def test_what_differs_is_named(usual: Any, odd: Any, text: str) -> None:
    for result in in_threads(usual, odd, usual, seconds=10):
        assert result["ranks"] == [1] and text in result["text"] and "(rank 1)" in result["text"], result


def test_values_are_compared_on_request() -> None:
    x = torch.arange(6).reshape(2, 3).bfloat16()
    same = x.T.contiguous().T  # other strides, same values
    other = x.clone()
    other[1, 2] += 1
    for a, b, values, ranks in [(x, same, True, []), (x, other, False, []), (x, other, True, [1])]:
        for result in in_threads(agrees(a, values=values), agrees(b, values=values), seconds=10):
            assert result["ranks"] == ranks and ("values of input 0" in result["text"]) == bool(ranks), result
    whole = [torch.tensor(1.5), torch.ones(0, 3), torch.ones(2, dtype=torch.bool), torch.ones(2).to(torch.complex64)]
    assert [r["error"] for r in in_threads(agrees(*whole, values=True), agrees(*whole, values=True))] == [None] * 2


def test_a_missing_rank_is_named_and_a_late_one_does_not_go_ahead() -> None:
    def late(agreement: RankAgreement) -> None:
        time.sleep(1)
        agrees()(agreement)

    def retries(agreement: RankAgreement, first: Any) -> None:
        with pytest.raises(RankError, match=r"rank 1 did not call within 0.3 s; rank [02] gave up") as info:
            first(agreement)
        assert info.value.ranks == (1,)
        agreement.seconds = 10
        agrees()(agreement)  # all were told of the same call, so they are in step again

    results = in_threads(*(lambda a, f=f: retries(a, f) for f in (agrees(), late, agrees())), seconds=0.3)
    assert [r["error"] for r in results] == [None] * 3, results


def test_the_first_verdict_stands() -> None:
    """A rank that gives up just as the last one arrives goes by what the others go by."""
    store = dist.HashStore()
    store.set("1/verdict", json.dumps({"by": 1}))
    store.set("1/1", json.dumps({"facts": {"model": "m"}}))
    agreement = RankAgreement(store, 0, [0, 1], 0.1)
    assert agreement._settle(1, {"missing": [1], "seconds": 0.1}) == {"by": 1}


def test_all_go_ahead_or_none() -> None:
    """Arrivals all around the deadline: no rank goes into a collective that another has left."""

    def uneasy(agreement: RankAgreement) -> list[bool]:
        chance, went = random.Random(agreement.rank), []
        for _ in range(25):
            time.sleep(chance.random() * 0.03)
            went.append(outcome(lambda: agrees()(agreement))["error"] is None)
        return went

    results = [r["returned"] for r in in_threads(uneasy, uneasy, uneasy, seconds=0.015)]
    assert results[0] == results[1] == results[2], results


def test_a_failure_reaches_those_who_wait_at_once() -> None:
    def fails(agreement: RankAgreement) -> None:
        with agreement.guarded("decoder"):
            time.sleep(0.2)
            raise ValueError("no kernel")

    waits, failed = in_threads(agrees(), fails, seconds=10)
    assert failed["error"] == "ValueError" and failed["seconds"] < 1
    assert waits["ranks"] == [1] and "decoder: rank 1 failed: ValueError: no kernel" in waits["text"]
    assert waits["seconds"] < 0.2 + GRACE + 1


@pytest.mark.parametrize("error", [dist.DistBackendError("timeout"), RuntimeError("[gloo/pair.cc] Connection closed")])
def test_a_collective_that_fails_names_who_failed_by_itself(error: Exception) -> None:
    def raises(e: Exception, after: float) -> Callable[[RankAgreement], None]:
        def call(agreement: RankAgreement) -> None:
            with agreement.guarded("decoder"):
                time.sleep(after)
                raise e

        return call

    a, b, c = in_threads(raises(error, 0.1), raises(error, 0.1), raises(MemoryError("out"), 0), seconds=10)
    assert (
        c["error"] == "MemoryError"
        and a["ranks"] == b["ranks"] == [2]
        and "rank 2 failed: MemoryError: out" in a["text"]
    )
    a, b, c = in_threads(raises(error, 0), raises(error, 0.3), raises(MemoryError("out"), 0.3), seconds=10)
    assert a["ranks"] == b["ranks"] == [2], "also when the collective ends before the note is there"
    a, b, c = in_threads(raises(error, 0), raises(error, 0.1), lambda _: None, seconds=10)
    assert a["ranks"] == b["ranks"] == [2] and "rank 2 left no word" in a["text"] and str(error) in a["text"]
    a, b = in_threads(raises(error, 0), raises(error, 0.1), seconds=10)
    assert a["ranks"] == b["ranks"] == [] and "no rank died or failed by itself" in a["text"]


def test_over_a_file_store(tmp_path: Path) -> None:
    """It has no `multi_get` and its timeouts are plain RuntimeErrors."""
    files = [dist.FileStore(str(tmp_path / "store"), 2) for _ in range(2)]

    def on(rank: int, call: Any) -> Any:
        return lambda a: call(RankAgreement(files[rank], rank, [0, 1], 1))

    assert [r["error"] for r in in_threads(on(0, agrees(1)), on(1, agrees(1)))] == [None] * 2
    assert [r["ranks"] for r in in_threads(on(0, agrees(1)), on(1, agrees(2)))] == [[1]] * 2
    assert in_threads(on(0, agrees(1)), on(1, lambda _: None))[0]["ranks"] == [1]


@pytest.mark.parametrize(("backend", "world"), [("gloo", 1), ("fake", 4)])
def test_alone_there_is_nothing_to_do(backend: str, world: int) -> None:
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=world)
    try:
        alone = RankAgreement.of(None, 1)
    finally:
        dist.destroy_process_group()
    assert alone.store is None and list(alone.ranks) == list(range(world))
    alone.agree("decoder", GRAPH, [object()], check_values=True)
    with pytest.raises(ValueError, match="mine"), alone.guarded("decoder"):
        raise ValueError("mine")


# Real processes: this file run as a script, three ranks, one session for the living and one for the dying.


Scenarios = dict[str, Callable[[], Any]]


def exchange(group: Any, world: int) -> None:
    dist.all_to_all_single(torch.empty(world), torch.ones(world), group=group)


def living(agreement: RankAgreement, group: Any, rank: int, world: int) -> Scenarios:
    odd, x = rank == 2, torch.ones(1, 16, 21, 60, 104)

    def own_error() -> None:
        with agreement.guarded("decoder"):
            if odd:
                raise ValueError("boom")
            exchange(group, world)

    def stays() -> None:
        if odd:
            time.sleep(SECONDS + 1)

    def skips() -> None:
        if odd:
            time.sleep(SECONDS + 1)  # it calls after all, when the others have given up
        agrees(x)(agreement)

    return {
        "agrees": lambda: agrees(x, values=True)(agreement),
        "shape": lambda: agrees(x[:, :, : 20 if odd else 21])(agreement),
        "graph": lambda: agrees(x, graph=GRAPH[1:] if odd else GRAPH)(agreement),
        "values": lambda: agrees(1, x + odd, values=True)(agreement),
        "unchecked values": lambda: agrees(1, x + odd)(agreement),
        "works": lambda: exchange(group, world),
        "skips": skips,
        "again": lambda: agrees(x)(agreement),
        "raises": own_error,
        "stays": stays,  # the rank that raised does not end, so the others' collective has to time out
    }


def dying(agreement: RankAgreement, group: Any, rank: int, world: int) -> Scenarios:
    def inside() -> None:
        with agreement.guarded("decoder"):
            agrees(1)(agreement)
            if rank == 2:
                os._exit(3)
            exchange(group, world)

    def host() -> None:
        if rank == 0:
            time.sleep(0.5)
            os._exit(4)
        agrees(1)(agreement)

    return {
        "inside": inside,
        "before": lambda: agrees(1)(agreement),
        "host": host,
    }


def timed(agreement: RankAgreement, group: Any, rank: int, world: int) -> Scenarios:
    x = torch.ones(1, 16, 21, 60, 104)

    def many(values: bool) -> None:
        for _ in range(200):
            agrees(x, values=values)(agreement)

    return {"200 agreements": lambda: many(False), "200 on the values of 2.1 million float32": lambda: many(True)}


def one_rank(session: str, world: int, port: int, folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    group = dist.new_group(timeout=timedelta(seconds=SECONDS))
    agreement = RankAgreement.of(group, SECONDS)
    exchange(group, world)
    found: dict[str, Any] = {}
    for name, call in {"living": living, "dying": dying, "timed": timed}[session](
        agreement, group, rank, world
    ).items():
        found[name] = outcome(call)
        (folder / f"{session}{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # a group with dead ranks is not to be taken down in order


def run_sessions(names: Sequence[str], world: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """How each rank fared in each scenario that it lived to report. The sessions run side by side."""
    run_script(Path(__file__), str(folder), str(world), *names, seconds=90)
    files = {name: [folder / f"{name}{rank}.json" for rank in range(world)] for name in names}
    return {name: [json.loads(f.read_text()) if f.exists() else {} for f in fs] for name, fs in files.items()}


def run_ranks(folder: Path, world: int, *names: str) -> None:
    ranks = []
    for name in names:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = server.port
        del server  # rank 0 hosts the store, as without torchrun
        ranks += [partial(one_rank, name, world, port, folder, rank) for rank in range(world)]
    on_forks(*ranks)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run_sessions(["living", "dying"], 3, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("scenario", ["agrees", "unchecked values", "works", "again"])
def test_processes_that_agree(sessions: Any, scenario: str) -> None:
    assert [rank[scenario]["error"] for rank in sessions["living"]] == [None] * 3


@pytest.mark.parametrize(
    ("session", "scenario", "text"),
    [
        ("living", "shape", "shape of input 0: ranks 0, 1 [1,16,21,60,104], rank 2 [1,16,20,60,104]"),
        ("living", "graph", f"graph (collective 0): ranks 0, 1 {GRAPH[0]}, rank 2 {GRAPH[1]}"),
        ("living", "values", "values of input 1: ranks 0, 1 hash "),
        ("living", "skips", "decoder: rank 2 did not call within 2 s; rank "),
        ("living", "raises", "decoder: rank 2 failed: ValueError: boom"),
        ("dying", "inside", "decoder: rank 2 left no word"),
        ("dying", "before", "decoder: rank 2 did not call within 2 s; rank "),
        ("dying", "host", "the store of the ranks is gone: rank 0"),
    ],
)
def test_processes_that_do_not(sessions: Any, session: str, scenario: str, text: str) -> None:
    named = 0 if scenario == "host" else 2
    living = [0, 1, 2] if session == "living" else [1] if scenario == "host" else [0, 1]
    reported = [rank for rank, results in enumerate(sessions[session]) if scenario in results]
    assert reported == living
    for rank in living:
        result = sessions[session][rank][scenario]
        if (scenario, rank) == ("raises", 2):
            assert result["error"] == "ValueError" and result["seconds"] < 1
            continue
        assert result["error"] == "RankError" and result["ranks"] == [named] and text in result["text"], result
        assert result["seconds"] < LATEST + (SECONDS + 1 if (scenario, rank) == ("skips", 2) else 0), result


if __name__ == "__main__":
    if sys.argv[1] == "time":
        import tempfile

        with tempfile.TemporaryDirectory() as place:
            print(run_sessions(["timed"], int(sys.argv[2]), Path(place)))
    else:
        run_ranks(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
