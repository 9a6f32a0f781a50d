"""Transformers of the zoo on a GPU, through Inductor: their modulation chains are fused, and the results are right."""

from __future__ import annotations

import copy

import pytest
import torch

import pvae
from pvae.testing import agreement
from pvae.tools.zoo import load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

# One of each kind: full and gated residuals, a select by index, RMS norms, per-token and per-frame scales, two streams.
NAMES = (
    "wan2.1-dit",
    "wan2.2-ti2v-dit",
    "qwen-image-edit-dit",
    "flux-dit",
    "sd3.5-dit",
    "mochi-dit",
    "ltx-condition-dit",
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_blocks(name: str, dtype: torch.dtype) -> None:
    case = load(name, dtype=dtype, device="cuda")
    eager, reference = case.run(), case.cast(torch.float64).run()
    pvae.reset()
    pvae.compile(case.model)
    close = agreement(case.run(), eager, reference)
    assert close.ok, str(close)
    assert pvae.report(case.model).matches("fuse_modulation") >= 3


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile(name: str) -> None:
    case = load(name, dtype=torch.bfloat16, device="cuda")
    eager, reference = case.run(), case.cast(torch.float64).run()
    torch._dynamo.reset()
    pvae.reset()
    got = case.run(torch.compile(case.model, backend="pvae", options={}))
    close = agreement(got, eager, reference)
    assert close.ok, str(close)
    assert sum(g.matches("fuse_modulation") for g in pvae.report(None).graphs) >= 3


def test_a_cuda_graph_replays_the_kernels() -> None:
    """What serving does: nothing in the op may synchronise or allocate outside the graph's pool."""
    case = load("flux-dit", dtype=torch.bfloat16, device="cuda")
    block = case.model.transformer_blocks[0]
    kept: list[tuple[tuple[object, ...], dict[str, object]]] = []
    handle = block.register_forward_pre_hook(lambda m, a, k: kept.append((a, k)), with_kwargs=True)
    case.run()
    handle.remove()
    args, kwargs = kept[0]
    eager = copy.deepcopy(block)
    with torch.no_grad():
        pvae.compile(block)
        for _ in range(3):
            block(*args, **kwargs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = block(*args, **kwargs)
        want = eager(*args, **kwargs)
        graph.replay()
        torch.cuda.synchronize()
    for got, expected in zip(out, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=5e-2, atol=5e-2)
