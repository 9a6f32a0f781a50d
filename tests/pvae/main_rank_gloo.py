"""The processes of `test_main_rank_gloo.py`: regions that run on rank 0 only. They are started, and report, as those of
`shard_gloo.py` are and do.

"alike" is a sum of all numbers that a rank has in the end, for the test to see that the ranks have the same.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pvae
from pvae.runtime.rank_agreement import RankError
from pvae.runtime.sharded_tensor import ShardedTensor
from pvae.testing import relative_error
from tests.pvae.shard_gloo import PATIENT, SECONDS, SESSIONS, latents, main, scenario, small, worst

__all__ = ["SESSIONS"]


class Generator(nn.Module):
    """Tokens one after another, until one says that it is the last: how many there are only its values tell."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.calls = nn.Linear(4, 4), 0

    @torch.no_grad()
    def generate(self, x: Tensor, limit: float = 3.0) -> Tensor:
        self.calls += 1
        found = [x]
        while found[-1].abs().sum().item() < limit and len(found) < 50:
            found.append(found[-1] * 1.2 + 0.01 * torch.tanh(self.table(found[-1])))
        return torch.stack(found, 1)


class Encoder(nn.Module):
    """Text `[batch, words, 4]` to a shift of each channel, `[batch, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, text: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(text))).mean(1)


class Painter(nn.Module):
    """A picture `[batch, 4, H, W]`, convolved before and after a shift that a text encoder gives."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.text = Encoder()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.after(torch.tanh(self.before(x)) + self.text(text)[:, :, None, None])


class MarkedPainter(Painter):
    """The same, the region marked in its code, with noise in it."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        y = torch.tanh(self.before(x))
        with pvae.main_rank():
            shift = self.text(text) + torch.randn(4, dtype=x.dtype)
        return self.after(y + shift[:, :, None, None])


class DeciderPainter(Painter):
    """The same, its text encoder as long as its values say."""

    def __init__(self) -> None:
        super().__init__()
        self.words = Generator()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        words = self.words.generate(text[:, 0])
        return self.after(torch.tanh(self.before(x)) + self.text(words)[:, :, None, None])


def only_on_rank_0(rank: int, module: nn.Module) -> nn.Module:
    """The weights of `module` without values on all other ranks."""
    return module if rank == 0 else module.to("meta")


def case() -> tuple[Tensor, Tensor]:
    return latents(1, 4, 9, 6), latents(1, 3, 4)


# --- functions -----------------------------------------------------------------------------------------------------------


@scenario("functions")
def data_dependent_length(rank: int) -> dict[str, Any]:
    """Twice with one length and once with another; the weights are rank 0's alone."""
    model = small(Generator)
    wanted = [model.generate(latents(1, 4) / 9, limit) for limit in (3.0, 3.0, 1.0)]
    model.calls = 0
    only_on_rank_0(rank, model)
    generate = pvae.main_rank(model.generate)
    got = [generate(latents(1, 4) / 9 if rank == 0 else None, limit) for limit in (3.0, 3.0, 1.0)]
    assert wanted[0].shape != wanted[2].shape and [g.shape for g in got] == [w.shape for w in wanted]
    return {"error": worst(*map(relative_error, got, wanted)), "calls": model.calls}


@scenario("functions")
def many_results(rank: int) -> dict[str, Any]:
    """A header longer than one message."""
    found = pvae.main_rank(lambda: {str(n): torch.full((n,), n) for n in range(300)})()
    assert [len(t) for t in found.values()] == list(range(300))
    return {"alike": sum(t.sum().item() for t in found.values())}


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Drawn:
    noise: Tensor
    name: str
    steps: list[Any]


