"""The error contract of whole VAEs on a GPU, through Inductor; `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

import pvae
from pvae.testing import agreement
from pvae.tools.zoo import load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("part", ["decode", "encode"])
@pytest.mark.parametrize("name", ["wan2.1", "qwen-image", "hunyuan-video", "cogvideox", "magvit", "kl"])
def test_contract(name: str, part: str, dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    case = load(name, part=part, dtype=dtype, device="cuda")
    reference, eager = case.cast(torch.float64).run(), case.run()
    pvae.compile(case.model)
    found = agreement(case.run(), eager, reference)
    assert found.ok, str(found)


@pytest.mark.parametrize("form", ["native", "channels_last", "unfold2d"])
def test_every_form_of_conv3d(form: str) -> None:
    case = load("wan2.1", dtype=torch.bfloat16, device="cuda")
    reference, eager = case.cast(torch.float64).run(), case.run()
    pvae.compile(case.model, conv3d=form)
    found = agreement(case.run(), eager, reference)
    assert found.ok, str(found)
    assert (pvae.report(case.model).matches("conv3d_unfold") > 0) == (form == "unfold2d")


def test_a_second_frame_count_compiles_nothing_more_and_caches_stay_small() -> None:
    case = load("wan2.1", dtype=torch.bfloat16, device="cuda")
    pvae.compile(case.model)
    case.run()
    graphs = len(pvae.report(case.model).graphs)
    longer = load("wan2.1", dtype=torch.bfloat16, device="cuda", size=(29, 32, 48))
    out = case.run(inputs=longer.inputs)
    assert out.shape[2] == 29
    assert len(pvae.report(case.model).graphs) == graphs == 3


def test_unfold_memory_bound() -> None:
    """At most 1.5 times the memory of input and output plus 256 MiB, for an activation that must be cut in pieces."""
    x = torch.randn(1, 96, 6, 480, 832, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)
    weight = torch.randn(96, 3 * 96, 3, 3, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    args = (x, weight, None, 3, [1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1], 1, True)
    torch.ops.pvae.conv3d_unfold(*args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = torch.ops.pvae.conv3d_unfold(*args)
    peak = torch.cuda.max_memory_allocated() - before
    native = x.numel() * x.element_size() + y.numel() * y.element_size()
    assert peak <= y.numel() * y.element_size() + 0.5 * native + 320 * 2**20  # 64 MiB for cuDNN's own workspace
