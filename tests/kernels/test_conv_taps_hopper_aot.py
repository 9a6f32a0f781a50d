"""Hopper's kernel of `conv_taps` compiled ahead of time, as its plans launch it. No GPU need be here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402

from pvae.kernels import conv_taps_launch as launch  # noqa: E402
from pvae.kernels.conv_taps_config import SHARED_BYTES, Config, Work, hopper_clocks, hopper_configs  # noqa: E402
from tests.kernels.conv_taps_cases import Case  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
CAUSAL = (0, 0, 1, 1, 1, 1)
# The config, and whether nothing may be spilled.
USES: dict[str, tuple[Case, Config, bool]] = {
    "96": (
        Case(
            (1, 96, 4, 480, 832), 96, (3, 3, 3), padding=CAUSAL, before=2, residual=True, activation="silu", dtype=BF16
        ),
        Config(6, 64, 64, 32, 32, 9, 4),
        True,
    ),
    "128": (Case((1, 128, 64, 64), 128, (3, 3), dtype=FP16), Config(4, 64, 128, 0, 32, 9, 4), True),
    "turned": (
        Case((1, 384, 2, 120, 208), 384, (3, 3, 3), padding=CAUSAL, before=2, residual=True, dtype=BF16),
        Config(64, 4, 128, 0, 32, 9, 4),
        True,
    ),
    "turned and enlarged": (
        Case((1, 384, 60, 104), 3, (2, 2), upsample=True, residual=True, dtype=BF16),
        Config(64, 2, 64, 0, 32, 9, 4),
        True,
    ),
    "192": (
        Case((2, 192, 2, 60, 104), 192, (3, 3, 3), padding=CAUSAL, before=2, dtype=BF16),
        Config(4, 64, 128, 64, 32, 9, 2),
        True,
    ),
    "enlarged": (
        Case((1, 192, 2, 30, 64), 96, (1, 2, 2), upsample=True, activation="relu", dtype=BF16),
        Config(6, 64, 64, 32, 32, 9, 4),
        True,
    ),
    "rgb": (Case((1, 96, 30, 64), 3, (3, 3), residual=True, dtype=BF16), Config(12, 64, 16, 0, 32, 9, 4), True),
    "narrow": (Case((1, 64, 8, 30), 48, (5, 5), bias=False, dtype=BF16), Config(4, 32, 32, 0, 32, 9, 4), True),
    "down": (
        Case((4, 96, 480, 832), 96, (3, 3), stride=(2, 2), padding=(0, 1, 0, 1), dtype=BF16),
        Config(6, 64, 64, 32, 32, 9, 4),
        True,
    ),
    "down in time": (
        Case((1, 128, 8, 64, 64), 256, (3, 3, 3), stride=(2, 2, 2), padding=CAUSAL, before=2, dtype=FP16),
        Config(8, 32, 128, 0, 32, 9, 4),
        True,
    ),
    "tf32": (Case((1, 96, 30, 64), 96, (1, 1), padding=(0,) * 4, dtype=FP32), Config(4, 64, 64, 32, 32, 9, 4), True),
}


def plan_of(case: Case, config: Config, monkeypatch: pytest.MonkeyPatch) -> launch.HopperPlan:
    monkeypatch.setattr(launch, "_processors", lambda device: 132)
    monkeypatch.setattr(launch, "is_hopper", lambda device: True)
    operands = [
        None if shape is None else torch.empty(shape, dtype=case.dtype, device="meta")
        for shape in (
            case.x,
            case.before_shape if case.before else None,
            case.weight_shape,
            (case.out,) if case.bias else None,
            case.out_shape() if case.residual else None,
        )
    ]
    memory = [None if t is None else launch.Memory(t.shape, t.stride(), t.dtype, t.device) for t in operands]
    stride, padding, dilation, upsample, activation = case.rest
    rest = (tuple(stride), tuple(padding), tuple(dilation), upsample, activation, tuple(config.numbers()), True, True)
    plan = launch.make_plan(launch.Call(*memory, *rest), case.out_shape())
    assert isinstance(plan, launch.HopperPlan)
    return plan


def compiled(case: Case, plan: launch.HopperPlan) -> Any:
    """What `plan.launch` would have Triton compile for sm_90."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from pvae.kernels.conv_taps_hopper import conv_taps_hopper

    name = NAMES[case.dtype]
    blocks = [d and d[2] for d in plan.descriptors]
    types = [b and f"tensordesc<{name}{b},{launch._shared_layout(tuple(b), case.dtype)!r}>" for b in blocks]
    types += [f"*{name}" if given else None for given in (case.bias, case.residual, plan.stores)]
    types += ["i32"] * len(plan.integers)
    values = [None] * len(types) + list(plan.run.constants.values())
    types += [None] * len(plan.run.constants)
    names = conv_taps_hopper.arg_names
    assert len(names) == len(types)
    signature = {n: t or "constexpr" for n, t in zip(names, types, strict=True)}
    constants = {n: v for n, v, t in zip(names, values, types, strict=True) if t is None}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types) if t is not None and t.startswith("*")}
    source = GluonASTSource(fn=conv_taps_hopper, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=plan.run.options)


# Bytes at most. "192": all columns in one program, which the rule chooses for few shapes; "down": outside of the steps.
SPILLED = {"192": 64, "down": 24}


