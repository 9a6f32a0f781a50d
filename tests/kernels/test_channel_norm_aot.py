"""The channel norm kernels compiled ahead of time for NVIDIA and AMD GPUs, none of which need be here."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pvae.kernels.channel_norm_launch import Plan, Step, make_plan  # noqa: E402
from pvae.kernels.channel_norm_layout import Border, Operands  # noqa: E402
from pvae.kernels.channel_norm_reference import Norm  # noqa: E402
from pvae.kernels.channels_last import FORMATS  # noqa: E402
from pvae.kernels.triton_launch import kernel_named  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")

TARGETS = {
    "cuda:90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
    "hip:gfx950": GPUTarget("hip", "gfx950", 64),
}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
BF16 = torch.bfloat16
AROUND = Border((2, 0, 1, 1, 1, 1), ("replicate", "reflect", "reflect"))
VIDEO = (2, 96, 4, 48, 64)
USES: dict[str, tuple[Norm, tuple[int, ...], Border, tuple[str, ...]]] = {
    "rms": (Norm("rms", 1e-6, "silu"), VIDEO, Border(), ("weight",)),
    "l2": (Norm("l2", 1e-12, "silu", 9.0), VIDEO, AROUND, ("weight", "bias")),
    "layer": (Norm("layer", 1e-6, "gelu"), (2, 50, 6, 7), Border(), ("weight", "bias")),
    "group": (
        Norm("group", 1e-6, "silu", groups=32),
        (1, 128, 9, 96, 96),
        AROUND,
        ("weight", "bias", "scale", "shift"),
    ),
    "spatial": (
        Norm("group", 1e-6, "silu", groups=32),
        (1, 128, 9, 96, 96),
        Border((2, 0, 0, 0, 0, 0), ("replicate",) * 3),
        ("weight", "bias", "small scale", "small shift"),
    ),
    "small": (Norm("group", 1e-6, "relu", groups=32), (1, 768, 9, 6, 6), Border(), ("weight", "bias")),
    "frames": (Norm("group", 1e-6, groups=1, per_frame=True), (1, 768, 9, 30, 52), AROUND, ()),
}


def plan_of(
    norm: Norm, shape: tuple[int, ...], border: Border, given: tuple[str, ...], lanes: int, dtype: torch.dtype = BF16
) -> tuple[Plan, Operands]:
    def made(name: str) -> torch.Tensor:
        if name in ("weight", "bias"):
            return torch.empty(shape[1], dtype=dtype, device="meta")
        sizes = (*shape[:-2], shape[-2] // 8, shape[-1] // 8) if name.startswith("small") else shape
        return torch.empty(sizes, dtype=dtype, device="meta", memory_format=FORMATS[len(shape)])

    operands = Operands(made("x"), **{name.removeprefix("small "): made(name) for name in given})
    plan = make_plan(norm, operands, border, lanes)
    assert isinstance(plan, Plan), plan
    return plan, operands


def assembly(step: Step, operands: Operands, target: GPUTarget) -> str:
    """What `step` would launch, with 16-byte aligned pointers, as PTX or GCN assembly."""
    kernel = kernel_named(step.kernel)
    constants = dict(step.constants)
    given: dict[str, Any] = operands._asdict()
    pointers = {name: POINTERS[t.dtype] for name, t in given.items() if t is not None} | {
        "y": POINTERS[operands.x.dtype]
    }
    pointers |= dict.fromkeys(("multiplier", "offset", "means", "squares"), "*fp32")
    absent = {name for name, t in given.items() if t is None}
    signature, attributes = {}, {}
    values = [*step.tensors, *step.integers, *step.floats]
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        what = values[position]
        if isinstance(what, str) and what in absent:
            signature[name], constants[name] = "constexpr", None
        elif isinstance(what, str):
            signature[name] = pointers[what]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if isinstance(what, int) else "fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options={"num_warps": step.warps})
    return compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("use", USES)
def test_compiles(use: str, target: str) -> None:
    plan, operands = plan_of(*USES[use], TARGETS[target].warp_size)
    assert len(plan.steps) == {"group": 3, "spatial": 3, "frames": 3, "small": 2}.get(use, 1)
    for step in plan.steps:
        text = assembly(step, operands, TARGETS[target])
        if target.startswith("hip"):
            assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", text) == ["0"]


def test_the_plan_names_the_constants_in_the_kernels_order() -> None:
    """A launch of an already compiled kernel passes them by position."""
    for use in USES.values():
        for step in plan_of(*use, 32)[0].steps:
            names = kernel_named(step.kernel).arg_names
            runtime = len(step.tensors) + len(step.integers) + len(step.floats)
            assert [*step.constants] == names[runtime:]


@pytest.mark.parametrize("channels", [96, 128, 192, 384, 512, 1024])
def test_loads_and_stores_are_sixteen_bytes_wide(channels: int) -> None:
    """In bf16 no narrower load of the activation: what is narrower is one vector a program."""
    for norm in (Norm("l2", 1e-12, "silu", 9.0), Norm("group", 1e-6, "silu", groups=32)):
        shape = (1, channels, 1, 512, 512)
        plan, operands = plan_of(norm, shape, Border(), (), 32)
        for step in plan.steps:
            if step.kernel.endswith("combine_kernel"):
                continue
            ptx = assembly(step, operands, TARGETS["cuda:90"])
            narrow = re.findall(r"(?:ld\.global\S*?\.b16|st\.global\S*?\.b16)", ptx)
            assert not narrow and "v4.b32" in ptx
