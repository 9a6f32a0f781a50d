"""`ShardedTensor`: gathered by ranks that are threads, used alone without a group, and carried through Dynamo."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from pvae.runtime.mesh import make_mesh
from pvae.runtime.sharded_tensor import Piece, ShardedTensor
from pvae.runtime.torch_compat import FakeTensor, new_fake_mode
from tests.ranks import on_threads


def piece(dim: int, bounds: tuple[int, ...], group: str | None, rank: int, context: int = 0) -> Piece:
    held = tuple((max(0, lo - context), min(bounds[-1], hi + context)) for lo, hi in pairwise(bounds))
    return Piece(dim, bounds, held, group, rank)


def cut(whole: Tensor, pieces: tuple[Piece, ...], channels_last: bool = False) -> ShardedTensor:
    local = whole
    for p in pieces:
        start, stop = p.held[p.rank]
        local = local.narrow(p.dim, start, stop - start)
    return ShardedTensor(local.clone(), pieces, channels_last)


def alone(whole: Tensor, dim: int = 2) -> ShardedTensor:
    return cut(whole, (piece(dim, (0, whole.shape[dim]), None, 0),))


# Ranks -------------------------------------------------------------------------------------------------------------------

lengths = st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(any)


@given(
    rows=lengths,
    columns=lengths,
    shape=st.lists(st.integers(1, 3), min_size=2, max_size=5),
    context=st.integers(0, 2),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.bfloat16, torch.bool]),
    data=st.data(),
)
def test_the_whole_of_any_pieces(
    rows: list[int],
    columns: list[int],
    shape: list[int],
    context: int,
    channels_last: bool,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    dims = data.draw(st.permutations(range(len(shape))))[:2]
    bounds = (0, *accumulate(rows)), (0, *accumulate(columns))
    for dim, b in zip(dims, bounds, strict=True):
        shape[dim] = b[-1]
    channels_last = channels_last and len(shape) >= 4
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)] if channels_last else None
    whole = torch.randint(0, 2, shape).to(dtype).contiguous(memory_format=memory_format or torch.contiguous_format)

    def run(rank: int) -> tuple[ShardedTensor, Tensor, Tensor]:
        mesh = make_mesh((len(rows), len(columns)))
        pieces = tuple(
            piece(dims[axis], bounds[axis], mesh.groups[axis], mesh.coordinates[axis], context) for axis in (0, 1)
        )
        sharded = cut(whole, pieces, channels_last)
        sharded.whole().zero_()  # in memory of its own
        return sharded, sharded.whole(), torch.cat([sharded, whole])

    for sharded, gathered, doubled in on_threads(len(rows) * len(columns), run):
        assert type(gathered) is type(doubled) is Tensor
        assert torch.equal(gathered, whole) and torch.equal(doubled, torch.cat([whole, whole]))
        assert sharded.shape == whole.shape and sharded.dtype == whole.dtype
        assert sharded.stride() == gathered.stride()
        if whole.numel():
            assert gathered.is_contiguous(memory_format=memory_format or torch.contiguous_format)


def test_one_rank_may_look_and_pass_on_alone() -> None:
    whole = torch.randn(1, 2, 5, 4)

    def run(rank: int) -> list[str]:
        sharded = cut(whole, (piece(2, (0, 5, 5), make_mesh().groups[0], rank),))
        if rank == 0:
            return []
        others = [sharded, sharded.detach(), sharded.clone(), copy.deepcopy({"a": sharded})["a"], sharded.cpu()]
        assert all(torch.equal(o.local, sharded.local) and o.pieces == sharded.pieces for o in others)
        assert others[2].local is not sharded.local
        return [repr(o) for o in others]

    said = "ShardedTensor(shape=(1, 2, 5, 4), local=(1, 2, 0, 4), bounds={2: (0, 5, 5)}, dtype=torch.float32, device='cpu')"
    assert on_threads(2, run) == [[], [said] * 5]


# Without a process group -------------------------------------------------------------------------------------------------


def test_eager_operations_see_the_whole() -> None:
    x = torch.randn(1, 2, 5, 4)
    s = alone(x)
    weight = torch.randn(3, 2, 3, 3)
    operations: list[Callable[[Tensor], Tensor]] = [
        lambda t: 1 - t,
        lambda t: t[:, :, 1:],
        lambda t: t.view(-1),
        lambda t: t.to(torch.float64),
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: nn.functional.conv2d(t, weight),
        lambda t: torch.stack([t, x]),
        lambda t: torch.empty_like(t).copy_(t),
        lambda t: torch.from_numpy(t.numpy()),
        lambda t: torch.tensor(t.tolist()),
        lambda t: torch.from_dlpack(t).add(1),
        lambda t: torch.tensor(t.sum().item()),
    ]
    for number, operation in enumerate(operations):
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                got, expected = operation(s), operation(x)
            assert type(got) is Tensor and got.stride() == expected.stride(), number
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert torch.equal(s, x) and len(s) == 1 and [tuple(row.shape) for row in s] == [(2, 5, 4)]


def test_made_under_inference_mode() -> None:
    x = torch.randn(1, 2, 5, 4)
    with torch.inference_mode():
        s = alone(x)
    assert torch.equal(s[0] + 1, x[0] + 1)


def test_the_whole_has_memory_of_its_own() -> None:
    x = torch.randn(1, 2, 5, 4)
    for s in (alone(x), ShardedTensor(x.clone(), ()), alone(torch.randn(1, 2, 0, 4))):
        before = s.local.clone()
        s.whole().zero_()
        s[0].add_(1)
        assert torch.equal(s.local, before)
    assert alone(x).data_ptr() == 0, "and the ShardedTensor has none"


@pytest.mark.parametrize(
    "write",
    [
        lambda s: s.add_(1),
        lambda s: s.__setitem__((0, 1), 2.0),
        lambda s: torch.add(torch.ones(1, 2, 5, 4), 1, out=s),
        lambda s: torch._foreach_mul_([torch.ones(1), s], 2),
        lambda s: s.copy_(torch.ones(1, 2, 5, 4)),
        lambda s: s.detach().zero_(),
        lambda s: s.unsqueeze_(0),
        lambda s: s.share_memory_(),
    ],
)
def test_writes_are_refused(write: Callable[[Tensor], Any]) -> None:
    x = torch.randn(1, 2, 5, 4)
    s = alone(x)
    with pytest.raises(RuntimeError, match=r"writes to a ShardedTensor.*write to its whole\(\)"):
        write(s)
    assert torch.equal(s.local, x) and s.shape == x.shape


def test_a_collective_would_write_to_a_copy() -> None:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(RuntimeError, match="c10d.allreduce_.default writes to a ShardedTensor"):
            dist.all_reduce(alone(torch.randn(1, 2, 5, 4)))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("save", [pickle.dumps, lambda s: torch.save({"cache": [s]}, io.BytesIO())])
def test_it_cannot_be_saved(save: Callable[[Tensor], Any]) -> None:
    with pytest.raises(TypeError, match=r"save its whole\(\), called on every rank"):
        save(alone(torch.randn(1, 2, 5, 4)))


def test_what_does_not_fit_is_refused() -> None:
    x, one = torch.randn(1, 2, 3, 4), ((0, 3), (3, 5))
    for pieces, channels_last, message in [
        ((Piece(2, (0, 3, 5), one, "g", 1),), False, "dimension 2 of .* has 3 rows; rank 1 holds 2"),
        ((Piece(2, (0, 3, 5), ((0, 2), (2, 5)), "g", 1),), False, "does not hold its part"),
        ((Piece(2, (0, 3), one, "g", 0),), False, "not of one world"),
        ((Piece(2, (0, 3, 5), one, "g", 2),), False, "not of one world"),
        ((Piece(2, (0, 3, 5), one, "g", 0),) * 2, False, "split dimensions .2, 2. of 4"),
        ((Piece(-2, (0, 3, 5), one, "g", 0),), False, "counted from 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ShardedTensor(x, pieces, channels_last)
    with pytest.raises(ValueError, match="four or five dimensions; local has 3"):
        ShardedTensor(x[0], (), channels_last=True)
    with pytest.raises(ValueError, match=r"make it under torch.no_grad\(\)"):
        ShardedTensor(x.requires_grad_(), ())


# Tracing -----------------------------------------------------------------------------------------------------------------


def test_the_whole_of_a_fake_is_a_plain_fake() -> None:
    mode = new_fake_mode()
    sharded = ShardedTensor(torch.randn(1, 2, 2, 4), (piece(2, (0, 3, 5), "no such group", 1),), channels_last=True)
    fake = mode.from_tensor(sharded)
    assert isinstance(fake, ShardedTensor) and isinstance(fake.local, FakeTensor) and fake.pieces == sharded.pieces
    whole = fake.whole()
    assert type(whole) is FakeTensor and whole.shape == (1, 2, 5, 4) and whole.stride() == sharded.stride()


class Causal(nn.Module):
    """Two causal convolutions over time that keep their last frames in a list, read back whole and in part."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, 3, 1, 1))

    def forward(self, x: Tensor, cache: list[Tensor | None], index: list[int]) -> Tensor:
        for _ in range(2):
            i = index[0]
            before, last = cache[i], x[:, :, -2:].clone()
            if before is None:
                x = nn.functional.pad(x, (0, 0, 0, 0, 2, 0))
            else:
                x = torch.cat([before.to(x.device), x], dim=2) + before[:, :, -1:]
            cache[i] = last
            index[0] += 1
            x = nn.functional.conv3d(x, self.weight)
        return x


