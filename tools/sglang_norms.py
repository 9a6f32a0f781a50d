"""SGLang's Triton norm kernels, for comparison: its own files, loaded without SGLang around them.

What they import from the rest of SGLang chooses a platform and registers ops; small stand-ins do here. The files
themselves are the user's to fetch (`bench_norms`), and are not part of pvae.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pvae.kernels.norm_layout import Operands

OPS = "sglang.kernels.ops.diffusion"
FILES = {
    "modulate": f"{OPS}.modulate.scale_shift_triton",
    "norm": f"{OPS}.norm.norm_triton",
    "residual": f"{OPS}.norm.scale_residual_norm_scale_shift_triton",
    "exact": "sglang.kernels.kda_kernels.layernorm_modulate_triton",
}


def _first(function: Any = None, *args: Any, **kwargs: Any) -> Any:
    """A decorator, or the factory of one, that leaves the function as it is."""
    return function if callable(function) else _first


STAND_INS: dict[str, Any] = {
    "select_impl": _first,
    "lazy_fallback": lambda *names: None,
    "register_custom_op": _first,
    "replay_launches": _first,
    "is_cuda": lambda: torch.version.cuda is not None,
    "is_hip": lambda: torch.version.hip is not None,
    "is_xpu": lambda: False,
    "is_gfx1250_supported": lambda: False,
    "fuse_scale_shift_kernel_native": None,
    "get_jit_cuda_arch": None,
    "fp8_dtype": torch.float8_e4m3fn,
    "fp8_max": 448.0,
    "fp8_min": -448.0,
}


@functools.cache
def _load(root: Path) -> dict[str, ModuleType]:
    """The modules of FILES, by their keys."""
    import triton.language as tl

    shell = dict(STAND_INS, fp8_dtype_to_triton=lambda dtype: tl.float8e4nv)
    numerics = _from_file(root, "sglang.kernels.numerics")
    for name in (
        f"{OPS}.common.platform",
        f"{OPS}.common.fallback_torch",
        f"{OPS}.common.fast_launch",
        "sglang.kernels.jit.utils",
        "sglang.kernels.ops.quantization.fp8_kernel",
        "sglang.kernels.ops.quantization.fp8_utils",
        "sglang.srt.utils",
        "sglang.srt.utils.custom_op",
    ):
        _module(name).__dict__.update(shell)
    _module("sglang.kernels.numerics").__dict__.update(vars(numerics))
    return {key: _from_file(root, name) for key, name in FILES.items()}


def _module(name: str) -> ModuleType:
    """An empty module of that name in `sys.modules`, within empty packages."""
    parent = name.rpartition(".")[0]
    if parent:
        _module(parent)
    if name not in sys.modules:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = []
    return sys.modules[name]


def _from_file(root: Path, name: str) -> ModuleType:
    path = root / (name.replace(".", "/") + ".py")
    if not path.exists():
        raise FileNotFoundError(f"{path}: see `python -m pvae.tools.bench_norms --help` for how to fetch it")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sglang_norms(root: Path, form: str, o: Operands, eps: float) -> dict[str, Callable[[Operands], Any]]:
    """SGLang's ways to compute a form of `bench_norms` on operands like `o`, by name; none where it has no kernel."""
    files = _load(root)
    modulate, norm = files["modulate"], files["norm"]
    batch, _, channels = o.x.shape

    def two_kernels(o: Operands) -> Any:
        rows = norm.norm_infer(o.x.view(-1, channels), None, None, eps, form == "rms")
        return modulate.fuse_scale_shift_kernel(rows.view(o.x.shape), o.scale, o.shift)

    def one_kernel(o: Operands) -> Any:
        assert o.scale is not None and o.shift is not None
        return files["exact"].fused_layernorm_modulate_raw(o.x, o.scale[:, 0], o.shift[:, 0], eps)

    def residual(o: Operands) -> Any:
        return files["residual"].fused_scale_residual_norm_scale_shift_triton(
            residual=o.residual, x=o.x, gate=o.gate, shift=o.shift, scale=o.scale, weight=None, bias=None, eps=eps
        )

    def sets(o: Operands) -> tuple[Any, ...]:
        """(scale, shift, gate) of both sets. Its select01 kernels also write a gate for later; the scale stands in."""
        assert o.scale is not None and o.shift is not None and o.scale1 is not None and o.shift1 is not None
        return o.scale[:, 0], o.shift[:, 0], o.scale[:, 0], o.scale1[:, 0], o.shift1[:, 0], o.scale1[:, 0]

    def select(o: Operands) -> Any:
        return modulate.fuse_layernorm_scale_shift_gate_select01_kernel(o.x, None, None, *sets(o), o.select, eps)

    chosen: dict[int, torch.Tensor] = {}

    def residual_select(o: Operands) -> Any:
        """It takes a chosen residual gate [B, L, C] and not two: made at the first call, so out of the timing."""
        if id(o) not in chosen:
            assert o.select is not None
            chosen[id(o)] = torch.where(o.select.unsqueeze(-1) == 0, o.gate, o.gate1)
        return modulate.fuse_residual_layernorm_scale_shift_gate_select01_kernel(
            o.x, o.residual, chosen[id(o)], None, None, *sets(o), o.select, eps
        )

    def gate(o: Operands) -> Any:
        return modulate.fuse_scale_shift_kernel(o.x, o.gate, o.residual, scale_constant=0)

    found: dict[str, dict[str, Callable[[Operands], Any]]] = {
        "norm": {"two": two_kernels},
        "rms": {"two": two_kernels},
        "residual": {"one": residual} if batch == 1 else {},
        "select": {"one": select},
        "residual_select": {"one": residual_select},
        "gate": {"one": gate},
    }
    if form == "norm" and o.x.dtype == torch.bfloat16 and channels % 4 == 0 and channels <= 8192:
        found["norm"] = {"one": one_kernel}
    return found.get(form, {})