@scenario("functions")
def sampling_and_leaves_that_are_no_tensors(rank: int) -> dict[str, Any]:
    """Each rank has a seed of its own. The numbers are rank 0's, and the other ranks' generators are as they were."""
    torch.manual_seed(rank)
    before = torch.get_rng_state()

    @pvae.main_rank
    def draw(size: int) -> Drawn:
        noise = torch.randn(size, 2)
        return Drawn(
            noise, "x" * 5000, [Pair(noise, None), {"a": 1.5, 2: (True, noise > 0)}, torch.tensor(3), torch.int8]
        )

    found = draw(3)
    assert type(found) is Drawn and found.name == "x" * 5000
    pair, table, three, kind = found.steps
    assert type(pair) is Pair and pair.left is found.noise and pair.right is None and kind is torch.int8
    assert table["a"] == 1.5 and torch.equal(table[2][1], found.noise > 0) and three.shape == () and three == 3
    untouched = torch.equal(before, torch.get_rng_state())
    return {"alike": found.noise.double().sum().item(), "untouched": untouched}


class Counter:
    """Methods by decorator, one inside the other."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    @pvae.main_rank
    def inner(self, x: Tensor) -> Tensor:
        self.calls.append("inner")
        return x + 1

    @pvae.main_rank(timeout=60)
    def outer(self, x: Tensor) -> Tensor:
        """Twice the inner one."""
        self.calls.append("outer")
        with pvae.main_rank():
            return self.inner(x) * 2


@scenario("functions")
def methods_and_nesting(rank: int) -> dict[str, Any]:
    counter = Counter()
    assert Counter.outer.__doc__ == "Twice the inner one."
    got = counter.outer(torch.ones(2)), counter.inner(torch.ones(2))
    return {"alike": torch.cat(got).sum().item(), "calls": len(counter.calls)}


@scenario("functions")
def module_in_place(rank: int) -> dict[str, Any]:
    """It stays the module that it is; the strides of its result are rank 0's."""
    encoder, (_, text) = small(Encoder), case()
    wanted = encoder(text).T
    given = pvae.main_rank(only_on_rank_0(rank, encoder))
    assert given is encoder and isinstance(encoder, nn.Module)
    got = encoder(text).T
    assert got.stride() == wanted.stride()
    del encoder.forward
    return {"error": relative_error(got, wanted)}


@scenario("functions")
def exception(rank: int) -> dict[str, Any]:
    """As it is on rank 0, and told on the others, at once; then all can go on."""

    @pvae.main_rank
    def fail(x: int) -> int:
        if x == 0:
            raise KeyError("no such word")
        return 1 // x

    start = time.monotonic()
    try:
        fail(0)
    except KeyError as error:
        assert rank == 0 and error.args == ("no such word",)
    except RankError as error:
        assert rank > 0 and error.ranks == (0,) and "rank 0 failed: KeyError: 'no such word'" in str(error), error
        assert "exception.<locals>.fail" in str(error)
    else:
        raise AssertionError("nothing was raised")
    assert time.monotonic() - start < SECONDS
    return {"alike": fail(1)}


@scenario("functions")
def result_that_cannot_travel(rank: int) -> dict[str, Any]:
    for bad in (lambda: 0, torch.ones(2, 2).to_sparse()):
        try:
            pvae.main_rank(lambda bad=bad: [bad])()
        except TypeError as error:
            assert rank == 0 and "cannot go to the other ranks" in str(error) and "return" in str(error), error
        except RankError as error:
            assert rank > 0 and error.ranks == (0,) and "cannot go to the other ranks" in str(error), error
        else:
            raise AssertionError("nothing was raised")
    return {"alike": 0}


@scenario("functions")
def with_in_eager_code(rank: int) -> dict[str, Any]:
    ran = False
    try:
        with pvae.main_rank():
            ran = True
    except pvae.PvaeError as error:
        assert "fn = pvae.main_rank(function)" in str(error)
    return {"alike": float(ran)}


@scenario("functions")
def sharded_argument(rank: int) -> dict[str, Any]:
    """Gathered by all ranks before rank 0 takes it."""
    model, x = nn.Conv2d(4, 4, 3, padding=1).double().requires_grad_(False), case()[0]
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    wanted = model(x)
    pvae.compile(model, shard="halo", gather="off", **PATIENT)
    pieces = model(x)
    assert isinstance(pieces, ShardedTensor)
    got = pvae.main_rank(lambda y: y * 2)(pieces)
    assert type(got) is Tensor
    return {"error": relative_error(got, wanted * 2)}