@pytest.mark.parametrize("use", USES)
def test_compiles_to_what_it_is_meant_to(use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, config, _ = USES[use]
    plan = plan_of(case, config, monkeypatch)
    kernel = compiled(case, plan)
    ptx = kernel.asm["ptx"]
    assert kernel.metadata.shared <= SHARED_BYTES
    # Both groups: every tap in height of every product, both blocks of columns, and depth in pieces of 32 bytes.
    pieces = config.depth * case.dtype.itemsize // 32
    products = 2 * config.rows * case.kernel[-2] * pieces * (2 if config.columns1 else 1)
    wide = {BF16: "bf16.bf16", FP16: "f16.f16", FP32: "tf32.tf32"}[case.dtype]
    assert len(re.findall(rf"wgmma\.mma_async\S*{wide}", ptx)) == products
    assert ("cp.async.bulk.tensor.5d.global" in ptx) != plan.stores
    # A stage is given back when all warps of the group are done with it: products, then a barrier, then one thread.
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned\s+0;(.*?)mbarrier\.arrive\.shared", ptx, re.DOTALL)
    assert len(waits) == 2 and all("bar" in w and "wgmma.mma" not in w for w in waits)
    said = assembler(ptx, tmp_path)
    assert "serializ" not in said, said
    assert all(int(n) <= SPILLED.get(use, 0) for n in re.findall(r"(\d+) bytes spill", said)), said


def assembler(ptx: str, folder: Path) -> str:
    """What ptxas says."""
    (folder / "kernel.ptx").write_text(ptx)
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [str(ptxas), "-v", "--gpu-name=sm_90a", str(folder / "kernel.ptx"), "-o", str(folder / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_the_rule_on_decoders() -> None:
    """By whole waves: 60 x 104 in tiles of six rows would leave half of the processors idle."""

    def first(*sizes: Any) -> tuple[int, ...]:
        return tuple(hopper_configs(Work(*sizes, BF16))[0].numbers()[:4])

    assert first(96, 96, (3, 3, 3), 4, 480, 832) == (6, 64, 64, 32)
    assert first(256, 256, (1, 3, 3), 1, 512, 512) == (4, 64, 128, 0)
    assert first(384, 384, (3, 3, 3), 1, 60, 104) == (4, 64, 64, 32)
    assert first(96, 3, (3, 3, 3), 4, 480, 832)[2:] == (16, 0)
    assert first(384, 384, (3, 3, 3), 2, 120, 208) == (64, 4, 128, 0), "columns of 64 waste 8 of 128, rows 48 of 256"


def test_a_stride_in_height_reads_more_rows() -> None:
    """Of six rows of results 13 and not 8: fewer stages fit, and it takes longer."""
    config = Config(6, 64, 64, 32, 32, 9, 4)
    assert [config.fragments(3, stride) for stride in (1, 2)] == [8, 13]
    assert [config.stages_that_fit(3, 2, stride) for stride in (1, 2)] == [4, 2]
    plain, strided = (Work(96, 96, (1, 3, 3), 4, 240, 416, BF16, strides=(stride, stride)) for stride in (1, 2))
    assert hopper_clocks(plain, config) < hopper_clocks(strided, config)
    assert all(c.stages_that_fit(3, 2, 2) >= 2 for c in hopper_configs(strided))


def test_fragments_are_counted_as_the_kernel_loads_them() -> None:
    from pvae.kernels.conv_taps_hopper import fragments

    for width in (16, 32, 64):
        for rows in (1, 2, 3):
            config = Config(2 * rows * 64 // width, width, 64, 0, 32, 9, 2)
            for kernel_h in (1, 2, 3, 5, 7):
                for stride in (1, 2):
                    assert config.fragments(kernel_h, stride) == fragments(2 * rows, kernel_h, width, stride)


def test_every_config_fits() -> None:
    """Two stages of it, and its numbers go through the op's argument."""
    for sizes in ((96, 96, (3, 3, 3), 4, 480, 832), (512, 512, (1, 1, 1), 1, 16, 20), (8, 3, (5, 5, 5), 1, 9, 9)):
        for config in hopper_configs(Work(*sizes, BF16))[:20]:
            assert Config.of(config.numbers()) == config and config.hopper
            assert config.stages_that_fit(sizes[2][1], 2) >= 2


@pytest.mark.parametrize("numbers", [(5, 64, 64, 32, 32, 9, 4), (2, 8, 64, 0, 32, 9, 4), (2, 64, 64, 0, 32, 9, 1)])
def test_configs_that_no_kernel_can_be_cut_to(numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Hopper|multiple"):
        Config.of(numbers)


def test_what_hopper_does_not_take_goes_to_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(4, 64, 64, 0, 32, 9, 4)
    for case in (
        Case((1, 64, 8, 8), 64, (3, 3), stride=(3, 1), dtype=BF16),
        Case((1, 64, 1, 8), 64, (3, 3), stride=(2, 1), dtype=BF16),
        Case((1, 64, 8, 8), 64, (3, 3), dilation=(2, 1), dtype=BF16),
        Case((1, 12, 8, 8), 64, (3, 3), dtype=BF16),
    ):
        with pytest.raises(ValueError, match="does not take this call|no dilation"):
            plan_of(case, config, monkeypatch)
