"""The norm kernel compiled ahead of time for NVIDIA and AMD GPUs, none of which need be here."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pvae.kernels.norm_config import Config  # noqa: E402
from pvae.kernels.norm_examples import examples  # noqa: E402
from pvae.kernels.norm_launch import make_plan  # noqa: E402
from pvae.kernels.norm_layout import Operands  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")

TARGETS = {
    "cuda:90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
    "hip:gfx950": GPUTarget("hip", "gfx950", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
BF16, FP32 = torch.bfloat16, torch.float32
USES: dict[str, tuple[str, dict[str, Any]]] = {
    "layer": ("layer", {"affine": True}),
    "frames": ("layer", {"form": "frame", "frames": 4, "strided": True}),
    "rms": ("rms", {}),
    "residual": ("layer", {"residual": True, "gate_form": "row_slice"}),
    "residual_select": ("layer", {"residual": True, "select": True}),
    "gate": ("none", {"residual": True}),
}


def assembly(norm: str, operands: Operands, target: GPUTarget, config: Config | None = None) -> str:
    """The kernel that `run` would launch for these operands, with 16-byte aligned pointers, as PTX or GCN assembly."""
    from pvae.kernels.norm_kernel import INTEGERS, norm_kernel

    dtype = operands.x.dtype
    h, y = (dtype if operands.residual is not None else None), (dtype if norm != "none" else None)
    plan = make_plan(norm, operands, h, y, config, target.warp_size)
    assert not isinstance(plan, str), plan
    constants = dict(plan.constants)
    warps = plan.warps
    dtypes = {name: None if t is None else t.dtype for name, t in operands._asdict().items()} | {"h": h, "y": y}
    numbers = dict(zip(INTEGERS, plan.integers, strict=True))
    signature, attributes = {}, {}
    for position, name in enumerate(norm_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in dtypes and dtypes[name] is None:
            signature[name], constants[name] = "constexpr", None
        elif name in dtypes:
            signature[name] = POINTERS[dtypes[name]]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in INTEGERS:
            signature[name] = "i32" if numbers[name] is not None else "constexpr"
            constants |= {name: None} if numbers[name] is None else {}
        else:
            signature[name] = "fp32"
    source = ASTSource(fn=norm_kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    return compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]


def test_the_plan_names_the_constants_in_the_kernels_order() -> None:
    """A launch of an already compiled kernel passes them by position."""
    from pvae.kernels.norm_kernel import norm_kernel

    plan = make_plan("layer", examples((1, 4, 64), BF16), None, BF16)
    assert not isinstance(plan, str)
    assert [*plan.constants] == norm_kernel.arg_names[-len(plan.constants) :]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("use", USES)
def test_compiles(use: str, target: str) -> None:
    norm, options = USES[use]
    for channels in (5120, 3073, 48):
        operands = examples((2, 64, channels), BF16, **options)
        if norm == "rms":
            operands = operands._replace(bias=None)
        if norm == "none":
            operands = operands._replace(scale=None, scale1=None, shift=None, shift1=None)
        assert assembly(norm, operands, TARGETS[target])


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_in_other_cuts(target: str) -> None:
    warps = 128 // TARGETS[target].warp_size
    for config in (Config(warps, 1024, early=False), Config(warps, 256, 2), Config(warps, 2048)):
        operands = examples((1, 64, 1536), FP32, residual=True, select=True, mod_dtype=BF16)
        assert assembly("layer", operands, TARGETS[target], config)


def test_loads_are_sixteen_bytes_wide_and_nothing_spills() -> None:
    """bf16, 5120 channels as 5 pieces of 1024: five 16-byte loads of x a thread and no narrower one."""
    operands = examples((1, 64, 5120), BF16)
    ptx = assembly("layer", operands, TARGETS["cuda:90"])
    widths = set(re.findall(r"(?:ld|st)\.global\S*?\.(v\d\.b\d+|b\d+)\b", ptx))
    assert widths == {"v4.b32"}
    assert len(re.findall(r"ld\.global", ptx)) == 15 and len(re.findall(r"st\.global", ptx)) == 5
    gcn = assembly("layer", operands, TARGETS["hip:gfx942"])
    assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", gcn) == ["0"]
    assert "load_dwordx4" in gcn


@pytest.mark.parametrize("form", ["slice", "sample", "row_slice"])
@pytest.mark.parametrize("select", [False, True])
def test_a_hidden_size_that_8_but_not_16_divides_still_loads_sixteen_bytes(select: bool, form: str) -> None:
    ptx = assembly("layer", examples((1, 64, 3080), BF16, form=form, select=select), TARGETS["cuda:90"])
    widths = re.findall(r"ld\.global\S*?\.(v\d\.b\d+|b\d+)\b", ptx)
    assert set(widths) == ({"v4.b32", "b64"} if select else {"v4.b32"}) and widths.count("b64") == select


def test_of_two_sets_only_one_is_loaded() -> None:
    plain, select = (
        assembly("layer", examples((1, 64, 5120), BF16, residual=True, select=s), TARGETS["cuda:90"], Config(4, 1024))
        for s in (False, True)
    )
    loads = [len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) for ptx in (plain, select)]
    assert loads == [25, 25]
