"""The kernel of wide attention compiled ahead of time for NVIDIA and AMD GPUs, none of which need be here."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pvae.kernels.triton_launch import kernel_named  # noqa: E402
from pvae.kernels.wide_attention import MOST_COLUMNS, weigh_step  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")

TARGETS = {
    "cuda:90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
    "hip:gfx950": GPUTarget("hip", "gfx950", 64),
}


def assembly(keys: int, width: int, first: bool, target: GPUTarget, channels: int = 384) -> str:
    """What a launch compiles to for bf16, as PTX or GCN assembly."""
    step = weigh_step(2048, width, keys, channels, 0.05, first, target.warp_size)
    kernel = kernel_named(step.kernel)
    constants = dict(step.constants)
    names = kernel.arg_names
    assert [*names[len(names) - len(constants) :]] == [*constants]  # a launch passes them by position
    signature = dict.fromkeys(step.tensors, "*fp32") | {"weights": "*bf16"}
    signature |= dict.fromkeys(("stride", "padded", "keys", "channels"), "i32") | {"factor": "fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    assert [*signature] == names
    divisible = [i for i, name in enumerate(names) if name in (*step.tensors, "stride", "padded", "channels")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    compiled = triton.compile(source, target=target, options={"num_warps": step.warps})
    return compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", [64, 1024, 3200, MOST_COLUMNS])
def test_compiles_without_spills(width: int, target: str) -> None:
    text = assembly(width - 3, width, False, TARGETS[target])
    if target.startswith("hip"):
        assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", text) == ["0"]


@pytest.mark.parametrize("keys", [4096, 3197])
def test_loads_and_stores_are_wide_for_any_number_of_keys(keys: int) -> None:
    """16 bytes a thread: eight values are two loads of fp32 and one store of bf16."""
    ptx = assembly(keys, 4096, True, TARGETS["cuda:90"])
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 2 * len(re.findall(r"st\.global\.v4\.b32", ptx)) == 4
    assert len(re.findall(r"(?:ld|st)\.global", ptx)) == 6 + 2  # and the maximum and the sum