@scenario("functions")
def sharded_model_in_a_region(rank: int) -> dict[str, Any]:
    model, (x, text) = small(Painter), case()
    pvae.compile(model, shard="halo", **PATIENT)
    model(x, text)
    try:
        pvae.main_rank(lambda: model(x, text))()
    except pvae.PvaeError as error:
        assert rank == 0 and "called in a main-rank region" in str(error)
    except RankError as error:
        assert rank > 0 and error.ranks == (0,)
    else:
        raise AssertionError("nothing was raised")
    return {"alike": 0}


@scenario("functions")
def rank_that_does_not_come(rank: int) -> dict[str, Any]:
    ran = []

    @pvae.main_rank(timeout=SECONDS)
    def work() -> int:
        ran.append(1)
        return 3

    work()
    try:
        if rank == 2:
            time.sleep(SECONDS + 2)
        work()
    except RankError as error:
        assert error.ranks == (2,) and f"did not call within {SECONDS:g} s" in str(error), error
    else:
        raise AssertionError("nobody noticed")
    assert len(ran) == (rank == 0)
    return {"alike": work()}


@scenario("functions")
def rank_0_takes_too_long(rank: int) -> dict[str, Any]:
    """It is told so as well, when it is done, and the ranks are in step again."""
    wait = pvae.main_rank(time.sleep, timeout=SECONDS)
    try:
        wait(SECONDS + 2)
    except RankError as error:
        told = f"the timeout of main_rank: rank 0 did not call within {SECONDS:g} s"
        assert error.ranks == (0,) and told in str(error), error
    else:
        raise AssertionError("nobody noticed")
    return {"alike": pvae.main_rank(lambda: 5)()}


# --- graphs --------------------------------------------------------------------------------------------------------------


def ran_on(model: nn.Module) -> int:
    """How many main-rank regions the graphs of `model` have on this rank: inlined on rank 0, fetched from there elsewhere."""
    reports = [p for g in pvae.report(model).graphs for p in g.passes if p.name == "inline_main_rank"]
    return sum(r.note == "on this rank" for p in reports for r in p.matches)


@scenario("graphs")
def named_submodule_without_weights(rank: int) -> dict[str, Any]:
    """In a model that is replicated, split by rows, by columns, not at all on two copies of a mesh, and as pvae likes."""
    errors, owned = [], []
    grid = {"shard": "halo", "shard_dims": "hw", "mesh": "1x2"}
    for options in ({}, {"shard": "halo"}, grid, {"shard": "halo", "mesh": 1}, {"shard": "auto"}):
        model, given = small(Painter), case()
        wanted = model(*given)
        only_on_rank_0(rank, model.text)
        pvae.compile(model, main_rank=["text"], **PATIENT, **options)
        errors += [relative_error(model(*given), wanted) for _ in range(2)]
        owned.append(ran_on(model))
        assert "forward" not in pvae.restore(model).text.__dict__
    return {"error": worst(*errors), "owned": owned}


class Shifter(nn.Module):
    """A region that reads all rows of what is split: others gather it too, and must not drop that as dead."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(x, 3, 1, 1)
        return y + self.text(y.amax((2, 3)))[:, :, None, None]


class MarkedShifter(Shifter):
    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(x, 3, 1, 1)
        with pvae.main_rank():
            shift = self.text(y.amax((2, 3))) + torch.rand(4, dtype=x.dtype)
        return y + shift[:, :, None, None]


@scenario("graphs")
def by_inductor(rank: int) -> dict[str, Any]:
    """With weights that this rank does not have among the graph's inputs."""
    model, (x, _) = small(Shifter), case()
    wanted = model(x)
    only_on_rank_0(rank, model.text)
    pvae.compile(model, main_rank="text", shard="halo", timeout=120)
    return {"error": worst(*(relative_error(model(x), wanted) for _ in range(2))), "owned": ran_on(model)}


