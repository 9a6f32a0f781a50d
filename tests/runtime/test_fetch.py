"""`fetch` on tensors: ranks as threads of this process, then traced, then three real gloo processes."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import pad
from torch.testing._internal.distributed.fake_pg import FakeStore

from pvae.runtime.fetch import fetch, fetched_like
from pvae.runtime.fetch_plan import fetch_plan
from pvae.runtime.mesh import Mesh, make_mesh
from pvae.runtime.torch_compat import new_fake_mode
from tests.ranks import on_threads, run_script


def rows_of(whole: torch.Tensor, dim: int, start: int, stop: int, fill: str) -> torch.Tensor:
    """`[start, stop)` of the whole, filled by `torch.nn.functional.pad`."""
    size, low = whole.shape[dim], max(0, -start)
    mode = "constant" if fill == "zeros" else fill
    last = whole.movedim(dim, -1)
    wide = torch.promote_types(whole.dtype, torch.float64)
    padded = pad(last.reshape(1, -1, size).to(wide), (low, max(0, stop - size)), mode=mode)
    padded = padded.reshape(*last.shape[:-1], -1).movedim(-1, dim)
    return padded.narrow(dim, start + low, stop - start).to(whole.dtype)


def check(whole: torch.Tensor, dim: int, have: Any, need: Any, fill: str, channels_last: bool) -> None:
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(whole.dim() if channels_last else 0)

    def run(rank: int) -> torch.Tensor:
        piece = whole.narrow(dim, have[rank], have[rank + 1] - have[rank])
        if memory_format is not None:
            piece = piece.contiguous(memory_format=memory_format)
        return fetch(piece, dim, have, need, rank, fill, make_mesh().groups[0], channels_last)

    for rank, got in enumerate(on_threads(len(need), run)):
        torch.testing.assert_close(got, rows_of(whole, dim, *need[rank], fill), rtol=0, atol=0)
        if got.numel() and fetch_plan(have, need, fill).kind != "local":
            assert got.is_contiguous(memory_format=memory_format or torch.contiguous_format)


@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    dim=st.integers(-5, 4),
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
    fill=st.sampled_from(["zeros", "replicate", "reflect", "circular"]),
    channels_last=st.booleans(),
    data=st.data(),
)
def test_any_partition_to_any_intervals(
    shape: list[int], dim: int, lengths: list[int], fill: str, channels_last: bool, data: st.DataObject
) -> None:
    have = (0, *accumulate(lengths))
    size = have[-1]
    dim %= len(shape)
    shape[dim] = size
    reach = size - 1 if fill == "reflect" else size
    bound = st.integers(-reach, size + reach)
    if data.draw(st.booleans(), "all to all"):
        need = ((-data.draw(st.integers(0, reach)), size),) * len(lengths)
    else:
        need = tuple(tuple(sorted(data.draw(st.tuples(bound, bound)))) for _ in lengths)
    check(torch.randn(shape), dim, have, need, fill, channels_last)


HALO = (0, 3, 4, 4, 9), ((-2, 5), (1, 6), (2, 6), (2, 11))
ALL = (0, 3, 4, 5, 9), ((0, 9),) * 4


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("have", "need"), [HALO, ALL], ids=["halo", "all"])
@pytest.mark.parametrize(
    ("shape", "dim"), [((9,), 0), ((2, 9, 6), 1), ((2, 6, 9, 5), 2), ((2, 6, 5, 9), -1), ((2, 6, 3, 9, 5), -2)], ids=str
)
def test_every_rank_and_layout(shape: tuple[int, ...], dim: int, have: Any, need: Any, channels_last: bool) -> None:
    check(torch.randn(shape), dim, have, need, "reflect", channels_last)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool], ids=str
)
def test_dtypes(dtype: torch.dtype) -> None:
    check(torch.randint(0, 2, (2, 9, 3)).to(dtype), 1, *HALO, "circular", False)


@pytest.mark.parametrize(("have", "need"), [HALO, ALL, (HALO[0], ((1, 3), (3, 4), (4, 4), (4, 8)))])
@pytest.mark.parametrize(("shape", "dim"), [((9,), 0), ((2, 9, 3), 1), ((2, 3, 9, 5), 2), ((2, 5, 3, 9), -1)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex(
    dtype: torch.dtype, channels_last: bool, shape: tuple[int, ...], dim: int, have: Any, need: Any
) -> None:
    """Rotary tables; conjugated ones are so only by a flag until they travel."""
    check(torch.randn(shape, dtype=dtype), dim, have, need, "reflect", channels_last)
    check(torch.randn(shape, dtype=dtype).conj(), dim, have, need, "zeros", channels_last)


def test_where_one_rank_is_all_there_is() -> None:
    x = torch.randn(1, 2, 5, 4)
    assert make_mesh() == make_mesh((1,)) == Mesh((1,), (None,), 0, (0,))
    assert fetch(x, 2, (0, 5), ((0, 5),)).data_ptr() == x.data_ptr(), "a view"
    padded = fetch(x, 2, (0, 5), ((-2, 6),), 0, "reflect", channels_last=True)
    assert torch.equal(padded, pad(x, (0, 0, 2, 1), mode="reflect"))
    assert padded.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="dimension 3 of .* has 4 rows; rank 0 .* holds 5"):
        fetch(x, -1, (0, 5), ((0, 5),))
    with pytest.raises(ValueError, match="2 ranks exchange rows: name their process group"):
        fetch(x, 2, (0, 5, 5), ((0, 5), (0, 5)))
    with pytest.raises(ValueError, match="holds 4 ranks; there are 1; initialise"):
        make_mesh((2, 2))


def test_mesh_of_two_axes() -> None:
    """A 2-D halo is a fetch along one axis after the other, corners included."""
    whole = torch.randn(1, 2, 7, 9, dtype=torch.float64)
    rows, columns = (0, 3, 7), (0, 2, 5, 9)

    def run(rank: int) -> tuple[Mesh, bool, torch.Tensor]:
        mesh = make_mesh((2, 3))
        r, c = mesh.coordinates
        x = whole[:, :, rows[r] : rows[r + 1], columns[c] : columns[c + 1]]
        for dim, have, axis in ((2, rows, 0), (3, columns, 1)):
            need = tuple((have[i] - 1, have[i + 1] + 1) for i in range(len(have) - 1))
            x = fetch(x, dim, have, need, mesh.coordinates[axis], "zeros", mesh.groups[axis])
        return mesh, make_mesh((2, 3)) is mesh and dist.group.WORLD.group_name not in mesh.groups, x

    around = pad(whole, (1, 1, 1, 1))
    for rank, (mesh, own_groups, got) in enumerate(on_threads(6, run)):
        r, c = mesh.coordinates
        assert mesh.rank == rank == 3 * r + c
        assert own_groups
        assert torch.equal(got, around[:, :, rows[r] : rows[r + 1] + 2, columns[c] : columns[c + 1] + 2])


# Tracing -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=range(4))
def fake_rank(request: pytest.FixtureRequest) -> Iterator[int]:
    dist.init_process_group("fake", rank=request.param, world_size=4, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def collectives(graph: torch.fx.Graph) -> list[str]:
    names = [str(node.target) for node in graph.nodes if "_c10d_functional" in str(node.target)]
    return [name.split(".")[1] for name in names]


CASES = [
    pytest.param(*HALO, ["all_to_all_single", "wait_tensor"], id="halo"),
    pytest.param(*ALL, ["all_gather_into_tensor", "wait_tensor"], id="all"),
    pytest.param(HALO[0], ((-1, 3), (3, 4), (4, 4), (5, 10)), [], id="local"),
    # Rank 0 receives nothing: its collective must outlive dead-code elimination all the same.
    pytest.param(HALO[0], ((0, 3), (2, 4), (3, 4), (2, 9)), ["all_to_all_single", "wait_tensor"], id="one way"),
]


@pytest.mark.parametrize(("have", "need", "expected"), CASES)
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_make_fx(fake_rank: int, mode: str, have: Any, need: Any, expected: list[str]) -> None:
    group = make_mesh().groups[0]
    x = torch.randn(1, 2, have[fake_rank + 1] - have[fake_rank], 6)
    gm = make_fx(
        lambda x: fetch(x, 2, have, need, fake_rank, "reflect", group, True), pre_dispatch=True, tracing_mode=mode
    )(x)
    gm.graph.eliminate_dead_code()
    assert collectives(gm.graph) == expected
    start, stop = need[fake_rank]
    (output,) = gm.graph.find_nodes(op="output")
    assert output.args[0].meta["val"].shape == (1, 2, stop - start, 6)


@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=5),
    order=st.permutations(range(5)),
    dim=st.integers(0, 4),
    lengths=st.lists(st.integers(0, 4), min_size=4, max_size=4).filter(any),
    fill=st.sampled_from(["zeros", "replicate", "reflect", "circular"]),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.complex64]),
    data=st.data(),
)
def test_the_fake_is_what_fakes_of_it_are(
    shape: list[int],
    order: list[int],
    dim: int,
    lengths: list[int],
    fill: str,
    channels_last: bool,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    """`fetched_like` against `fetch` run on fakes, for pieces of any layout: sizes, strides and dtype."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        have, rank, group = (0, *accumulate(lengths)), data.draw(st.integers(0, 3)), make_mesh().groups[0]
        dim, size = dim % len(shape), have[-1]
        shape[dim] = lengths[rank]
        bound = st.integers(-(size - 1), 2 * size - 1)
        need = tuple(tuple(sorted(data.draw(st.tuples(bound, bound)))) for _ in lengths)
        if data.draw(st.booleans(), "what it has, or less"):
            need = tuple((lo, max(lo, hi - 1)) for lo, hi in pairwise(have))
        order = [d for d in order if d < len(shape)]
        with new_fake_mode():
            x = torch.randn([shape[d] for d in order], dtype=dtype).permute([order.index(d) for d in range(len(shape))])
            found, expected = (f(x, dim, have, need, rank, fill, group, channels_last) for f in (fetched_like, fetch))
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        strides = [[s for s, n in zip(y.stride(), y.shape, strict=True) if n > 1] for y in (found, expected)]
        assert strides[0] == strides[1] or not found.numel()
    finally:
        dist.destroy_process_group()


