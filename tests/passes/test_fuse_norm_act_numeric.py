"""fuse_norm_act in numbers: random models against float64, sizes that change, a shared compile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pvae
from pvae.testing import agreement, relative_error, video_models
from tests.passes.norm_spellings import C, frames, joined, moved, rms_over_last


@given(video_models())
@settings(max_examples=25, deadline=None)
def test_random_models_in_double_precision(drawn: tuple[nn.Module, Tensor]) -> None:
    model, x = drawn[0].double(), drawn[1].double()
    compiled = pvae.compile(copy.deepcopy(model), engine="eager", norm_act="on", strict="on")
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 1e-12


class Block(nn.Module):
    """What autoencoders are made of, in one of their ways."""

    def __init__(self, kind: str, act: nn.Module, frames_apart: bool, pad: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(C, 1, 1, 1)), nn.Parameter(torch.randn(C))
        self.conv = nn.Conv3d(C, C, (2, 3, 3))
        self.kind, self.act, self.frames_apart, self.pad = kind, act, frames_apart, pad

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight, self.bias
        if self.kind == "normalize":
            y = F.normalize(x, dim=1) * C**0.5 * w
        elif self.kind == "group":
            y = frames(x, w.flatten(), b, 2) if self.frames_apart else F.group_norm(x, 2, w.flatten(), b)
        else:
            y = moved(lambda v: rms_over_last(v).to(v.dtype) * w.flatten() + b, x)
        y = self.act(y)
        if self.pad == "frames":
            return self.conv(F.pad(joined(y, 1, 0), (1, 1, 1, 1)))
        return x + self.conv(F.pad(y, (1, 1, 1, 1, 1, 0), self.pad))


@given(
    kind=st.sampled_from(("normalize", "group", "rms")),
    act=st.sampled_from((nn.SiLU(), nn.ReLU(), nn.GELU(), nn.Identity())),
    frames_apart=st.booleans(),
    pad=st.sampled_from(("replicate", "reflect", "constant", "frames")),
    size=st.tuples(st.integers(1, 2), st.integers(2, 4), st.integers(2, 5), st.integers(2, 5)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    layout=st.sampled_from((torch.contiguous_format, torch.channels_last_3d)),
)
@settings(max_examples=25, deadline=None)
def test_error_contract(
    kind: str, act: nn.Module, frames_apart: bool, pad: str, size: Any, dtype: Any, layout: Any
) -> None:
    torch.manual_seed(0)
    model = Block(kind, act, frames_apart, pad).to(dtype)
    n, *spatial = size
    x = torch.randn(n, C, *spatial).to(dtype).to(memory_format=layout)
    compiled = pvae.compile(copy.deepcopy(model), engine="eager", norm_act="on", strict="on", disable="conv_taps")
    with torch.no_grad():
        found = agreement(compiled(x), model(x), copy.deepcopy(model).double()(x.double()))
    assert pvae.report(compiled).matches("fuse_norm_act") == 1
    assert found.ok, str(found)


@pytest.mark.parametrize("kind", ["normalize", "group", "rms"])
def test_sizes_that_change(kind: str) -> None:
    model = Block(kind, nn.SiLU(), False, "replicate")
    compiled = torch.compile(model, backend="pvae", dynamic=True, options={"engine": "eager", "norm_act": "on"})
    with torch.no_grad():
        for size in ((2, C, 3, 4, 5), (3, C, 4, 6, 7), (2, C, 5, 8, 6)):
            x = torch.randn(size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    graphs = pvae.report(model).graphs
    assert len(graphs) == 1
    (report,) = [p for p in graphs[0].passes if p.name == "fuse_norm_act"]
    assert len(report.matches) == 1 and report.matches[0].note.endswith("silu + replicate border")


@pytest.mark.parametrize("engine", ["eager", "inductor"])
def test_two_instances_share_one_compile(engine: str) -> None:
    blocks = [Block("group", nn.SiLU(), False, "replicate") for _ in range(2)]
    x = torch.randn(1, C, 2, 4, 4)
    with torch.no_grad():
        want = [block(x) for block in blocks]
        for block in blocks:
            pvae.compile(block, engine=engine, norm_act="on")
        for block, result in zip(blocks, want, strict=True):
            torch.testing.assert_close(block(x), result, rtol=1e-4, atol=1e-5)
        assert [g.shared_with for g in pvae.report(None).graphs] == [None, 0]