@scenario("graphs")
def marked_in_the_code(rank: int) -> dict[str, Any]:
    """By both entrances; the noise is rank 0's, whatever each rank's seed is."""
    sums = []
    for compiled, given in (
        (pvae.compile(small(MarkedPainter), shard="halo", **PATIENT), case()),
        (torch.compile(small(MarkedPainter), backend="pvae", fullgraph=True, options=PATIENT), case()),
        (torch.compile(small(MarkedShifter), backend="pvae", fullgraph=True, options={"shard": "halo"}), case()[:1]),
    ):
        torch.manual_seed(rank)
        before = torch.get_rng_state()
        sums += [compiled(*given).sum().item() for _ in range(2)]
        assert torch.equal(before, torch.get_rng_state()) is (rank > 0)
    assert len(set(sums)) >= 4  # noise indeed
    return {"alike": sums}


@scenario("graphs")
def named_in_torch_compile(rank: int) -> dict[str, Any]:
    model, given = small(Painter), case()
    wanted = model(*given)
    compiled = torch.compile(model, backend="pvae", options={"main_rank": ["text"], **PATIENT})
    return {"error": relative_error(compiled(*given), wanted), "owned": ran_on(model)}


@scenario("graphs")
def unknown_name_in_torch_compile(rank: int) -> dict[str, Any]:
    compiled = torch.compile(small(Painter), backend="pvae", options={"main_rank": ["texts"], **PATIENT})
    try:
        compiled(*case())
    except Exception as error:
        return {"alike": 0, "said": str(error)}
    raise AssertionError("nothing was raised")


@scenario("graphs")
def data_dependent_in_a_compiled_model(rank: int) -> dict[str, Any]:
    """The graph ends there, the function runs as it is on rank 0, and the rest is compiled."""
    model, given = small(DeciderPainter), case()
    wanted = model(*given)
    model.words.calls = 0
    only_on_rank_0(rank, model.words)
    pvae.compile(model, main_rank=["words.generate"], **PATIENT)
    errors = [relative_error(model(*given), wanted) for _ in range(2)]
    assert pvae.report(model).graphs
    return {"error": worst(*errors), "calls": model.words.calls}


@scenario("graphs")
def function_in_torch_compile(rank: int) -> dict[str, Any]:
    model, given = small(DeciderPainter), case()
    wanted = model(*given)
    only_on_rank_0(rank, model.words)
    model.words.generate = pvae.main_rank(model.words.generate)
    compiled = torch.compile(model, backend="pvae", options=PATIENT)
    return {"error": worst(*(relative_error(compiled(*given), wanted) for _ in range(2)))}


@scenario("graphs")
def missing_weights_outside_of_regions(rank: int) -> dict[str, Any]:
    model = small(Painter)
    only_on_rank_0(rank, model.text)
    only_on_rank_0(rank, model.after)
    pvae.compile(model, main_rank=["text"], **PATIENT)
    try:
        model(*case())
    except pvae.PvaeError as error:
        assert rank > 0 and "2 weights are on the meta device" in str(error), error
    except RankError as error:
        assert rank == 0 and "rank 1 failed" in str(error), error
    else:
        raise AssertionError("nothing was raised")
    return {"alike": 0}


@scenario("graphs")
def refusals(rank: int) -> dict[str, Any]:
    """Alike on all ranks, before anything is compiled."""
    said = []
    for options in ({"passes": "canonicalize"}, {"disable": "main_rank"}):
        try:
            pvae.compile(small(MarkedPainter), **options, **PATIENT)(*case())
        except pvae.PvaeError as error:
            said.append("its pipeline no pass main_rank" in str(error))
    with torch.enable_grad():
        for p in (model := small(MarkedPainter)).parameters():
            p.requires_grad_(True)
        try:
            torch.compile(model, backend="pvae", options=PATIENT)(*case())
        except Exception as error:
            said.append("a main-rank region needs pvae's passes" in str(error))
    return {"alike": 0, "said": said}


if __name__ == "__main__":
    main(*sys.argv[1:])