class Sharding:
    """A backend that runs Dynamo's graph on rank 1's columns and leaves what it returns sharded."""

    def __init__(self, columns: tuple[int, ...]) -> None:
        self.piece = piece(3, columns, "no such group", 1)
        self.kinds: list[list[type]] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        examples = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
        self.kinds.append([type(i) for i in inputs])
        for example, real in zip(examples, inputs, strict=True):
            if isinstance(real, ShardedTensor):
                assert isinstance(example, ShardedTensor) and isinstance(example.local, FakeTensor)
                assert example.pieces == real.pieces and example.shape == real.shape
                assert type(real.local) is Tensor, "the inputs are real ones"
                assert type(example.whole()) is FakeTensor and example.whole().shape == real.shape

        def run(*args: Any) -> list[ShardedTensor]:
            columns = slice(*self.piece.own)
            local = [
                a.local if isinstance(a, ShardedTensor) else a[:, :, :, columns] if len(a) == 1 else a for a in args
            ]
            return [ShardedTensor(out, (self.piece,)) for out in gm(*local)]

        return run


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_caches_in_a_list_compile_twice(mode: Any) -> None:
    model, chunks, backend = Causal(), torch.randn(4, 1, 2, 3, 5, 4), Sharding((0, 3, 5))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    cache: list[Any] = [None, None]
    expected: list[Any] = [None, None]
    with mode():
        for chunk in chunks:
            got, eager = compiled(chunk, cache, [0]), model(chunk, expected, [0])
            for mine, whole in zip([got, *cache], [eager, *expected], strict=True):
                assert type(mine) is ShardedTensor and mine.shape == whole.shape
                torch.testing.assert_close(mine.local, whole[:, :, :, 3:])
    assert backend.kinds == [[Tensor, nn.Parameter], [Tensor, ShardedTensor, nn.Parameter, ShardedTensor]]


