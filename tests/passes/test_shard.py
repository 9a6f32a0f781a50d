"""shard: what is split at the start and gathered at the end, what stays in pieces, patches, and the other passes after it.

The rules of ops are the subject of `test_shard_rules.py`.
"""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pvae
from pvae.lockstep import Traffic, lockstep, simulated_mesh
from pvae.module import compiled_forwards
from pvae.passes.ir import placeholders, value
from pvae.passes.shard import NO_PICTURE, ShardError
from pvae.ranks import Ranks
from pvae.runtime.fetch import fetch
from pvae.runtime.sharded_tensor import Piece, ShardedTensor
from pvae.testing import capture, structure
from tests.passes.shard_case import GROUP, HAVE, C, H, N, W, assert_same, shard, x_of

aten = torch.ops.aten

# --- what is split at the start and gathered at the end ------------------------------------------------------------------


def test_a_world_of_one_changes_nothing() -> None:
    def before(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3)

    found = shard(before, x_of(), mesh=(1,))
    assert structure(found.graphs[0]) == structure(capture(before, x_of()).gm)
    assert found.whole == {"shard": "a world of one rank"}
    assert structure(shard(before, x_of(), shard="none").graphs[0]) == structure(found.graphs[0])


def test_a_graph_without_a_picture_is_left_alone() -> None:
    """Neither tokens nor a single row are pictures, and weights are none however they look."""
    found = shard(lambda x, row, w: (x @ x.mT, row + 1, w * 2), x_of(2, 9, 4), x_of(1, 2, 1, 9), x_of(), weights=1)
    assert [r.note for r in found.report.refusals] == [NO_PICTURE] and not found.report.matches


@pytest.mark.parametrize("size", [2, 3, 7])
def test_fewer_rows_than_ranks(size: int) -> None:
    w = torch.randn(C, C, 3, 3, dtype=torch.float64)

    def before(x: Tensor, w: Tensor) -> Tensor:
        return F.group_norm(F.conv2d(F.silu(x), w, padding=1), 2) + F.max_pool2d(x, 3, 1, 1)

    args = x_of(N, C, size, W), w
    found = shard(before, *args, mesh=(5,), weights=1)
    assert not found.report.refusals
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as the variance of no numbers
        assert_same(found, before, *args)


def test_what_does_not_fit_the_mesh_says_so() -> None:
    with pytest.raises(ShardError, match="splits 2 dimensions, the mesh \\(3,\\) has 1 axes"):
        shard(lambda x: x + 1, x_of(), shard_dims="hw")
    with pytest.raises(ShardError, match="splits 1 dimensions, the mesh \\(2, 2\\) has 2 axes"):
        shard(lambda x: x + 1, x_of(), mesh=(2, 2), shard_dims="w")
    with pytest.raises(ShardError, match="the forms are halo, patch, sequence"):
        shard(lambda x: x + 1, x_of(), shard="auto")


