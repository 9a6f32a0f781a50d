"""The Triton kernel of conv_taps compiled ahead of time for NVIDIA and AMD GPUs, none of which need be here."""

from __future__ import annotations

import functools
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pvae.kernels.conv_taps_config import Config, default_config  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
    "hip:gfx950": GPUTarget("hip", "gfx950", 64),
}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Use:
    """One specialisation of the kernel; sizes that are no constants count as multiples of 16 where `whole`."""

    channels: int
    out: int
    dtype: torch.dtype = BF16
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)
    before: bool = False
    upsample: bool = False
    bias: bool = True
    residual: bool = False
    activation: str = "none"
    config: Config | None = None
    whole: bool = True

    def cut(self, hip: bool) -> Config:
        if self.config is not None:
            return self.config
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.version, "hip", "7.0" if hip else None)
            return default_config(self.channels, self.out, 480, 832, self.dtype)


USES = {
    "wan96": Use(96, 96, before=True, residual=True, activation="silu"),
    "wan192": Use(192, 192, FP16, before=True),
    "down": Use(384, 384, FP16, (1, 3, 3), (1, 2, 2), bias=False),
    "up": Use(192, 96, kernel=(1, 2, 2), upsample=True),
    "tf32": Use(96, 128, FP32, (1, 3, 3), residual=True),
    "odd": Use(3, 50, BF16, (1, 3, 3), activation="relu", whole=False),
}
TENSOR_CORES = {  # the instructions, for 16 bits and for fp32
    "cuda:80": (r"mma\.sync\.aligned\.m16n8k16\S*\.{}\.", r"mma\.sync\.aligned\.m16n8k8\S*\.tf32\."),
    "cuda:90": (r"wgmma\.mma_async\S*\.{}\.", r"wgmma\.mma_async\S*\.tf32\."),
    "hip:gfx942": (r"v_mfma_f32_\w+_{}", r"v_mfma_f32_\w+f32"),
    "hip:gfx950": (r"v_mfma_f32_\w+_{}", r"v_mfma_f32_\w+f32"),
}


# Of a multiprocessor; 99 KiB are those of a consumer card of the A100's generation.
SHARED_BYTES = {"cuda:80": 99 * 1024, "cuda:90": 227 * 1024, "hip:gfx942": 64 * 1024, "hip:gfx950": 160 * 1024}


@functools.cache
def compiled(use: Use, target: str) -> Any:
    """The kernel that a launch would make, with 16-byte aligned pointers."""
    from pvae.kernels.conv_taps_kernel import conv_taps_kernel

    cut, backend = use.cut(target.startswith("hip")), TARGETS[target]
    constants: dict[str, Any] = {
        "CHANNELS": use.channels,
        **dict(zip(("KT", "KH", "KW"), use.kernel, strict=True)),
        **dict(zip(("STRIDE_T", "STRIDE_H", "STRIDE_W"), use.stride, strict=True)),
        **dict.fromkeys(("DILATION_T", "DILATION_H", "DILATION_W"), 1),
        "PAD_T": 0,
        "PAD_H": 1,
        "PAD_W": 1,
        "HAS_BEFORE": use.before,
        "UPSAMPLE": use.upsample,
        "ACTIVATION": use.activation,
        "PRECISION": "tf32" if use.dtype == FP32 and backend.backend == "cuda" else "ieee",
        "UPCAST": False,
        "BH": cut.height,
        "BW": cut.width,
        "BN0": cut.columns0,
        "BN1": cut.columns1,
        "BK": cut.depth,
    }
    absent = {name for name in ("bias", "residual") if not getattr(use, name)}
    signature, attributes = {}, {}
    for position, name in enumerate(conv_taps_kernel.arg_names):
        if name in constants or name in absent:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        elif name in ("x", "weight", "bias", "residual", "y"):
            signature[name] = POINTERS[use.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i64" if name in ("stride_which", "stride_n") else "i32"
            if use.whole and (name.startswith("stride") or name == "out_channels"):
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=conv_taps_kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=backend, options={"num_warps": cut.warps, "num_stages": cut.stages})


def assembly(use: Use, target: str) -> str:
    return compiled(use, target).asm["ptx" if target.startswith("cuda") else "amdgcn"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("use", USES)
def test_default_cuts_compile_to_tensor_cores_and_fit(use: str, target: str) -> None:
    text, dtype = assembly(USES[use], target), USES[use].dtype
    half, single = TENSOR_CORES[target]
    pattern = single if dtype == FP32 else half.format("bf16" if dtype == BF16 else "f16")
    assert re.search(pattern, text), sorted(set(re.findall(r"\S*mma\S*|\S*mfma\S*", text)))
    assert compiled(USES[use], target).metadata.shared <= SHARED_BYTES[target]
    if target.startswith("hip"):
        assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", text) == ["0"]


@pytest.mark.parametrize("use", [use for use in USES if USES[use].whole])
def test_loads_and_stores_are_sixteen_bytes_wide(use: str) -> None:
    """Of the activation, the weight, the residual and the result; what is narrower is the bias."""
    ptx = assembly(USES[use], "cuda:80")
    assert set(re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+)", ptx)) == {"0x10"}
    assert set(re.findall(r"st\.global\S*", ptx)) == {"st.global.v4.b32"}
    loads = set(re.findall(r"ld\.global\S*", ptx))
    assert ("ld.global.v4.b32" in loads) == USES[use].residual
    assert bool(loads - {"ld.global.v4.b32"}) == USES[use].bias
    gcn = assembly(USES[use], "hip:gfx942")
    assert "load_dwordx4" in gcn and not re.search(r"(load_u|store_)(short|byte)", gcn)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
@pytest.mark.parametrize("use", ["wan96", "wan192"])
def test_eight_warps_spill_nothing(use: str, target: str, tmp_path: Path) -> None:
    """Four do, by some hundred bytes a thread: their accumulators alone are 192 registers."""
    wide = replace(USES[use], config=replace(USES[use].cut(hip=False), warps=8))
    source = tmp_path / "kernel.ptx"
    source.write_text(assembly(wide, target))
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    name = {"cuda:80": "sm_80", "cuda:90": "sm_90a"}[target]
    command = [ptxas, "-v", f"--gpu-name={name}", source, "-o", tmp_path / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said) == [("0", "0")]


def test_without_columns1_and_with_other_depths() -> None:
    """What a tuning run may choose."""
    for config in (Config(8, 16, 128, 0, 32, 8, 3), Config(4, 32, 64, 0, 16, 4, 2), Config(1, 64, 16, 16, 64, 4, 2)):
        use = Use(96, 96, FP16, (3, 1, 1), before=True, residual=True, config=config)
        for target in ("cuda:80", "hip:gfx942"):
            assert re.search(TENSOR_CORES[target][0].format("f16"), assembly(use, target))