def test_a_trace_is_right_for_other_strides() -> None:
    """A layout pass may change the strides of `x` after `fetch` was traced."""
    x = torch.randn(2, 3, 5, 4)
    gm = make_fx(lambda x: fetch(x, 2, (0, 5), ((-1, 6),), channels_last=True), pre_dispatch=True, tracing_mode="fake")(
        x.to(memory_format=torch.channels_last)
    )
    assert torch.equal(gm(x), pad(x, (0, 0, 1, 1)))


@pytest.mark.parametrize(("have", "need", "expected"), CASES)
def test_dynamo_makes_one_graph(fake_rank: int, have: Any, need: Any, expected: list[str]) -> None:
    from torch._dynamo.backends.common import aot_autograd

    group, graphs = make_mesh().groups[0], []

    def keep(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm.graph)
        (output,) = gm.graph.find_nodes(op="output")
        shapes = [value.meta["val"].shape for value in output.args[0]]
        return lambda *_: [torch.empty(shape) for shape in shapes]  # a fake group refuses to receive for nothing sent

    @torch.compile(backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    def run(x: torch.Tensor) -> torch.Tensor:
        return fetch(x * 2, 2, have, need, fake_rank, "reflect", group) + 1

    with torch.no_grad():
        run(torch.randn(1, 2, have[fake_rank + 1] - have[fake_rank], 6))
    assert [collectives(graph) for graph in graphs] == [expected]


@pytest.mark.slow
def test_gloo_processes(tmp_path: Path) -> None:
    run_script(Path(__file__).with_name("fetch_gloo.py"), "3", str(tmp_path / "store"), seconds=500)


def test_a_mesh_of_another_timeout_is_another(fake_rank: int) -> None:
    """A group keeps the timeout that it was made with."""
    short, long = (make_mesh(timeout=timedelta(seconds=s)) for s in (4, 25))
    assert short is not long and short.groups != long.groups
    assert make_mesh(timeout=timedelta(seconds=4)) is short