def test_a_compile_is_for_one_partition() -> None:
    """Local shapes alone do not tell: columns 3 and 4 of five are another kind of call than columns 2 and 3 of five."""
    seen = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append([i.pieces for i in inputs])
        return lambda cache: [cache.local + 1]

    compiled = torch.compile(lambda cache: cache + 1, backend=backend, fullgraph=True)
    for bounds in [(0, 3, 5), (0, 3, 5), (0, 2, 4, 5), (0, 3, 5)]:
        compiled(ShardedTensor(torch.randn(1, 2, 2, 4), (piece(2, bounds, "no such group", 1),)))
    assert [pieces[0].bounds for (pieces,) in seen] == [(0, 3, 5), (0, 2, 4, 5)]


def test_a_write_in_a_compiled_function_is_refused() -> None:
    def write(cache: Tensor) -> Tensor:
        cache[0] = 1
        return cache + 1

    with pytest.raises(Exception, match=r"writes to a ShardedTensor"):
        torch.compile(write, backend="eager", fullgraph=True)(alone(torch.randn(1, 2, 5, 4)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_backends_gather(backend: str) -> None:
    x = torch.randn(1, 2, 5, 4)
    with torch.no_grad():
        got = torch.compile(lambda t: t[:, :, 1:] * 2, backend=backend, fullgraph=True)(alone(x))
    assert type(got) is Tensor and torch.equal(got, x[:, :, 1:] * 2)


def test_the_gather_itself_is_not_compiled() -> None:
    """Dynamo looks into whatever runs after a graph break: the backend must not get to see how a tensor is gathered."""
    seen = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(gm)
        return gm

    x = torch.randn(1, 2, 5, 4)
    found = torch.compile(lambda cache: cache.nonzero(), backend=backend)(alone(x))
    assert torch.equal(found, x.nonzero()) and not seen


def test_whole_in_a_compiled_function_is_a_node() -> None:
    """A backend that has unwrapped its inputs has no more to do there."""
    seen: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.extend(node.target for node in gm.graph.find_nodes(op="call_method", target="whole"))
        return gm

    x = torch.randn(1, 2, 5, 4)
    got = torch.compile(lambda cache: cache.whole() + 1, backend=backend, fullgraph=True)(alone(x))
    assert torch.equal(got, x + 1) and seen == ["whole"]