@pytest.mark.parametrize(("rows", "bounds"), [(40, (0, 16, 32, 40)), (48, (0, 16, 32, 48))])
def test_an_encoders_picture_is_cut_at_multiples_of_its_stride(rows: int, bounds: tuple[int, ...]) -> None:
    """Then every level has whole rows: no bound moves between them."""

    def encode(x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return x

    found = shard(encode, x_of(N, C, rows, 16))
    first = [next(n for n in gm.graph.nodes if n.target is aten.slice.Tensor) for gm in found.graphs]
    assert [n.args[2:] for n in first] == list(pairwise(bounds))
    assert found.fetches == {"gather": 1}
    assert_same(found, encode, x_of(N, C, rows, 16))


def test_another_picture_of_the_same_plane_is_cut_alike() -> None:
    """A mask at twice the size: its rows stay with those that they mask."""

    def before(x: Tensor, mask: Tensor) -> Tensor:
        return x * F.avg_pool2d(mask, 2)

    found = shard(before, x_of(), x_of(N, C, 2 * H, 2 * W))
    assert found.fetches == {"gather": 1}


# --- pieces that come and go ---------------------------------------------------------------------------------------------


def rows_piece(rank: int) -> tuple[Piece, ...]:
    return (Piece(2, HAVE, ((0, 3), (3, 6), (6, 9)), GROUP, rank),)


def test_outputs_that_may_stay_pieces_do() -> None:
    def before(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x + 1, x * 2, x.mean((2, 3))

    found, x = shard(before, x_of(), left=frozenset({1})), x_of()
    assert [context.left for context in found.contexts] == [{1: rows_piece(rank)} for rank in range(3)]
    for rank, (a, b, c) in enumerate(found.run(x)):
        assert torch.equal(a, x + 1) and torch.equal(b, 2 * x[:, :, 3 * rank : 3 * rank + 3])
        torch.testing.assert_close(c, x.mean((2, 3)))
    off = shard(before, x_of(), gather="off")
    assert [set(context.left) for context in off.contexts] == [{0, 1}] * 3  # the mean is whole on every rank
    assert off.fetches == {"partial sums": 1}


def test_an_output_split_within_a_dimension_is_gathered() -> None:
    """No `ShardedTensor` can say what it is."""
    found = shard(lambda x: x.flatten(1), x_of(), gather="off")
    assert found.contexts[0].left == {} and found.fetches == {"gather": 1}


def test_inputs_held_as_pieces_are_not_cut_again() -> None:
    def before(x: Tensor, cache: Tensor) -> Tensor:
        return torch.cat([cache, x], 1)

    found, x, cache = shard(before, x_of(), x_of(), held={1: rows_piece}), x_of(), x_of()
    inputs = [[x, cache[:, :, 3 * rank : 3 * rank + 3]] for rank in range(3)]
    for output in lockstep(found.graphs, inputs):
        assert torch.equal(output[0], torch.cat([cache, x], 1))
    only = shard(lambda tokens: tokens * 2, x_of(1, 2, 9), held={0: rows_piece}, gather="off")
    assert [value(placeholders(gm.graph)[0]).shape for gm in only.graphs] == [(1, 2, 3)] * 3
    assert only.contexts[2].left == {0: rows_piece(2)}


# --- patches -------------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """A convolution, up by two, another: an output row reads two rows of the input on either side at most."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.interpolate(F.silu(self.first(x)), scale_factor=2.0))


@pytest.mark.parametrize(("mesh", "dims"), [((3,), "h"), ((3,), "w"), ((2, 2), "hw"), ((5,), "h")], ids=str)
def test_patches_exchange_nothing_but_the_result(mesh: tuple[int, ...], dims: str) -> None:
    """With as much context as is read they are exact; with none they are not, and the size is right all the same."""
    model, x = Decoder().double(), x_of(1, C, 11, 13)
    for context, exact in ((2, True), (0, False)):
        found = shard(model, x, mesh=mesh, shard="patch", shard_dims=dims, patch_context=context)
        assert found.fetches == {"gather": len(mesh)} and not found.report.refusals
        traffic = [Traffic() for _ in found.graphs]
        for output in found.run(x, traffic=traffic):
            assert output[0].shape == (1, 1, 22, 26)
            assert torch.allclose(output[0], model(x), rtol=1e-12, atol=1e-12) is exact
        assert {t.collectives for t in traffic} == {len(mesh)}


def test_an_encoders_context_is_in_latents() -> None:
    """Four rows of latents are eight of the picture, and edges have none."""
    found = shard(lambda x: F.avg_pool2d(x, 2), x_of(1, C, 48, 4), shard="patch", patch_context=4)
    cuts = [next(n for n in gm.graph.nodes if n.target is aten.slice.Tensor).args[2:] for gm in found.graphs]
    assert cuts == [(0, 24), (8, 40), (24, 48)]
    assert_same(found, lambda x: F.avg_pool2d(x, 2), x_of(1, C, 48, 4))


def test_patches_cannot_pick_rows() -> None:
    found = shard(lambda x: x[:, :, 1:8], x_of(), shard="patch", patch_context=1)
    assert "pieces with context do not have in one place" in found.whole["slice.Tensor"]
    assert_same(found, lambda x: x[:, :, 1:8], x_of())


# --- with the other passes -----------------------------------------------------------------------------------------------


def test_two_instances_of_a_model_share_one_compile() -> None:
    class Pointwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(C, C, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.conv(x))

    x, models = torch.randn(N, C, H, W), [Pointwise().eval() for _ in range(2)]
    for model in models:
        expected = model(x)
        pvae.compile(model, shard="halo", gather="off", engine="eager")
        (forward,) = compiled_forwards(model)
        forward.ranks = Ranks(simulated_mesh((3,), 1))
        with torch.no_grad():
            y = model(x)
        assert isinstance(y, ShardedTensor) and y.shape == x.shape
        torch.testing.assert_close(y.local, expected[:, :, 3:6])
    shared = [pvae.report(model).graphs[-1].shared_with for model in models]
    assert shared[0] is None and shared[1] is not None


def test_convolution_passes_fire_on_sharded_graphs() -> None:
    """Upstream a convolution rewrite that ran first dropped the halo exchange. Here each rank's are rewritten alike."""
    w, b = torch.randn(C, C, 3, 3, 3, dtype=torch.float64), torch.randn(C, dtype=torch.float64)

    def before(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), w, b)

    for frames, fired in ((5, {"fold_pad", "conv3d_unfold"}), (1, {"drop_zero_taps"})):
        args = x_of(1, C, frames, H, W), w, b
        found = shard(before, *args, passes=None, weights=2, conv3d="unfold2d")
        assert found.fetches == {"exchange": 1, "gather": 1}
        for reports in found.reports:
            assert {"shard", *fired} <= {r.name for r in reports if r.matches}
        assert_same(found, before, *args)


def test_modulated_norms_are_fused_on_sharded_graphs() -> None:
    norm = nn.LayerNorm(8, elementwise_affine=False)

    def before(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        y = norm(x.flatten(2).transpose(1, 2)) * (1 + scale) + shift
        return y.transpose(1, 2).unflatten(2, (H, W))

    args = torch.randn(1, 8, H, W), *torch.randn(2, 1, 1, 8)
    found = shard(before, *args, passes=None, modulation="on")
    assert all(any(r.name == "fuse_modulation" and r.matches for r in reports) for reports in found.reports)
    for output in found.run(*args):
        torch.testing.assert_close(output[0], before(*args))


@pytest.mark.parametrize(
    "options",
    [{"channels_last": "on"}, {"conv3d": "taps"}, {"conv3d": "taps", "upsample_conv": "on"}],
    ids=["convolution", "taps", "enlarged"],
)
def test_fetches_for_convolutions_are_channels_last_on_every_rank(options: dict[str, str]) -> None:
    """Also where a piece is thin or empty, and its strides could be either."""
    w = torch.randn(C, C, 3, 3, dtype=torch.float64)

    def before(x: Tensor, w: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0) if enlarged else x
        return F.conv2d(x, w, padding=1)

    enlarged = "upsample_conv" in options
    args = x_of(N, C, 4 if enlarged else 2, W), w
    found = shard(before, *args, passes=None, weights=1, **options)
    for gm in found.graphs:
        first, last = [n for n in gm.graph.nodes if n.target is fetch]
        assert first.args[7:] == (True,) and last.args[7:] == ()
    assert_same(found, before, *args)
